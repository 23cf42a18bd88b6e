"""A chosen few of the ten programs on an NVIDIA GPU: they say what they say on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowlang
from flowlang.runtime import cuda
from tests.engines import build_soon
from tests.furnish import furnish
from tests.pictures import photographs

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

PICTURES = photographs(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := cuda.why_no_gpu():
        pytest.skip(reason)
    return furnish(tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("name", ["p01_smallest", "p02_schedule", "p03_params", "p04_fanout"])
def test_a_program_answers_on_a_gpu_as_on_a_cpu(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model, one with a schedule, one with parameters, and three behind one decode."""
    monkeypatch.delenv("MODELS", raising=False)
    build_soon(monkeypatch)
    path = folder / f"{name}.flow"
    with flowlang.load(path, device="cpu") as app:
        wanted = [app(picture, deadline_s=60.0) for picture in PICTURES]
    with flowlang.load(path, device="gpu", engines=folder / "engines") as app:
        found = list(app.map(PICTURES, deadline_s=60.0))
        with pytest.raises(flowlang.BadRequest, match="decode failed"):
            app(b"no picture")
    for one, other in zip(found, wanted, strict=True):
        compare(one, other)


def compare(found: Any, wanted: Any) -> None:
    """Answers of one form, with numbers as far apart as half precision and decoders may be.

    Of nearly equal scores either may come first: scores are compared, and not their names.
    """
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted.keys() - {"index", "label"}:
            compare(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            compare(one, other)
    else:
        got, expected = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(expected)
