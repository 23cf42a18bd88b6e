"""Word lists: which files are, and what is said of those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

import flowlang
from flowlang.diagnostics import Source
from flowlang.plan.check import check_source
from flowlang.plan.lines import read_lines

FLOW = 'export flow f: tensor<f32, 3> -> label = best(names="{file}")\n'


def problems(file: str) -> list[tuple[str, str]]:
    """What is wrong with a flow that takes its names from a file."""
    found = check_source(Source("app.flow", FLOW.format(file=file)))[1]
    return [(d.slug, d.message) for d in found if d.severity == "error"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\nb\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),
        ("\u3000\n\n\u2028\x0c\n".encode(), ["\u3000", "", "\u2028\x0c"]),
    ],
)
def test_lines_end_with_line_feeds_alone(folder: Path, content: bytes, lines: list[str]) -> None:
    """A mark at the start and carriage returns go; a recogniser's characters stay."""
    (folder / "names.txt").write_bytes(content)
    assert read_lines(folder / "names.txt") == lines


@pytest.mark.parametrize(
    "content", [b"caf\xe9\n", "a\n".encode("utf-16"), "a\n".encode("utf-16-le")]
)
def test_other_encodings_are_told_when_a_flow_is_checked(folder: Path, content: bytes) -> None:
    """Not by a traceback when it is served."""
    (folder / "names.txt").write_bytes(content)
    assert problems("names.txt") == [("not-text", "`names.txt` is not text in UTF-8")]
    (folder / "app.flow").write_text(FLOW.format(file="names.txt"))
    with pytest.raises(flowlang.CompileError):
        flowlang.load(folder / "app.flow", device="cpu")


def test_a_list_that_cannot_be_read_is_told_when_a_flow_is_checked() -> None:
    """The system says why."""
    ((slug, message),) = problems("/proc/self/mem")
    assert slug == "missing-file"
    assert message.startswith("`/proc/self/mem` cannot be read: ")


def test_a_list_that_changes_after_the_check_is_an_error_of_the_engine(folder: Path) -> None:
    """What is served is read again, and may be no text by then."""
    from flowlang.runtime.results import lines_of

    (folder / "names.txt").write_bytes(b"\xff")
    with pytest.raises(flowlang.EngineError, match=r"`names\.txt` cannot be read"):
        lines_of(folder / "names.txt")
