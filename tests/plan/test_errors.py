"""Wrong programs: what is said of them, and that taking the advice mends them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flowlang.diagnostics import Diagnostic, as_json, render
from tests.cases import ERRORS, REGENERATE, Case, all_cases, applied, check, read_cases

pytestmark = pytest.mark.usefixtures("folder")

CASES = list(all_cases())
FILES = sorted(ERRORS.glob("*.flow"))
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def told(found: list[Diagnostic]) -> list[Diagnostic]:
    """The errors; where there are none, what else was said."""
    return [d for d in found if d.severity == "error"] or found


def said(case: Case) -> str:
    return "\n\n".join(render(d) for d in told(check(case.text, case.options)))


def texts(file: Path) -> dict[str, str]:
    """By name of a case, the expected text."""
    expected: dict[str, str] = {}
    for part in file.with_suffix(".txt").read_text("utf-8").split("#= ")[1:]:
        name, _, text = part.partition("\n")
        expected[name] = text.strip("\n")
    return expected


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_is_said_of_a_wrong_program(file: Path) -> None:
    """Each wrong program gives exactly the text that stands beside it."""
    got = {case.name: said(case) for case in read_cases(file)}
    if REGENERATE:
        text = "\n\n".join(f"#= {name}\n{words}" for name, words in got.items())
        file.with_suffix(".txt").write_text(f"{text}\n", "utf-8")
    assert got == texts(file)


@EACH_CASE
def test_a_case_is_filed_under_a_slug_it_gives(case: Case) -> None:
    """Every program under a slug's name really gives that slug."""
    assert case.slug in {d.slug for d in check(case.text, case.options)}


def test_every_slug_has_two_wrong_programs() -> None:
    """No kind of mistake is covered by one program only."""
    counts = {file.stem: len(read_cases(file)) for file in FILES}
    assert {slug for slug, count in counts.items() if count < 2} == {"too-deep"}


def fixes() -> Iterator[tuple[Case, Diagnostic]]:
    for case in CASES:
        for diagnostic in check(case.text, case.options):
            if diagnostic.fix is not None:
                yield case, diagnostic


def test_taking_the_advice_mends_the_mistake() -> None:
    """A help that says where it goes removes the very complaint it stands under."""
    count = 0
    for case, told in fixes():
        count += 1
        left = check(applied(told), case.options)
        again = [d for d in left if (d.slug, d.message) == (told.slug, told.message)]
        assert not [d for d in again if is_near(d, told)], f"{case}: {told.help!r}"
    assert count > 70


def is_near(diagnostic: Diagnostic, told: Diagnostic) -> bool:
    """Whether a diagnostic stands where the text of a help has been put."""
    assert told.fix is not None
    end = told.fix.start + len(told.help or "")
    return min(told.fix.start, told.span.start) <= diagnostic.span.start <= max(end, told.span.end)


@EACH_CASE
def test_places_lie_in_their_sources(case: Case) -> None:
    """Every place named by a diagnostic is inside its source, and its lines count from 1."""
    for diagnostic in check(case.text, case.options):
        for label in (diagnostic.primary, *diagnostic.secondary):
            assert 0 <= label.span.start <= label.span.end <= len(label.span.source.text)
        fields = as_json(diagnostic)
        line, column = fields["line"], fields["column"]
        assert isinstance(line, int)
        assert isinstance(column, int)
        assert line >= 1
        assert column >= 1


@EACH_CASE
def test_messages_follow_the_house_style(case: Case) -> None:
    """A message is lower case, on one line, without a full stop, and at most one sentence long."""
    for diagnostic in check(case.text, case.options):
        message = diagnostic.message
        assert "\n" not in message
        assert not message.endswith(".")
        assert not message[0].isupper()
        assert len(message) < 160


RIGHT = [
    "net = decode -> rgb",
    'net = trt("resnet50.onnx")\nexport flow f = decode -> resize(224) -> rgb -> net',
    "parm size = 224\nexport flow f = decode -> resize(size) -> rgb",
    "export flow f = decode -> a\nflwo a { return in -> resize(2) }",
    'import "post.py" as post\nexport flow f = decode -> post.part(side=3)',
    "export net = decode",
    "size: int = 3\nexport flow f = decode -> resize(size)",
    "export flow f = decode\nschedle prod { f(queue=3) }",
    'decode -> resize(224 -> rgb -> normalize(imagenet) -> trt("resnet50.onnx")',
    "decode -> cut(h=64) -> map(rgb -> gray",
    'flow f: { a: str } -> int = match .a { "x" => 1 }',
    'flow f: { a: str } -> str = match .a { "x" => .a }',
    "flow f: int -> int = (if pass > 3 then pass) -> pass",
    "flow f { let s = in -> decode -> size return { s.height } }",
    "flow f { let s = in -> decode -> size return { h: 3, s.width } }",
    "flow f = decode -> { .height }",
    "flow f = decode -> size -> { ..., .height }",
    "flow f { let img = in -> decode img -> rgb }",
    "flow f: list<{ a: { b: int } }> -> list<int> = .a.b",
    "flow f: list<label> -> list<label> = top(2)",
    "flow f: { b: box, of: bytes } -> size { let i = in -> .of -> decode"
    " return in -> .b -> crop -> size }",
    "flow f: list<int> -> list<int> = map(if pass > 3 then pass, max=3)",
]


@pytest.mark.parametrize("text", RIGHT)
def test_the_advice_makes_a_program_right(text: str) -> None:
    """Of a program with one mistake, nothing is wrong once its one error's help is taken."""
    (told,) = errors(check(text))
    assert errors(check(applied(told))) == []


def errors(found: list[Diagnostic]) -> list[Diagnostic]:
    return [d for d in found if d.severity == "error"]


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("flow f", " = map(decode)"),
        ("flow f(k: int = 3)", " = .items -> map(decode)"),
        ("flow f", " { return { a: in, b: in } }"),
        ("flow f", " = .size > 3"),
    ],
)
def test_the_types_that_are_proposed_suit_the_flow(head: str, body: str) -> None:
    """A flow that has to say what it takes is right once it says what it was told to."""
    (told,) = errors(check(f"{head}{body}"))
    assert told.slug == "unknown-input"
    assert (told.help or "").startswith(f"{head}: ")
    assert errors(check(f"{told.help}{body}")) == []
