"""The formatter: what it prints means the same, is stable, and keeps every comment."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import Source, Span
from flowlang.syntax import tree
from flowlang.syntax.format import format_expr, format_program, format_type
from flowlang.syntax.layout import WIDTH
from flowlang.syntax.parse import MAX_DEPTH, parse

PROGRAMS = sorted((Path(__file__).parents[1] / "programs").glob("*.flow"))
NOWHERE = Span(Source("nowhere", ""), 0, 0)

# Trees of every construct


def node(kind: type[Any], *parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Trees of a class, its compared fields drawn from `parts` in order, its spans nowhere."""
    compared = [f.name for f in dataclasses.fields(kind) if f.compare]
    spans = {f.name: NOWHERE for f in dataclasses.fields(kind) if f.name.endswith("span")}
    drawn = st.tuples(*parts)
    return drawn.map(lambda values: kind(**dict(zip(compared, values, strict=True)), **spans))


def some(part: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(part, min_size=least, max_size=4).map(tuple)


NONE = st.none()
NAMES = st.sampled_from(["a", "rgb", "_b2", "resize", "a_name_that_is_long_enough", "xs", "x4y"])
FIELD_NAMES = NAMES | st.sampled_from(["x1", "x4"])
TAILS = st.lists(FIELD_NAMES | st.sampled_from(["match", "flow", "in"]), max_size=2)
COUNTS = st.integers(1, 120)
PATHS = node(tree.Path, st.builds(lambda head, tail: (head, *tail), NAMES | st.just("in"), TAILS))
PLAIN_PATHS = node(tree.Path, st.builds(lambda head, tail: (head, *tail), NAMES, TAILS))
NUMBERS = st.sampled_from(
    [
        *(("0", ""), ("10", ""), ("0.25", ""), ("1.5e-3", ""), ("1e3", "")),
        *(("5", "ms"), ("512", "MiB"), ("50", "%")),
    ]
).map(lambda number: tree.Number(*number, NOWHERE))
STRINGS = node(
    tree.String,
    st.sampled_from(["", "{models}/a.onnx", "{{x}", 'a"b\\c/\n\t', "\x7f\u2028\u00a0", "# no"])
    | st.text(max_size=70),
)
BOOLS = node(tree.Bool, st.booleans())
RANGES = node(tree.Range, st.lists(NUMBERS, min_size=2, max_size=3).map(tuple))
CURRENTS = node(tree.Current, some(FIELD_NAMES, 1))
BARE = node(tree.Call, PATHS, NONE)
LEAVES = BARE | NUMBERS | STRINGS | BOOLS | RANGES | CURRENTS


def types_within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arguments = inner | st.sampled_from(["3x224x224", "3x?x?", "?x2", "7", "?"])
    fields = node(tree.TypeField, FIELD_NAMES, inner)
    nothing = st.just(())
    return node(tree.TypeExpr, PLAIN_PATHS, some(arguments, 1), nothing, st.booleans()) | node(
        tree.TypeExpr, NONE, nothing, some(fields, 1), st.booleans()
    )


TYPES = st.recursive(
    node(tree.TypeExpr, PLAIN_PATHS, st.just(()), st.just(()), st.booleans()),
    types_within,
    max_leaves=6,
)


def operations(operand: st.SearchStrategy[Any], *operators: str) -> st.SearchStrategy[Any]:
    """An operand, or operands joined by operators of one level, as the reader joins them."""

    def joined(first: tree.Expr, rest: list[tuple[str, tree.Expr]]) -> tree.Expr:
        if operators in (("and",), ("or",)):
            return tree.joined(operators[0], [first, *(right for _, right in rest)])
        for operator, right in rest:
            first = tree.Binary(operator, first, right, NOWHERE)
        return first

    pairs = st.tuples(st.sampled_from(operators), operand)
    return operand | st.builds(joined, operand, st.lists(pairs, min_size=1, max_size=3))


def conditions(stage: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What the grammar calls `or_expr`."""
    minus = node(tree.Unary, st.just("-"), stage)
    value = stage | minus | node(tree.Unary, st.just("-"), minus)
    total = operations(operations(value, "*", "/"), "+", "-")
    signs = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    compared = total | node(tree.Binary, signs, total, total)
    negated = compared | node(tree.Unary, st.just("not"), compared)
    return operations(operations(negated, "and"), "or")


def expressions_within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Pipelines whose brackets hold `inner`."""
    args = node(tree.Arg, NONE | FIELD_NAMES, inner)
    field = node(tree.RecordField, FIELD_NAMES, inner)
    short = node(tree.RecordField, NONE, NONE) | node(tree.RecordField, NAMES, NONE)
    arm = node(tree.Arm, some(conditions(LEAVES)), inner)
    atom = st.one_of(
        LEAVES,
        node(tree.Call, PATHS, some(args)),
        node(tree.ListOf, some(inner)),
        node(tree.Record, some(field | short)),
        node(tree.Match, NONE | BARE | CURRENTS, some(arm, 1)),
        node(tree.Group, inner),
    )
    plain = atom | node(tree.Repeat, atom, COUNTS)
    routed = node(tree.If, conditions(LEAVES), plain, plain)
    stage = plain | routed | node(tree.If, conditions(plain), routed, routed)
    choices = node(tree.Fallback, some(conditions(stage), 2))
    step = conditions(stage) | choices | node(tree.Ascribe, TYPES)
    return step | node(tree.Pipeline, some(step, 2))


EXPRESSIONS = st.recursive(LEAVES, expressions_within, max_leaves=12)
ARGS = NONE | some(node(tree.Arg, NONE | FIELD_NAMES, EXPRESSIONS))
BODIES = node(tree.Body, some(node(tree.Let, NAMES, EXPRESSIONS)), EXPRESSIONS)
INPUTS = node(tree.Input, FIELD_NAMES, TYPES, NONE | EXPRESSIONS)
ENTRIES = node(tree.Entry, PLAIN_PATHS, ARGS, NONE | COUNTS).map(
    lambda entry: dataclasses.replace(entry, count_span=NOWHERE if entry.count else None)
)
ITEMS = st.one_of(
    node(tree.Use, STRINGS, NAMES, NONE),
    node(tree.Param, NAMES, NONE | TYPES, EXPRESSIONS, NONE),
    node(tree.TypeDef, NAMES, TYPES, NONE),
    node(tree.Schedule, NONE | NAMES, some(ENTRIES), NONE),
    *2
    * [
        node(
            tree.Flow,
            NAMES,
            some(INPUTS),
            NONE | st.tuples(TYPES, TYPES),
            EXPRESSIONS | BODIES,
            st.booleans(),
            NONE,
        )
    ],
)
EDITIONS = st.sampled_from([None, 1])
TREES = node(tree.Program, EDITIONS, some(ITEMS, 1), NONE) | node(
    tree.Program, EDITIONS, st.just(()), EXPRESSIONS
)

# Sources: the tokens of a program with other blanks and comments between them

TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"|(?:\d+|\?)(?:x(?:\d+|\?))+|\d+(?:\.\d+)?(?:e-?\d+)?(?:[um]?s|[KMG]iB|%)?'
    r"|\.\.\.|\.\.|\.?[A-Za-z_]\w*|->|=>|\?\?|[=!<>]=|\S"
)
TRIVIA = st.sampled_from(
    [
        *("", "", " ", "\n", "\n\n\n", "\t \n"),
        *(" # @\n", "\n# @\n", "#@  \n", "\n\n#@\n\n", "# @\n  ## @\n\n\n# @\n"),
        *("\n  ## @ \u00e9\n", "\n## @\n## @\n"),
    ]
)
LAST_TRIVIA = st.sampled_from(["", "\n", " # @", "\n\n# @\n", "\n\n\n"])


@st.composite
def sources(draw: st.DrawFn) -> tuple[tree.Program, str]:
    """A program, and a text of it with any layout; its comments are numbered."""
    program = draw(TREES)
    plain = format_program(program)
    trivia = draw(st.lists(TRIVIA, min_size=3, max_size=30))
    numbers = itertools.count()

    def numbered(text: str) -> str:
        return re.sub("@", lambda _: str(next(numbers)), text)

    parts: list[str] = []
    end = 0
    for at, found in enumerate(TOKEN.finditer(plain)):
        parts += [plain[end : found.start()], numbered(trivia[at % len(trivia)]), found.group()]
        end = found.end()
    text = "".join(parts) + numbered(draw(LAST_TRIVIA))
    return program, text.replace("\n", "\r\n") if draw(st.booleans()) else text


def read(text: str) -> tree.Program:
    return parse(Source("test.flow", text))


def comments_of(program: tree.Program) -> list[str]:
    return [comment.text.rstrip() for comment in program.comments]


def owners_of(program: tree.Program) -> list[tuple[int, int]]:
    """How many declarations start, and how many end, before each comment."""
    spans = [item.span for item in program.items]
    return [
        (sum(s.start < place for s in spans), sum(s.end <= place for s in spans))
        for place in (comment.span.start for comment in program.comments)
    ]


def check(program: tree.Program) -> str:
    """The program formatted; fails where that changes, loses or unsettles anything."""
    text = format_program(program)
    again = read(text)
    assert again == program
    if program.comments:
        assert comments_of(again) == comments_of(program)
        assert owners_of(again) == owners_of(program)
    assert format_program(again) == text
    assert all(line == line.rstrip() for line in text.split("\n"))
    assert text == text.strip() + "\n"
    assert "\n\n\n" not in text
    return text


def without_docs(program: tree.Program) -> tree.Program:
    items = tuple(dataclasses.replace(item, doc=None) for item in program.items)
    return dataclasses.replace(program, items=items)


MANY = settings(max_examples=180, suppress_health_check=list(HealthCheck))


@MANY
@given(TREES)
def test_any_tree_survives(program: tree.Program) -> None:
    """A tree of any constructs, printed and read, is the same tree, and prints the same."""
    check(program)


@MANY
@given(sources())
def test_any_layout_and_comments_survive(written: tuple[tree.Program, str]) -> None:
    """Wherever blanks and comments stand, meaning, docs and comments stay, in their order."""
    program, text = written
    read_back = read(text)
    assert without_docs(read_back) == program
    check(read_back)


SNIPPETS = [
    'flowlang 1 use "a.py" as post',
    "param a: list<int?, 3x?> = [1, -.b, 5ms..1s]",
    "type t = { a: post.x?, b: list<tensor<f32, 3x224x224>>? }",
    "export flow f(a: int, b: x<y> = 5): { c: int } -> z = in.a",
    "flow f(a: int) { let x = in let y = f({ a, ..., b: 1..4 }, c=[]) return not x }",
    "flow f = foo() -> {} -> [] x4 -> as list<a.b>",
    "flow f = f({})",
    "flow f = g.f([]) x2",
    "flow f = map({ a, ... })",
    "flow f = if .a == 1 or b then c else if -d then (e -> g) else true",
    'flow f = match .a.b { "b" | 5ms => c(d=e), else => as int }',
    "flow f = match a.b { .a and not .c => h, else => g }",
    "flow f = a(1) ?? b + c * d",
    "schedule { a.b(c=1) x4 d x2 e.f }",
    "schedule prod {}",
]


@pytest.mark.parametrize("snippet", SNIPPETS)
@pytest.mark.parametrize("comment", [" # c\n", "\n## c\n", " # c\n\n# d\n\n"])
def test_a_comment_between_any_two_tokens_survives(snippet: str, comment: str) -> None:
    """A comment stays in its declaration, or between the two it stood between."""
    text = f"{snippet}\nflow last = in"
    for token in TOKEN.finditer(text):
        check(read(text[: token.start()] + comment + text[token.start() :]))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_survive(path: Path) -> None:
    """Each test program keeps its meaning and comments, and fits the width."""
    text = check(read(path.read_text("utf-8")))
    assert max(map(len, text.splitlines())) <= WIDTH


# What it looks like

LOOKS = [
    pytest.param(
        """\
decode->as image->resize( 224 )
  ->  trt("a.onnx",fp16,batch = 1 .. 4)x4
""",
        """\
decode -> as image -> resize(224) -> trt("a.onnx", fp16, batch=1..4) x4
""",
        id="a pipeline on one line",
    ),
    pytest.param(
        """\
flowlang  1
param a=1 # one
param longer:int=-2
flow net = trt( "a.onnx" )
export flow main = decode->net # two
# three
flow b=net
flow long_name=net

flow c=net
flow a_name_that_does_not_leave_its_neighbours_room = net
flow one = resize(224) -> rgb -> normalize(imagenet) -> trt("a.onnx", fp16) -> top(5)
""",
        """\
flowlang 1
param a           = 1  # one
param longer: int = -2
flow net         = trt("a.onnx")
export flow main = decode -> net  # two
# three
flow b         = net
flow long_name = net

flow c                                              = net
flow a_name_that_does_not_leave_its_neighbours_room = net
flow one = resize(224) -> rgb -> normalize(imagenet) -> trt("a.onnx", fp16) -> top(5)
""",
        id="runs of flows and of params are aligned, and a blank line or comment ends a run",
    ),
    pytest.param(
        """\
flow medium = decode -> resize(224) -> rgb -> normalize(imagenet) -> medium_sized_network -> top(5)
flow large = decode -> resize(224) -> rgb -> normalize(imagenet) -> trt("resnet50.onnx", fp16) x2
-> top(5)
""",
        """\
flow medium =
  decode -> resize(224) -> rgb -> normalize(imagenet) -> medium_sized_network -> top(5)
flow large =
  decode
  -> resize(224)
  -> rgb
  -> normalize(imagenet)
  -> trt("resnet50.onnx", fp16) x2
  -> top(5)
""",
        id="a long flow: below its name, else a stage a line",
    ),
    pytest.param(
        """\
flow a=b
flow judge { let x = in

  return x->y }
schedule { a(wait=2ms) x2 judge(slo=30ms) }
schedule prod { a(gpu=0..1) }
type t={a:int?,b:list<tensor<f32,3x?x?>>}



use "post.py" as post
""",
        """\
flow a = b

flow judge {
  let x = in

  return x -> y
}

schedule {
  a(wait=2ms) x2
  judge(slo=30ms)
}

schedule prod { a(gpu=0..1) }

type t = { a: int?, b: list<tensor<f32, 3x?x?>> }

use "post.py" as post
""",
        id="blocks have blank lines around them, others keep one",
    ),
    pytest.param(
        """\
flow read(first_parameter: list<label>, second_parameter: tensor<f32, 3x224x224>): bytes -> str = a
flow route = map(match .label { "car" | "truck" => { ..., vehicle: .box -> crop(img) -> vehicle },
  else => pass }) x4
flow choose = if .score < 0.6 and not .is_small then (patch -> large_network) else if .a then b
  else c(true)
flow late = first_network(timeout=25ms) ??
  second_network(timeout=15ms) ?? third_network_of_all(timeout=[5ms])
""",
        """\
flow read(
  first_parameter: list<label>,
  second_parameter: tensor<f32, 3x224x224>,
): bytes -> str = a
flow route = map(match .label {
  "car" | "truck" => { ..., vehicle: .box -> crop(img) -> vehicle },
  else => pass,
}) x4
flow choose =
  if .score < 0.6 and not .is_small
  then (patch -> large_network)
  else if .a
  then b
  else c(true)
flow late =
  first_network(timeout=25ms)
  ?? second_network(timeout=15ms)
  ?? third_network_of_all(timeout=[5ms])
""",
        id="split brackets end in commas, an only bracket in a call is hugged",
    ),
    pytest.param(
        """\
# file

## doc
flow f( # open
  a: int, # a
  b: int # b
): x -> y =
  decode # decoded
  -> # what follows
  resize # size
  (224, # side
   # lonely
  )
  -> # as it was
  { a: # value
    rgb, b # last
  }
flow g { # body
  # first
  let x = in # in

  # result
  return # of all
    x
  # end
} # after
schedule {
  # empty
}
type t = tensor< # kind
  f32, 3x224x224>
# bye""",
        """\
# file

## doc
flow f(  # open
  a: int,  # a
  b: int,  # b
): x -> y =
  decode  # decoded
  # what follows
  -> resize(  # size
    224,  # side
    # lonely
  )
  # as it was
  -> {
    a:  # value
      rgb,
    b,  # last
  }

flow g {  # body
  # first
  let x = in  # in

  # result
  # of all
  return x
  # end
}  # after

schedule {
  # empty
}

type t = tensor<  # kind
  f32,
  3x224x224
>
# bye
""",
        id="comments stay where they were",
    ),
]


@pytest.mark.parametrize(("written", "canonical"), LOOKS)
def test_looks(written: str, canonical: str) -> None:
    """Text written anyhow comes out as the one canonical text."""
    assert check(read(written)) == canonical


def constructs(value: object) -> set[type]:
    """The classes of a tree and of everything in it."""
    if isinstance(value, tuple):
        return set().union(*map(constructs, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, Span):
        return set()
    parts = (getattr(value, f.name) for f in dataclasses.fields(value))
    return {type(value)}.union(*map(constructs, parts))


def test_looks_show_every_construct() -> None:
    """A new construct needs a look above."""
    shown = constructs(tuple(read(str(case.values[0])) for case in LOOKS))
    kinds = {k for k in vars(tree).values() if dataclasses.is_dataclass(k) and k is not Span}
    assert {k.__name__ for k in kinds if isinstance(k, type)} == {k.__name__ for k in shown}


def test_an_expression_prints_on_one_line() -> None:
    """Expressions and types in messages are one line, however long, without comments."""
    stages = " -> ".join(f"stage_{number}(a=.x * 2)" for number in range(20))
    program = read("flow f: list<{a: int?}> -> str = " + stages.replace("->", "# c\n->"))
    flow = program.items[0]
    assert isinstance(flow, tree.Flow)
    assert flow.signature
    assert not isinstance(flow.body, tree.Body)
    assert format_expr(flow.body) == stages
    assert format_type(flow.signature[0]) == "list<{ a: int? }>"


@pytest.mark.parametrize("opening", ["(", "f(a, x=", "{ x: ", "[a, ", "match { .a => "])
def test_the_deepest_program_survives(opening: str) -> None:
    """What the parser takes is not too deep for the formatter."""
    closing = {"(": ")", "{": "}", "[": "]"}
    ends = "".join(closing[c] for c in reversed(opening) if c in closing)
    check(read(opening * MAX_DEPTH + "a" + ends * MAX_DEPTH))


def test_unprintable_characters_are_escaped() -> None:
    """A string shows what it holds: control, invisible and lone surrogate characters escaped."""
    text = read(r'f("\u007f\u200b\ud800\t\/", "' + "\u00e9\u00a0" + '")')
    assert check(text) == r'f("\u007f\u200b\ud800\t/", "' + "\u00e9" + '\\u00a0")\n'
