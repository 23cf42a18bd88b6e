"""The numbers of the README are those that benchmarks have written, and the benchmarks run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import serve, wrk
from benchmarks.cpu import Run
from benchmarks.readme import README, TABLES, replace_tables


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    """Each table stands between its markers as it is made from `benchmarks/results`."""
    text = README.read_text("utf-8")
    assert all(f"<!-- {name}-table -->" in text for name in TABLES)
    assert replace_tables(text) == text


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
@pytest.mark.parametrize("job", serve.JOBS)
def test_serving_is_measured(job: str, tmp_path: Path) -> None:
    """Each job of `benchmarks.serve` runs for a moment, with flowlang and without any peer."""
    out = tmp_path / "serve.json"
    given = ["--rounds", "1", "--seconds", "1", "--patience", "0", "--only", job]
    serve.main([*given, "--servers", "", "--out", str(out)])
    found = json.loads(out.read_text())["jobs"][job]
    if job == "corrupt":
        assert [s["corrupt_statuses"] for s in found["servers"]] == [[400]]
        assert all(target["holds"] for target in found["targets"].values())
    else:
        rounds = [r for results in found["rounds"].values() for r in results]
        assert all(r["qps"] > 0 and r["failures"] == 0 for r in rounds)


def test_a_peer_that_is_not_installed_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured without it, and that it is missing is told."""
    run = Run(tmp_path, 1, 1.0, 0.0)
    bench = serve.Bench(run, ["uvicorn", "mosec"], tmp_path / "no-python")
    assert bench.servers == ["flowlang", "uvicorn"]
    assert set(run.found["machine"]["peers"]) == {"uvicorn"}
    assert "mosec is left out" in capsys.readouterr().err


def test_a_missing_wrk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without wrk nothing is started, and what to install is said."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt install wrk"):
        wrk.check_installed()
