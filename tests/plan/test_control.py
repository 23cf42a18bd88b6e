"""Lists, choices, expressions, parameters of flows: their types, and what a plan makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import Diagnostic, Source, render
from flowlang.plan import graph
from flowlang.plan.check import NO_CHOICES, check_source, compile_source
from flowlang.plan.declare import Choices
from flowlang.plan.explain import explain_physical, explain_plan
from flowlang.plan.graph import Node
from flowlang.plan.physical import Machine, PhysicalPlan, lower
from flowlang.plan.rewrite import rewrite
from flowlang.syntax.format import format_program
from flowlang.syntax.parse import parse
from tests.cases import applied

pytestmark = pytest.mark.usefixtures("folder")

EACH = "type e = { k: str, v: int, w: int? }\nexport flow f: list<e> -> "
ONE = "type e = { k: str, v: int, w: int? }\nexport flow f: e -> "


def source(text: str) -> Source:
    return Source("app.flow", text)


def gives(text: str) -> str:
    """The type that the only served flow of a program gives."""
    (flow,) = compile_source(source(text)).flows
    return str(flow.output.type)


def errors(text: str, choices: Choices = NO_CHOICES) -> list[Diagnostic]:
    return [d for d in check_source(source(text), choices)[1] if d.severity == "error"]


def told(text: str) -> tuple[str, str]:
    """The kind and the place of the only error of a program."""
    found = errors(text)
    assert len(found) == 1, "\n".join(map(render, found))
    return found[0].slug, found[0].span.text


def physical(text: str) -> PhysicalPlan:
    return lower([compile_source(source(text))], Machine(4))


def stages(text: str) -> list[str]:
    """What each stage of a program does, in order."""
    return [" ".join(n.op for n in s.nodes) for s in physical(text).stages]


def nodes(text: str, name: str) -> list[Node]:
    plan = compile_source(source(text))
    return [n for flow in plan.flows for n in flow.all_nodes() if n.op == name]


# Types

TYPES: dict[str, tuple[str, str]] = {
    "map": ("decode -> cut(h=64) -> map(resize(8) -> rgb)", "list<image<rgb, u8, hwc, 8x8>>"),
    "map to null": ("decode -> cut(h=64) -> map(size, on_error=null)", "list<size?>"),
    "map to dropped": ("decode -> cut(h=64) -> map(size, on_error=drop)", "list<size>"),
    "map of values": ("decode -> cut(h=64) -> map(3)", "list<int>"),
    "map in map": (
        "export flow f: list<list<int>> -> list<list<int>> = map(map(pass + 1))",
        "list<list<int>>",
    ),
    "filter": ("decode -> cut(h=64) -> filter(.width > 3)", "list<image<undecided, u8, hwc>>"),
    "filter with operators": (
        "decode -> cut(h=64) -> filter((size -> .height) > 3)",
        "list<image<undecided, u8, hwc>>",
    ),
    "top of a list": (EACH + "list<e> = top(2, by=.v)", "list<e>"),
    "top by the element": ("export flow f: list<int> -> list<int> = top(2, by=pass)", "list<int>"),
    "top by a text": (EACH + "list<e> = top(2, by=.k)", "list<e>"),
    "top by what may be null": (EACH + "list<e> = top(2, by=.w)", "list<e>"),
    "join of what may be null": ("export flow f: list<str?> -> str = join(\", \")", "str"),
    "if": ("decode -> if .width > 3 then rgb else rgb", "image<rgb, u8, hwc>"),
    "if of different sides": (
        "decode -> if .width > 3 then resize(8) else resize(h=8, w=4)",
        "image<undecided, u8, hwc, 8x?>",
    ),
    "if of numbers": ("decode -> if .width > 3 then 1 else 0.5", "float"),
    "if of records": (
        "decode -> if .width > 3 then { a: 1, b: 2 } else { a: 0.5, c: \"x\" }",
        "{ a: float, b: int?, c: str? }",
    ),
    "if of lists": (
        "decode -> if .width > 3 then [{ a: 1 }] else [{ b: 2 }]",
        "list<{ a: int?, b: int? }>",
    ),
    "an empty list is of any type": ("decode -> if .width > 3 then [] else [1]", "list<int>"),
    "a list that is empty last": ("decode -> if .width > 3 then [1] else []", "list<int>"),
    "a list in an empty one's place": (
        "export flow f: list<int>? -> list<int> = (pass ?? []) -> map(pass + 1)",
        "list<int>",
    ),
    "match": (ONE + 'str = match .k { "a" | "b" => .k, else => "none" }', "str"),
    "match of truth": (
        "export flow f: { a: bool } -> int = match .a { true => 1, false => 2, else => 3 }",
        "int",
    ),
    "match of what may be null": (ONE + "int = match .w { 1 => 2, else => 3 }", "int"),
    "match of conditions": (
        "decode -> match { .width > 9 => 1, .width > 3 | .height > 3 => 2, else => 3 }",
        "int",
    ),
    "match in arms": (
        EACH + "list<{ k: str, v: int?, w: float? }> ="
        ' map(match .k { "a" => { k: .k, v: .v }, "b" => { k: .k, w: .v / 2 },'
        " else => { k: .k } })",
        "list<{ k: str, v: int?, w: float? }>",
    ),
    "fallback": ("decode(nvjpeg) ?? decode(libjpeg)", "image<undecided, u8, hwc>"),
    "fallback of null": (ONE + "int = .w ?? 0", "int"),
    "fallback of null to null": (ONE + "int? = .w ?? .w", "int?"),
    "fallback to another number": (ONE + "float = .w ?? 0.5", "float"),
    "fallback in a key": (EACH + "list<e> = top(1, by=(.w ?? 0))", "list<e>"),
    "fallback in a condition": (EACH + "list<e> = filter((.w ?? .v ?? 0) > 3)", "list<e>"),
    "a list as a default": (
        "export flow f(x: list<int> = [1, 2], y: list<float> = [3], z: list<str> = []):\n"
        "  bytes -> { x: list<int>, y: list<float>, z: list<str> } = { x, y, z }",
        "{ x: list<int>, y: list<float>, z: list<str> }",
    ),
    "a list as a default of a part": (
        "flow p(x: list<int> = [1, 2]): bytes -> list<int> = x\n"
        "export flow f: bytes -> list<int> = p",
        "list<int>",
    ),
    "null of null": (
        "type a = int?\nexport flow f: { n: a? } -> int = .n ?? 0", "int",
    ),
    "fallback in a fallback": (ONE + "int = (.w ?? .w) ?? 3", "int"),
    "a field of what may be null": (
        "export flow f: { a: { b: int }? } -> int? = .a.b",
        "int?",
    ),
    "arithmetic": (ONE + "int = .v + 2 * .v - 1", "int"),
    "division": (ONE + "float = .v / 2", "float"),
    "division of known numbers": (ONE + "float = 4 / 2", "float"),
    "minus": (ONE + "int = -.v", "int"),
    "a let of the flow's name": (
        "export flow a: int -> int {\n  let a = in + 1\n  return a\n}", "int",
    ),
    "comparison": (ONE + 'bool = .v >= 2 and not (.k == "a") or .w == 3', "bool"),
    "comparison of texts": (ONE + 'bool = .k < "m"', "bool"),
    "sides of an image": ("decode -> .width * .height", "int"),
    "list": ("decode -> [rgb, resize(8) -> rgb]", "list<image<rgb, u8, hwc>>"),
    "list of numbers": ("decode -> [1, 0.5]", "list<float>"),
    "record over what arrives": (ONE + "{ k: int, v: int, w: int? } = { ..., k: 3 }",
                                 "{ k: int, v: int, w: int? }"),
    "record before what arrives": (ONE + "{ k: int, v: int, w: int? } = { k: 3, ... }",
                                   "{ k: int, v: int, w: int? }"),
    "declared type of an empty list": ("export flow f: bytes -> list<int> = []", "list<int>"),
    "asserted element of an empty list": (
        "export flow f: bytes -> list<str> = [] -> map(as str)",
        "list<str>",
    ),
    "declared wider": (
        "type r = { a: int?, b: float }\nexport flow f: { b: int } -> r = pass",
        "r",
    ),
    "a parameter": ("export flow f(k: int): bytes -> int = k", "int"),
    "a param of the file": ("param k = 3\nexport flow f: bytes -> int = k", "int"),
    "a param in a record": (
        "param k = 3\nexport flow f: bytes -> { k: int, n: int } = { k, n: k + 1 }",
        "{ k: int, n: int }",
    ),
    "a param that is a list": (
        "param ks = [1, 2.5]\nexport flow f: bytes -> list<float> = ks", "list<float>",
    ),
    "a list for a part": (
        'param words = [["a"], []]\nflow part(ws: list<list<str>>) = { ws }\n'
        "export flow f: bytes -> { ws: list<list<str>> } = part(words)",
        "{ ws: list<list<str>> }",
    ),
    "a duration": ("export flow f(pause: duration = 2ms): bytes -> duration = pause", "duration"),
    "a path": ('export flow f(name: path = "x"): bytes -> path = name', "path"),
    "in as a value": (
        "export flow f: { k: int, xs: list<int> } -> list<int> {\n"
        "  return in -> .xs -> map(pass + in.k)\n}",
        "list<int>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_what_a_program_gives(name: str) -> None:
    """Each construct gives its type, and the program can be explained and planned."""
    text, kind = TYPES[name]
    assert gives(text) == kind
    plan = compile_source(source(text))
    assert explain_plan(plan)
    for machine in (Machine(4), Machine(8, "gpu", (0, 1))):
        assert explain_physical(lower([plan], machine))


@pytest.mark.parametrize("name", TYPES)
def test_rewriting_keeps_types(name: str) -> None:
    """What is done to a plan with bodies leaves it legal, and done twice changes nothing."""
    for flow in compile_source(source(TYPES[name][0])).flows:
        once = rewrite(flow)
        assert once.output.type == flow.output.type
        assert [n.op for n in rewrite(once).all_nodes()] == [n.op for n in once.all_nodes()]


@pytest.mark.parametrize("name", TYPES)
def test_formatting_keeps_a_program(name: str) -> None:
    """`fmt` writes a program that reads as the same one, and leaves its own output alone."""
    text = TYPES[name][0]
    tidy = format_program(parse(source(text)))
    assert parse(source(tidy)) == parse(source(text))
    assert format_program(parse(source(tidy))) == tidy


# Wrong programs: where the complaint stands. Their texts stand under tests/errors.

WRONG: dict[str, tuple[str, str, str]] = {
    "value behind an arrow": (
        "export flow f: int -> int {\n  let x = in + 1\n  return in -> x\n}", "not-a-stage", "x",
    ),
    "in behind an arrow": ("export flow f: int -> int { return in -> in }", "not-a-stage", "in"),
    "parameter behind an arrow": (
        "export flow f(k: int): int -> int = pass -> (k)", "not-a-stage", "k",
    ),
    "param behind an arrow": (
        "param k = 3\nexport flow f: int -> int = pass -> k", "not-a-stage", "k",
    ),
    "negative number behind an arrow": ("decode -> -5", "not-a-stage", "-5"),
    "a flow that nobody mentions": (
        "flow p(k: int): bytes -> int = nope -> k + 1\nexport flow f = decode",
        "unknown-operator", "nope",
    ),
    "a value of a flow that nobody mentions": (
        'flow p(k: int): bytes -> str = k\nexport flow f = decode', "type-mismatch", "str",
    ),
    "null": (ONE + "bool = .w == null", "unknown-operator", "null"),
    "pattern of a parameter": (
        'export flow f(p: str = "x"): str -> int = match pass { p => 1, else => 3 }',
        "not-a-constant", "p",
    ),
    "pattern of a field": (
        ONE + "int = match .v { .w => 1, else => 3 }", "not-a-constant", ".w",
    ),
    "no way out": ("decode -> match { .width > 3 => rgb }", "missing-else", ".width > 3 => rgb"),
    "else first": ("decode -> match { else => 1, .width > 3 => 2 }", "missing-else", "else => 1"),
    "key with operators": (
        "decode -> cut(h=8) -> top(2, by=size -> .height)", "not-a-constant", "size -> .height",
    ),
    "limit from a request": (
        "export flow f(m: int): list<int> -> list<int> = map(pass, max=m)", "not-a-constant", "m",
    ),
    "map of nothing": (EACH + "list<e> = map", "missing-parameter", "map"),
    "map of itself": (
        "export flow f: list<int> -> list<int> = map(f)", "recursive-flow", "f",
    ),
    "map of itself behind its name": (
        "flow a: list<int> -> list<int> = map(max=3, a)", "recursive-flow", "a",
    ),
    "default of itself": ("flow a(k: int = a): int -> int = pass", "recursive-flow", "a"),
    "itself before a let of its name": (
        "flow a: int -> int {\n  let x = in -> a\n  let a = 5\n  return x\n}",
        "recursive-flow", "a",
    ),
    "itself with arguments": (
        "flow a(a: int = 1): int -> int { return in -> a(2) }", "recursive-flow", "a",
    ),
    "boxes of another graph": (
        'flow net = resize(640) -> rgb -> normalize(unit) -> trt("yolov8n.onnx")\n'
        "export flow f {\n  let found = in -> decode -> net\n"
        "  return in -> decode -> if .width > 9 then (found -> boxes(yolov8)) else []\n}",
        "frame-mismatch", "boxes(yolov8)",
    ),
    "boxes of different makes": (
        'flow net = rgb -> normalize(unit) -> trt("yolov8n.onnx")\n'
        "export flow f = decode -> if .width > 9 then (resize(640) -> net)\n"
        "  else (resize(640, fit=letterbox) -> net) -> boxes(yolov8)",
        "frame-mismatch", "boxes(yolov8)",
    ),
    "argument of a stage": (
        "flow p(s: int) = resize(s)\nexport flow f = decode -> p(rgb)", "wrong-kind", "rgb",
    ),
    "argument of another type": (
        'flow p(s: int) = resize(s)\nexport flow f = decode -> p("a")', "wrong-kind", '"a"',
    ),
    "argument left out": (
        "flow p(s: int) = resize(s)\nexport flow f = decode -> p", "missing-parameter", "p",
    ),
    "argument out of range": (
        "flow p(s: int) = resize(s)\nexport flow f = decode -> p(0)", "out-of-range", "s",
    ),
    "argument from a request": (
        "flow p(s: int) = resize(s)\nexport flow f(k: int) = decode -> p(k)", "not-a-constant", "s",
    ),
    "model from a request": (
        "export flow f(file: str) = trt(file)", "not-a-constant", "file",
    ),
    "default of another type": (
        'export flow f(k: int = "a"): bytes -> int = k', "wrong-kind", '"a"',
    ),
    "default of a stage": (
        "export flow f(k: image = decode): bytes -> int = k.width", "not-a-constant", "decode",
    ),
    "what is in a value": (
        "flow f(k: int) { return k }\nexport flow g(k: int) { return k }", "unknown-input", "g",
    ),
    "copies of a choice": (
        "decode -> (if .width > 3 then rgb else rgb) x2", "replica-of-value", "x2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_where_the_complaint_stands(name: str) -> None:
    """One mistake gives one error, at the smallest place that is wrong."""
    text, slug, place = WRONG[name]
    assert told(text) == (slug, place)


def test_what_copies_an_unknown_record_is_unknown() -> None:
    """A mistake before a record of copies is told, and not what the copies may lack."""
    text = "type r = { a: int }\nexport flow f: r -> r = nope -> { ..., b: nope2 }"
    assert [d.message for d in errors(text)] == [
        "there is no operator or flow named `nope`",
        "there is no operator or flow named `nope2`",
    ]


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("export flow f: list<int> -> list<int> = top(3)", "top(3, by=pass)"),
        (EACH + "list<e> = top(3)", "top(3, by=.v)"),
        (ONE + "int = .w + 1", "(.w ?? 0)"),
        (ONE + "int = match .k { a => 1, else => 2 }", '"a"'),
        ("decode -> match { .width > 3 => flip }", ".width > 3 => flip, else => pass"),
        ("decode -> match { .width > 3 => 1 }", ".width > 3 => 1, else => 0"),
    ],
)
def test_help_mends(text: str, mended: str) -> None:
    """The help of an error, put where it belongs, leaves a program without that error."""
    (found,) = errors(text)
    assert found.help == mended
    assert found.slug not in {d.slug for d in errors(applied(found))}


def test_a_value_is_called_by_its_name() -> None:
    """Messages tell an element, a parameter and the flow's own item apart."""
    messages = [
        errors(text)[0].message
        for text in (
            "export flow f: list<int> -> list<int> = map(join)",
            "export flow f(k: int): bytes -> str = k -> join",
            "export flow f: int -> str = join",
            'export flow f: int -> str = if pass > 3 then join else ""',
        )
    ]
    assert messages == [
        "`join` cannot take what an element gives",
        "`join` cannot take what `k` gives",
        "`join` cannot take what the flow's input gives",
        "`join` cannot take what the flow's input gives",
    ]


def test_a_match_of_conditions_is_called_a_match() -> None:
    """Although it becomes branches in branches, its message speaks of what is written."""
    found = errors("decode -> match { .width > 9 => rgb, .width > 3 => rgb, else => gray }")
    assert [d.message for d in found] == ["the ways out of this `match` give different types"]


# Names


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("param k = 3\nexport flow f(k: int = 2): tensor<f32, 9> -> list<label> = top(k)", None),
        ("param k = 3\nflow g(k: int) = top(k)\n"
         "export flow f: tensor<f32, 9> -> list<label> = g(2)", 2),
        ("param k = 3\nexport flow f: tensor<f32, 9> -> list<label> {\n"
         "  let k = 1\n  return in -> top(k)\n}", 1),
        ("param k = 3\nexport flow f: tensor<f32, 9> -> list<label> {\n"
         "  let k = in -> argmax\n  return in -> top(k)\n}", None),
        ("param k = 3\nexport flow f: tensor<f32, 9> -> list<label> = top(k)", 3),
        ("param top = 3\nexport flow f: tensor<f32, 9> -> list<label> = top(top)", 3),
        ("param k = 3\nflow g(k: int) = top(k)\n"
         "export flow f: tensor<f32, 9> -> list<label> = g(k - 1)", 2),
    ],
)  # fmt: skip
def test_the_nearest_name_counts(text: str, value: int | None) -> None:
    """A parameter or let hides the param of its name, in arguments as everywhere."""
    (node,) = nodes(text, "top")
    given = node.params["k"]
    assert (None if isinstance(given, graph.Live) else given) == value


def test_a_let_of_a_number_is_known_beforehand() -> None:
    """A let that is a value in the text can be told to an operator that takes no live one."""
    text = "export flow f {\n  let side = 8\n  return in -> decode -> resize(side)\n}"
    assert gives(text) == "image<undecided, u8, hwc, 8x8>"
    text = text.replace("= 8", "= in -> decode -> .width")
    assert told(text) == ("not-a-constant", "side")


def test_a_stage_may_have_the_name_of_a_value() -> None:
    """A let hides a flow of its name; behind an arrow, where that is no stage, it is an error."""
    flow = 'flow net = trt("vector.onnx")\n'
    text = flow + "export flow f {\n  let net = in -> net\n  return net\n}"
    assert errors(text.replace("in -> net", 'in -> trt("vector.onnx")')) == []
    text = flow + 'export flow f {\n  let net = in -> trt("vector.onnx")\n  return in -> net\n}'
    assert told(text) == ("not-a-stage", "net")


def test_a_flow_may_have_the_name_of_an_operators_word() -> None:
    """Words among arguments are no mentions, so a flow named like one does not run itself."""
    text = (
        "flow imagenet = resize(224) -> rgb -> normalize(imagenet)\n"
        'flow yolov8 = resize(640) -> rgb -> trt("yolov8n.onnx") -> boxes(yolov8)\n'
        "flow drop = map(size, on_error=drop)\nflow unit = map(imagenet)\n"
        "export flow f = decode -> { a: yolov8, b: cut(h=8) -> drop, c: cut(h=8) -> unit }"
    )
    assert errors(text) == []
    for call in ("map(f)", "filter(f)", "top(2, by=f)", "map({ a: f })", "map(pass -> f)"):
        assert "recursive-flow" in {d.slug for d in errors(f"flow f: list<int> -> int = {call}")}


def test_an_explicit_field_counts_before_those_that_are_copied() -> None:
    """`...` copies the fields that the record does not name, wherever it stands."""
    for text in ("{ ..., k: 3 }", "{ k: 3, ... }", "{ ..., k: 3, ... }"):
        (record,) = nodes(ONE + f"{{ k: int, v: int, w: int? }} = {text}", graph.RECORD)
        fields = dict(zip(record.params["names"], record.inputs, strict=True))
        assert fields["k"].op == graph.LITERAL
        assert {fields[n].op for n in ("v", "w")} == {graph.FIELD}


# Arguments of flows

PREPARE = "param side = 16\nflow p(s: int = side / 2) = resize(s)\nexport flow f = decode -> "


@pytest.mark.parametrize(
    ("mention", "side"),
    [
        ("p", 8),
        ("p(4)", 4),
        ("p(s=4)", 4),
        ("p(side)", 16),
        ("p(side + 4)", 20),
        ("p(side / 4)", 4),
    ],
)
def test_arguments_of_flows_are_computed_beforehand(mention: str, side: int) -> None:
    """Arithmetic on params is as good as a number, also in defaults."""
    assert gives(PREPARE + mention) == f"image<undecided, u8, hwc, {side}x{side}>"


def test_a_flow_may_be_told_its_model() -> None:
    """A model, a name in a string, and what the flow then takes, follow from the argument."""
    text = 'flow net(file: str) = trt(file)\nexport flow f = net("vector.onnx")'
    assert gives(text) == "tensor<f32, 2>"
    text = 'flow net(name: str) = trt("{name}.onnx")\nexport flow f = net("ids")'
    (flow,) = compile_source(source(text)).flows
    assert str(flow.input.type) == "tensor<i64, 16>"


def test_arguments_tell_mentions_apart() -> None:
    """Mentions with equal arguments are one physical thing, those with others are another."""
    text = (
        'flow net(name: str, size: int = 1) = trt("{name}.onnx", batch=size)\n'
        "export flow f: tensor<f32, 1000> -> { a: tensor<f32>, b: tensor<f32>, c: tensor<f32>? } = "
    )
    same = physical(text + '{ a: net("vector"), b: net("vector", 1) -> softmax }')
    assert [s.batch for s in same.stages if s.model] == [(1, 1, 1)]
    other = physical(text + '{ a: net("vector"), b: net("vector", 2), c: net("vector", 2) }')
    assert [s.batch for s in other.stages if s.model] == [(1, 1, 1), (2, 2, 2)]


def test_a_record_given_to_a_parameter_gets_the_fields_it_lacks() -> None:
    """A parameter's type holds inside its flow, as that of the item does."""
    text = (
        "type r = { a: int?, b: float }\nflow g(r: r) = (r.a ?? 0) + r.b\n"
        "export flow f: { b: int } -> float = g(pass)"
    )
    assert gives(text) == "float"
    assert len(nodes(text, graph.WIDEN)) == 1


def test_a_number_given_to_a_float_is_one() -> None:
    """A whole number in a float's place is a float, as argument and as default."""
    for text in (
        "flow g(x: float) = { v: x }\nexport flow f: int -> { v: float } = g(1)",
        "flow g(x: float = 1) = { v: x }\nexport flow f: int -> { v: float } = g",
    ):
        (value,) = nodes(text, graph.LITERAL)
        assert type(value.params["value"]) is float
    (flow,) = compile_source(source("export flow f(x: float = 1): int -> float = x")).flows
    default = flow.parameters[0].default
    assert default is not None
    assert type(default.params["value"]) is float


# What is one, and what is two

NET = 'flow net = trt("vector.onnx")\n'


def test_a_flow_is_one_thing_inside_and_outside_of_bodies() -> None:
    """Mentions in a map, in branches and at the top share one stage, over all served flows."""
    text = NET + (
        "flow head = net -> top(1)\n"
        "export flow a: list<tensor<f32, 1000>> -> list<list<label>> = map(head)\n"
        "export flow b: tensor<f32, 1000> -> list<label> =\n"
        "  if argmax > 9 then head else (net -> top(2))\n"
        "export flow c = net\nschedule { net(batch=1..8) x2 }"
    )
    assert stages(text) == ["trt", "top", "argmax", "top"]
    models = [s for s in physical(text).stages if s.model]
    assert [(s.name, s.batch, s.instances) for s in models] == [("net", (1, 8, 8), 2)]


def test_work_outside_of_a_body_is_not_done_inside_again() -> None:
    """What a map captures is made once for the request, not once for each element."""
    text = (
        "export flow f {\n  let picture = in -> decode -> rgb\n"
        "  return picture -> cut(h=64) -> map({ part: resize(8), whole: picture -> resize(8) })\n}"
    )
    program = physical(text).programs[0]
    (unit,) = [u for u in program.steps.units if u.bodies]
    inner = {physical(text).stages[s].nodes[0].op for s in unit.bodies[0].stages()}
    assert inner == {"resize"}
    assert len(unit.bodies[0].captures) == 1


def test_bodies_share_no_work_with_what_is_around_them() -> None:
    """The same operator on the same value inside and outside of a branch is done where needed."""
    text = "decode -> { a: rgb, b: if .width > 9 then rgb else rgb } -> { ..., c: .a -> resize(8) }"
    assert stages(text).count("rgb") == 3


def test_equal_work_inside_one_body_is_done_once() -> None:
    """Branches of a record in a body share what they do alike."""
    text = "decode -> cut(h=64) -> map({ a: rgb -> resize(8), b: rgb -> resize(9) })"
    assert stages(text).count("rgb") == 1


def test_passes_in_bodies_need_no_stage() -> None:
    """`else => pass` costs nothing: the item is what comes out."""
    assert stages("decode -> if .width > 9 then resize(8) else pass") == ["decode", "resize"]
    assert stages(EACH + "list<e> = map(pass)") == []
    assert stages("pass") == ["pass"]


def test_plain_conditions_are_part_of_their_operator() -> None:
    """A condition or key without operators is computed inside the stage of `filter` or `top`."""
    text = EACH + "list<e> = filter(.v > 3 and pass.w == 3) -> top(2, by=.v)"
    assert errors(text)  # `pass.w` is no field
    text = "export flow f(n: int): list<int> -> list<int> = filter(pass > n) -> top(2, by=-pass)"
    assert stages(text) == ["filter top"]
    assert not nodes(text, graph.MAP)
    text = "export flow f: list<bytes> -> list<bytes> = filter((decode -> .width) > 3)"
    (each,) = nodes(text, graph.MAP)
    assert each.params["max"] >= 100_000


def test_the_two_ways_have_stages_of_their_own_settings() -> None:
    """Copies and batches stand in branches as anywhere."""
    text = (
        'export flow f = if argmax > 9 then trt("vector.onnx", batch=1..4) x2 '
        'else trt("vector.onnx") x1'
    )
    models = [s for s in physical(text.replace("f =", "f: tensor<f32, 1000> -> tensor<f32, 2> ="))
              .stages if s.model]  # fmt: skip
    assert [(s.batch, s.instances) for s in models] == [((1, 4, 4), 2), ((1, 1, 1), 1)]


def test_a_schedule_reaches_flows_that_only_bodies_mention() -> None:
    """A flow used in a map of a branch is scheduled by its name, and one with a map inside too."""
    text = NET + (
        'flow each = map(trt("vector.onnx"))\n'
        "export flow f: list<tensor<f32, 1000>> -> list<tensor<f32, 2>> =\n"
        "  (each ?? map(if argmax > 9 then net else net))\n"
        "schedule { net(batch=1..8, timeout=5s) x2   each(batch=1..3) x1 }"
    )
    found = {s.name: s for s in physical(text).stages if s.model}
    assert (found["net"].batch, found["net"].timeout_s) == ((1, 8, 8), 5.0)
    assert found["each"].batch == (1, 3, 3)


DETECT = (
    'flow big = trt("yolov8n.onnx", timeout=50ms)\nflow small = trt("yolov8n.onnx")\n'
    "export flow f = decode -> resize(640, fit=letterbox) -> rgb -> normalize(unit) -> "
)


@pytest.mark.parametrize(
    "asked",
    [
        "big",
        "(big ?? small)",
        "(if true then big else small)",
        "(big ?? if true then (pass -> small) else big)",
        "{ a: small, b: big } -> .b",
    ],
)
def test_boxes_see_through_choices(asked: str) -> None:
    """Whichever model was asked, boxes lie in the picture that was decoded before the choice."""
    (node,) = nodes(DETECT + f"{asked} -> boxes(yolov8)", "boxes")
    assert [n.op for n in node.params["chain"]] == ["decode", "resize", "rgb", "normalize"]
    assert node.inputs[1].op == graph.INPUT


def test_boxes_see_through_what_each_choice_prepares() -> None:
    """Where each way prepares the picture alike, that is part of the way of the picture."""
    text = (
        'flow net = resize(640) -> rgb -> normalize(unit) -> trt("yolov8n.onnx")\n'
        'flow two = resize(640) -> rgb -> normalize(unit) -> trt("yolov8n.onnx")\n'
        "export flow f = decode -> (net ?? two) -> boxes(yolov8)"
    )
    (node,) = nodes(text, "boxes")
    assert [n.op for n in node.params["chain"]] == ["decode", "resize", "rgb", "normalize"]


def test_boxes_of_differently_made_pictures_are_two() -> None:
    """One detector may be given letterboxed and stretched pictures: its boxes are told apart."""
    text = (
        'flow find = normalize(unit) -> trt("yolov8n.onnx", batch=1..4) -> boxes(yolov8)\n'
        "export flow f = decode -> {\n"
        "  a: resize(640, fit=letterbox) -> rgb -> find,\n  b: resize(640) -> rgb -> find,\n"
        "  c: resize(640) -> rgb -> find -> map(.box),\n}"
    )
    found = physical(text).stages
    assert [s.batch for s in found if s.model] == [(1, 4, 4)]
    assert len([s for s in found if s.nodes[0].op == "boxes"]) == 2


def test_a_broken_record_before_boxes_is_told_as_such() -> None:
    """A field that is not there does not hide its own error."""
    assert told("decode -> { a: rgb } -> .b -> boxes(yolov8)") == ("unknown-field", ".b")


# Size


def nest(depth: int) -> str:
    """A program of flows in flows, each of which maps the one before."""
    flows = "".join(f"flow a{i} = map(a{i - 1})\n" for i in range(1, depth))
    kind = f"{'list<' * 40}int{'>' * 40}"
    return f"flow a0 = pass\n{flows}export flow f: {kind} -> {kind} = a{depth - 1}"


@pytest.mark.parametrize(
    "text",
    [
        nest(41),
        "export flow f: int -> list<int> = [" + ", ".join(map(str, range(5000))) + "]",
        "export flow f: int -> int = match pass { "
        + "".join(f"{i} => pass + {i}, " for i in range(500))
        + "else => 0 }",
        "export flow f: int -> int = match { "
        + "".join(f"pass > {i} => {i}, " for i in range(60))
        + "else => 0 }",
        "export flow f: int -> int = " + " ?? ".join(["pass"] * 300),
        "".join(f"flow a{i} = map(pass + {i})\n" for i in range(200))
        + "export flow f: list<int> -> list<int> = "
        + " -> ".join(f"a{i}" for i in range(200)),
        "".join(
            f"export flow a{i}: list<int> -> list<int> = map(pass + {i})\n" for i in range(200)
        ),
    ],
    ids=["nested", "elements", "arms", "conditions", "fallbacks", "flows", "served"],
)
def test_wide_and_deep_programs_are_planned(text: str) -> None:
    """Programs larger than any that people write are checked and explained in seconds."""
    start_s = time.perf_counter()
    plan = compile_source(source(text))
    assert explain_plan(plan)
    assert explain_physical(lower([plan], Machine(4)))
    assert time.perf_counter() - start_s < 20


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("export flow f: list<int> -> int = " + "map(" * 128 + "pass" + ")" * 128, "too-deep"),
        (nest(140), "too-deep"),
        ("flow a0 = map(pass)\n"
         + "".join(f"flow a{i} = if true then a{i - 1} else a{i - 1}\n" for i in range(1, 30))
         + "export flow f: list<int> -> list<int> = a29", "too-large"),
        ("flow a0 = pass\n"
         + "".join(f"flow a{i} = a{i - 1} ?? a{i - 1}\n" for i in range(1, 30))
         + "export flow f: int -> int = a29", "too-large"),
    ],
    ids=["maps", "flows", "branches", "fallbacks"],
)  # fmt: skip
def test_programs_beyond_all_measure_are_refused(text: str, slug: str) -> None:
    """Nesting and unrolling have bounds, also through bodies, and are told at once."""
    start_s = time.perf_counter()
    assert slug in {d.slug for d in errors(text)}
    assert time.perf_counter() - start_s < 5


# Any expression

VALUES = st.sampled_from([".v", ".w ?? 0", "k", "3", "0.5", "len", "in.v"])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, inner)
    numbers: list[Callable[[Any], str]] = [
        lambda p: f"({p[0]}) + ({p[1]})",
        lambda p: f"-({p[0]})",
        lambda p: f"(if ({p[0]}) > ({p[1]}) then ({p[0]}) else ({p[1]}))",
        lambda p: f"(match {{ ({p[0]}) == ({p[1]}) => ({p[0]}), else => ({p[1]}) }})",
        lambda p: f"(({p[0]}) ?? ({p[1]}))",
        lambda p: f"({{ a: {p[0]}, b: {p[1]} }} -> .a)",
    ]
    return st.one_of([pair.map(f) for f in numbers])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expression=st.recursive(VALUES, grow, max_leaves=12))
def test_any_expression_checks_wherever_it_stands(expression: str) -> None:
    """As a result, in a map, in a branch and in a filter, an expression is a number."""
    body = "{\n  let len = in.v * 2\n  return in -> "
    where = (
        f"{{ x: {expression} }} -> .x",
        f"[{expression}] -> top(1, by=pass) -> map(pass)",
        f"(if ({expression}) > 0 then ({expression}) else 0)",
    )
    for text in where:
        program = "type e = { v: int, w: int? }\nexport flow f(k: int = 2): e -> { r: "
        kind = "list<float>" if text.startswith("[") else "float"
        whole = f"{program}{kind} }} {body}{{ r: {text} }}\n}}"
        assert errors(whole) == [], whole
        assert explain_physical(physical(whole))
        tidy = format_program(parse(source(whole)))
        assert parse(source(tidy)) == parse(source(whole))
