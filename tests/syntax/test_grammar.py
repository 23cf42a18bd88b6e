"""The grammar: free of conflicts, and right where lark would stay silent if it were not."""

from __future__ import annotations

from pathlib import Path

import pytest
from lark import Lark

from flowlang.diagnostics import Source
from flowlang.syntax import tree
from flowlang.syntax.parse import grammar_text, parse

PROGRAMS = sorted((Path(__file__).parents[1] / "programs").glob("*.flow"))


def pipeline(text: str) -> tree.Expr:
    program = parse(Source("app.flow", text))
    assert program.pipeline is not None
    return program.pipeline


def flow(text: str) -> tree.Flow:
    (item,) = parse(Source("app.flow", text)).items
    assert isinstance(item, tree.Flow)
    return item


def test_the_grammar_has_no_conflicts() -> None:
    """lark's strict mode finds no shift/reduce conflict and no collision of terminals."""
    assert Lark(grammar_text(), parser="lalr", lexer="contextual", strict=True)


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_the_whole_language_is_read(file: Path) -> None:
    """Every construct of the language is read, also those that cannot be run yet."""
    program = parse(Source(file.name, file.read_text("utf-8")))
    assert program.items or program.pipeline


def test_copies_and_names_are_told_apart() -> None:
    """`x4` after a stage is a number of copies, and elsewhere a name like any other."""
    record = pipeline("{ x1: .x1 }")
    assert isinstance(record, tree.Record)
    assert record.fields[0].name == "x1"
    assert record.fields[0].value == tree.Current(("x1",), record.span)
    repeat = pipeline("x1 x4")
    assert isinstance(repeat, tree.Repeat)
    assert (str(repeat.stage.span.text), repeat.count) == ("x1", 4)


def test_copies_bind_to_the_last_branch() -> None:
    """In `if a then b else c x4` it is `c` that has four copies."""
    choice = pipeline("if a then b else c x4")
    assert isinstance(choice, tree.If)
    assert isinstance(choice.otherwise, tree.Repeat)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("f(1..4)", ["1", "4"]), ("f(1..4..8)", ["1", "4", "8"]), ("f(0.5..1.5)", ["0.5", "1.5"])],
)
def test_ranges_are_no_floats(text: str, parts: list[str]) -> None:
    """The dots of a range do not stick to its numbers."""
    call = pipeline(text)
    assert isinstance(call, tree.Call)
    assert call.args is not None
    value = call.args[0].value
    assert isinstance(value, tree.Range)
    assert [p.digits for p in value.parts] == parts


@pytest.mark.parametrize("text", ["1e3", "1E+3", "1.5e-3", "0.25"])
def test_numbers_have_a_fraction_or_an_exponent(text: str) -> None:
    """Either makes a number that is not whole."""
    call = pipeline(f"f({text})")
    assert isinstance(call, tree.Call)
    assert call.args is not None
    value = call.args[0].value
    assert isinstance(value, tree.Number)
    assert (value.digits, value.unit, value.is_int) == (text, "", False)


def test_a_side_of_any_length_is_written_alone_too() -> None:
    """`tensor<f32, ?>` has one side, and a `?` behind it makes it optional."""
    read = flow("flow f: tensor<f32, ?> -> tensor<f32, ?>? = softmax")
    assert read.signature is not None
    takes, gives = read.signature
    assert (takes.arguments[1], takes.optional) == ("?", False)
    assert (gives.arguments[1], gives.optional) == ("?", True)


@pytest.mark.parametrize("operator", ["==", "!=", "<", "<=", ">", ">="])
def test_fields_are_compared(operator: str) -> None:
    """A comparison after a field is no bracket of a type."""
    compared = pipeline(f".x {operator} 3")
    assert isinstance(compared, tree.Binary)
    assert compared.operator == operator


def test_a_type_may_end_where_a_definition_begins() -> None:
    """`>` that closes a type and `=` that follows it are not read as `>=`."""
    read = flow("flow f: bytes -> list<int>=decode")
    assert read.signature is not None
    assert read.signature[1].span.text == "list<int>"


def test_operators_bind_as_in_arithmetic() -> None:
    """`or` is loosest, then `and`, `not`, comparisons, sums and products."""
    grouped = pipeline("((a + (b * c)) < d and (not (e == f))) or g")
    plain = pipeline("a + b * c < d and not e == f or g")

    def bare(expr: tree.Expr) -> object:
        match expr:
            case tree.Group(value):
                return bare(value)
            case tree.Binary(operator, left, right):
                return operator, bare(left), bare(right)
            case tree.Unary(operator, value):
                return operator, bare(value)
        return expr

    assert bare(plain) == bare(grouped)


def test_a_fallback_binds_tighter_than_an_arrow() -> None:
    """`a ?? b -> c` goes on with c whichever of a and b answers."""
    steps = pipeline("a ?? b -> c")
    assert isinstance(steps, tree.Pipeline)
    assert isinstance(steps.steps[0], tree.Fallback)


def test_every_node_keeps_its_place() -> None:
    """Spans are those of the text, across lines and comments."""
    text = "decode # bytes in\n  -> resize(h=1, # height\n w=2)"
    call = pipeline(text)
    assert isinstance(call, tree.Pipeline)
    assert call.span.text == text
    resize = call.steps[1]
    assert isinstance(resize, tree.Call)
    assert resize.args is not None
    assert [a.span.text for a in resize.args] == ["h=1", "w=2"]
    assert [(a.value.span.line, a.value.span.column) for a in resize.args] == [(2, 15), (3, 4)]


@pytest.mark.parametrize("text", ["f()", "f() -> g()", "{}", "[]", "f([], {})"])
def test_empty_brackets_are_read(text: str) -> None:
    """Nothing between brackets is an empty list of arguments, fields or items."""
    assert pipeline(text).span.text == text
