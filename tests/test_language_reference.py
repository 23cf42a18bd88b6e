"""docs/language.md: its programs check, and it leaves out no operator and no setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowlang.diagnostics import render
from flowlang.plan import physical
from flowlang.plan.ops import TABLE as OPERATORS
from flowlang.plan.ops import UNBUILT
from flowlang.plan.schedule import COPIES
from flowlang.plan.schedule import TABLE as SETTINGS
from flowlang.plan.types import COLOURS, DTYPES, NAMED
from flowlang.runtime.trt import WORKSPACE
from flowlang.syntax.parse import MAX_SOURCE_BYTES
from flowlang.syntax.scan import RESERVED
from tests.cases import check
from tests.standins import furnish

TEXT = (Path(__file__).parents[1] / "docs" / "language.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)( not-built)?\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = [(mark.strip(), text) for kind, mark, text in BLOCKS if kind == "flow"]
ROWS = [row for row in TEXT.splitlines() if row.startswith("| `")]
CODE = set(re.findall(r"[a-zA-Z_][\w]*", " ".join(re.findall(r"`([^`\n]+)`", TEXT))))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))


@pytest.mark.parametrize(("mark", "text"), PROGRAMS)
def test_the_programs_check(mark: str, text: str) -> None:
    """A program has no errors; one marked not built has that one kind of error only."""
    errors = [d for d in check(text) if d.severity == "error"]
    if mark:
        assert {d.slug for d in errors} == {mark}
    else:
        assert not [render(d) for d in errors]


def test_the_message_is_what_is_said() -> None:
    """The message that is shown is the one its program gives."""
    message = next(text for kind, _, text in BLOCKS if kind == "text")
    lines = re.findall(r"^\d+ \| (.*)$", message, re.MULTILINE)
    said = [render(d) for d in check("\n".join(lines)) if d.severity == "error"]
    assert said == [message.rstrip("\n")]


def test_every_operator_and_argument_is_described() -> None:
    """The table of operators has a row for each, with all their words and names."""
    for op in OPERATORS:
        assert op.name in CODE
        words = {w for p in op.params for w in p.words}
        named = {p.name for p in op.params if p.is_named}
        assert (words | named) <= CODE, op.name
    assert UNBUILT <= CODE


def test_every_setting_is_described() -> None:
    """The table of settings has each of the closed list."""
    listed = {word for row in ROWS for word in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert {s.name for s in SETTINGS} | {f"{COPIES}N"} <= listed


def test_words_types_and_limits_are_those_of_the_code() -> None:
    """Reserved words, types, dtypes and the size of a file are told as they are."""
    assert set(re.findall(r"[a-z]+", TEXT)) >= RESERVED
    assert {*NAMED, *COLOURS, *DTYPES} <= CODE
    assert f"at most {MAX_SOURCE_BYTES >> 10} KiB" in TEXT


def test_defaults_are_those_of_the_code() -> None:
    """The last column of the table of settings holds what is taken where nothing is set."""
    defaults = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in ROWS}
    assert defaults["`batch`"].endswith(f"else 1 on a CPU, `1..{physical.GPU_BATCH}` on a GPU")
    assert defaults["`xN`"].endswith(f"{physical.GPU_LANES} a GPU")
    assert defaults["`workspace`"] == f"`{WORKSPACE >> 30}GiB`"
    assert defaults["`queue`"] == str(physical.QUEUE)
    limits = f"`{physical.MAX_BYTES >> 20}MiB`, {physical.MAX_PIXELS}"
    assert defaults["`max_bytes` `max_pixels`"] == limits
