"""Files that are being written: read in parts, and still checked as if they were read whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import Diagnostic, Source, Span, render
from flowlang.plan.check import check_source
from flowlang.plan.inspect import (
    MAX_MENTIONED,
    Draft,
    Reader,
    arriving,
    changed,
    inspect,
)
from flowlang.syntax.parse import MAX_SOURCE_BYTES
from flowlang.syntax.scan import declaring_lines, outline
from tests.cases import Case, all_cases
from tests.standins import furnish

ROOT = Path(__file__).parents[2]
CASES = [c for c in all_cases() if not c.options and c.slug not in ("too-large", "too-deep")]
PROGRAM = """\
flowlang 1
param size: int = 224

## The model.
# It is small.
flow net = trt("resnet50.onnx", fp16)
flow prepared = resize(size) -> rgb -> normalize(imagenet)
export flow main {
  let picture = in -> decode
  return { picture, best: picture -> prepared -> net -> best }
}
schedule { net(batch=1..4) x2 }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))


def told(draft: Draft, diagnostics: Iterable[Diagnostic]) -> set[object]:
    """What diagnostics say, and where: in the file's text, or in which other file."""
    return {
        (d.slug, d.message, d.help, draft.place(d.span) or elsewhere(d.span)) for d in diagnostics
    }


def elsewhere(span: Span) -> tuple[str, int, int]:
    return span.source.name, span.start, span.end


def types_of(text: str, marked: str) -> list[str]:
    """The types that `inspect` has seen for an expression of a program."""
    draft = Reader("app.flow").read(text)
    findings = inspect(draft)
    start = text.index(marked)
    part = draft.parts[draft.index(start)]
    at = start - draft.starts[draft.index(start)]
    return [str(kind) for kind in findings.types(part.source, at, at + len(marked))]


def test_the_parts_are_the_text() -> None:
    """Parts follow one another, each from the comments above its declaration."""
    draft = Reader("app.flow").read(PROGRAM)
    assert "".join(part.source.text for part in draft.parts) == PROGRAM
    firsts = [part.source.text.splitlines()[0] for part in draft.parts]
    assert firsts == [
        "flowlang 1",
        "## The model.",
        "flow prepared = resize(size) -> rgb -> normalize(imagenet)",
        "export flow main {",
        "schedule { net(batch=1..4) x2 }",
    ]
    assert [PROGRAM[draft.starts[i] :].startswith(first) for i, first in enumerate(firsts)]


def test_what_has_not_changed_is_not_read_again() -> None:
    """A key press costs one part: the others are the ones that were there before."""
    reader = Reader("app.flow")
    before = reader.read(PROGRAM)
    after = reader.read(PROGRAM.replace("rgb ->", "rgb -> gr ->"))
    same = [old is new for old, new in zip(before.parts, after.parts, strict=True)]
    assert same == [True, True, False, True, True]
    before = reader.read(PROGRAM)
    moved = reader.read("# a new line\n" + PROGRAM)
    assert [old is new for old, new in zip(before.parts, moved.parts, strict=True)] == [
        False, True, True, True, True,
    ]  # fmt: skip
    span = before.parts[3].program.items[0].span
    assert PROGRAM[slice(*(before.place(span) or ()))].startswith("export flow main")
    assert moved.place(span) == tuple(x + 13 for x in before.place(span) or ())
    assert after.place(before.parts[2].program.items[0].span) is None


def test_a_declaration_that_stands_twice_has_two_places() -> None:
    """The same text twice is two parts, and the second one is the one told about."""
    draft = Reader("app.flow").read("export flow a = decode -> gray\nflow b = rgb\nflow b = rgb\n")
    (found,) = inspect(draft).diagnostics
    assert found.slug == "duplicate-name"
    assert draft.place(found.span) == (49, 50)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_parts_are_checked_like_the_whole(case: Case) -> None:
    """The same is said of a program at the same places, however it was read."""
    draft = Reader("app.flow").read(case.text)
    source = Source("app.flow", case.text)
    whole = Draft(source, (), ())
    assert told(draft, inspect(draft).diagnostics) == told(whole, check_source(source)[1])


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "golden").glob("*.flow")), ids=str)
def test_right_programs_have_nothing_wrong(file: Path) -> None:
    """A program that checks does so in parts as well."""
    text = file.read_text("utf-8")
    draft = Reader("app.flow").read(text)
    whole = check_source(Source("app.flow", text))[1]
    assert [d.slug for d in inspect(draft).diagnostics] == [d.slug for d in whole]


WORDS = ("type", "schedule", "param", "flow", "use", "export")


@pytest.mark.parametrize("word", WORDS)
def test_a_line_may_start_with_a_word_of_declarations(word: str) -> None:
    """Fields and arguments have any name, also at the start of a line, and start nothing there."""
    text = (
        f"type t = {{\n  {word}: int,\n  a: int\n}}\n"
        f"flow p: t -> int =\n  .a + .{word}\n"
        f"export flow f: t -> int = pass\n  -> p\n"
        "schedule {\n}\n"
    )
    assert check_source(Source("app.flow", text))[1] == []
    draft = Reader("app.flow").read(text)
    assert inspect(draft).diagnostics == ()
    assert len(draft.parts) == 4
    (found,) = check_source(Source("app.flow", f"decode -> resize(\n{word}=3)"))[1]
    assert found.slug == "unknown-parameter"
    draft = Reader("app.flow").read(f"param n = 3\nexport flow f = decode -> resize(\n{word}=n)")
    assert [d.slug for d in inspect(draft).diagnostics] == ["unknown-parameter"]


@pytest.mark.parametrize(
    "text", ["export\nflow a = (\nflow b = rgb", "flow a = {\nuse: (\nparam b = 3", "param\nflow a"]
)
def test_declarations_are_found_as_in_the_whole(text: str) -> None:
    """Where lines start with declarations is told the same quickly and slowly."""
    found = outline(Source("app.flow", text)).declarations
    assert list(declaring_lines(text)) == list(found)


PIECES = st.sampled_from(
    ["", " ", "\n", "flow ", "flow b = rgb\n", "->", "(", ")", "{", "}", '"', "# c\n", "## d\n",
     "param size = 3\n", "export ", "use ", "let ", "\U0001f642", "x2", "schedule {"]
)  # fmt: skip


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 420), st.integers(0, 20), PIECES), max_size=4))
def test_reading_again_is_reading_anew(edits: list[tuple[int, int, str]]) -> None:
    """After any edits, what was kept is what would be read now."""
    reader, text = Reader("app.flow"), PROGRAM
    for at, length, piece in edits:
        text = text[:at] + piece + text[at + length :]
        kept, fresh = reader.read(text), Reader("app.flow").read(text)
        assert "".join(part.source.text for part in kept.parts) == text
        assert kept.starts == fresh.starts
        assert [p.program for p in kept.parts] == [p.program for p in fresh.parts]
        assert told(kept, inspect(kept).diagnostics) == told(fresh, inspect(fresh).diagnostics)


def test_what_expressions_give_is_seen() -> None:
    """The type of each stage is known, also in a file with errors elsewhere."""
    text = PROGRAM + "flow broken = decode -> (\nflow wrong = decode -> nothing\n"
    assert types_of(text, "resize(size)") == ["image<undecided, u8, hwc, 224x224>"]
    assert types_of(text, 'trt("resnet50.onnx", fp16)') == ["tensor<f32, 1000>"]
    assert types_of(text, "picture -> prepared -> net -> best") == ["label"]


def test_the_smallest_expression_around_a_place() -> None:
    """A place in the middle of a pipeline is in its stage, not in the pipeline."""
    draft = Reader("app.flow").read("decode -> resize(224) -> rgb")
    findings = inspect(draft)
    found = findings.at(draft.parts[0].source, 12)
    assert found is not None
    assert (found[0].text, [str(t) for t in found[1]]) == (
        "resize(224)",
        ["image<undecided, u8, hwc, 224x224>"],
    )
    assert [str(t) for t in findings.ending(draft.parts[0].source, 6)] == [
        "image<undecided, u8, hwc>"
    ]
    assert findings.at(draft.parts[0].source, 400) is None
    assert not findings.ending(draft.parts[0].source, 400)


def arrives(text: str) -> list[str]:
    """What arrives at `pass` in the last declaration of a text."""
    draft = Reader("app.flow").read(text)
    index = len(draft.parts) - 1
    part = draft.parts[index]
    at = part.source.text.rindex("pass")
    found = arriving(draft, index, changed(part, part.source.text), (at, at + 4))
    return [str(kind) for kind in found]


def test_what_arrives_at_a_place() -> None:
    """It is told from the declaration and from those it mentions."""
    assert arrives(PROGRAM + "flow a = decode -> prepared -> net -> pass") == ["tensor<f32, 1000>"]
    assert arrives("flow a = decode -> resize(9) -> pass") == ["image<undecided, u8, hwc, 9x9>"]
    assert arrives("flow a = decode -> missing -> pass") == ["unknown"]


def test_broken_neighbours_do_not_hide_what_arrives() -> None:
    """Declarations that cannot be read are left out, and what they would declare is unknown."""
    assert arrives("flow b = (\nflow a = decode -> rgb -> pass") == ["image<rgb, u8, hwc>"]
    assert arrives("flow b = (\nflow a = decode -> b -> pass") == ["unknown"]


def test_a_place_that_needs_too_much_is_not_waited_for() -> None:
    """Where an answer would take a check of half the file, there is none."""
    flows = "".join(f"flow f{i} = f{i + 1}\n" for i in range(MAX_MENTIONED + 10))
    text = f"{flows}flow f{MAX_MENTIONED + 10} = decode\n"
    assert arrives(f"{text}flow a = f60 -> pass") == ["image<undecided, u8, hwc>"]
    assert arrives(f"{text}flow a = f0 -> pass") == []


def test_a_text_too_large_says_so() -> None:
    """A text that is no flow by its size alone is still a draft, with that said of it."""
    text = "# " + "a" * MAX_SOURCE_BYTES
    draft = Reader("app.flow").read(text)
    assert draft.source.text == text
    (found,) = inspect(draft).diagnostics
    assert (found.slug, draft.place(found.span)) == ("too-large", (0, 1))


def test_nothing_is_run(tmp_path: Path) -> None:
    """A Python file is read for its signatures, and none of it is executed."""
    (tmp_path / "post.py").write_text(
        "open('executed', 'w').close()\n\ndef shout(text: str) -> str:\n    return text.upper()\n"
    )
    text = 'use "post.py" as post\nexport flow f: str -> str = post.shout'
    findings = inspect(Reader("app.flow").read(text))
    assert not findings.diagnostics
    assert findings.module is not None
    assert set(findings.module.uses) == {"post"}
    assert not (tmp_path / "executed").exists()


def test_the_environment_is_not_asked_unless_given() -> None:
    """What is chosen outside the file comes in as an argument."""
    draft = Reader("app.flow").read('param size: int = env("SIZE")\nflow f = decode')
    assert "missing-variable" in {d.slug for d in inspect(draft).diagnostics}


def test_places_are_told_as_lines_of_the_file() -> None:
    """A message about a later declaration names the line people see, also after it has moved."""
    reader = Reader("app.flow")
    for above in ("", "\n\n", "# one\n# two\n# three\n"):
        text = f"{above}flow a = rgb\n\nflow b = decode -> nothing\n"
        found = next(d for d in inspect(reader.read(text)).diagnostics if "`nothing`" in d.message)
        line = text[: text.index("nothing")].count("\n") + 1
        assert str(found.span) == f"app.flow:{line}:20"
        assert f"{line} | flow b = decode -> nothing" in render(found)
