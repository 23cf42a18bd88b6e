"""docs/language.md: its programs check, its tables are the code's, its words are all there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flowlang
from flowlang.diagnostics import render
from flowlang.doc import replace_tables
from flowlang.plan.declare import CALLERS
from flowlang.plan.types import COLOURS, DTYPES, NAMED
from flowlang.syntax.parse import MAX_SOURCE_BYTES
from flowlang.syntax.scan import RESERVED
from tests.cases import REGENERATE, check
from tests.pictures import photographs
from tests.standins import furnish

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "language.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PAGES = sorted((ROOT / "docs").glob("*.md"))
FLOWS = re.compile(r"^```flow\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(FLOWS.findall(page.read_text("utf-8")))
]
CODE = set(re.findall(r"[a-zA-Z_][\w]*", " ".join(re.findall(r"`([^`\n]+)`", TEXT))))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))


def test_the_names_that_no_parameter_has_are_listed() -> None:
    """What callers say to flowlang itself."""
    assert CALLERS <= CODE


@pytest.mark.parametrize("text", PROGRAMS)
def test_the_programs_check(text: str) -> None:
    """No program has an error."""
    assert not [render(d) for d in check(text) if d.severity == "error"]


def test_the_operators_in_python_are_operators(tmp_path: Path) -> None:
    """The Python file that is shown declares what its flow mentions, and runs."""
    (tmp_path / "shown.py").write_text(next(text for kind, text in BLOCKS if kind == "python"))
    text = """use "shown.py" as shown
export flow far: bytes -> { far: float, look: tensor<f32, 3> } {
  let picture = in -> decode -> rgb
  let look = picture -> shown.embed
  let light = picture -> shown.brightness(scale=2)
  return { far: { a: look, b: look } -> shown.distance, look, light } -> { far: .far, look: .look }
}
"""
    (tmp_path / "app.flow").write_text(text)
    picture = photographs(1)[0]
    with flowlang.load(tmp_path / "app.flow", device="cpu") as app:
        assert app(picture)["far"] == 0.0


def test_the_message_is_what_is_said() -> None:
    """The message that is shown is the one its program gives."""
    message = next(text for kind, text in BLOCKS if kind == "text")
    lines = re.findall(r"^\d+ \| (.*)$", message, re.MULTILINE)
    said = [render(d) for d in check("\n".join(lines)) if d.severity == "error"]
    assert said == [message.rstrip("\n")]


@pytest.mark.parametrize("name", ["docs/language.md", "README.md"])
def test_the_tables_are_those_of_the_code(name: str) -> None:
    """What stands between the markers is what `flowlang doc` prints."""
    file = ROOT / name
    text = file.read_text("utf-8")
    if REGENERATE:
        file.write_text(replace_tables(text), "utf-8")
    assert replace_tables(text) == text


def test_words_types_and_limits_are_those_of_the_code() -> None:
    """Reserved words, types, dtypes and the size of a file are told as they are."""
    assert set(re.findall(r"[a-z]+", TEXT)) >= RESERVED
    assert {*NAMED, *COLOURS, *DTYPES} <= CODE
    assert f"at most {MAX_SOURCE_BYTES >> 10} KiB" in TEXT
