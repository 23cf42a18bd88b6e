"""What the checker makes of programs: params, schedules, models and types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import models
from flowlang.diagnostics import CompileError, Source, render
from flowlang.plan.check import MAX_DIAGNOSTICS, NO_CHOICES, Plan, check_source, compile_source
from flowlang.plan.declare import CALLERS, Choices
from flowlang.plan.graph import Node
from flowlang.plan.physical import Machine, PhysicalPlan, lower
from flowlang.plan.schedule import SETTINGS
from flowlang.plan.schedule import TABLE as SETTING_TABLE
from tests.standins import write_model

pytestmark = pytest.mark.usefixtures("folder")

NET = 'flow net = trt("resnet50.onnx")\n'
HEAD = "decode -> resize(224) -> rgb -> normalize(imagenet)"
CLASSIFY = f"{NET}export flow classify = {HEAD} -> net\n"


def plan(text: str, choices: Choices = NO_CHOICES) -> Plan:
    return compile_source(Source("app.flow", text), choices)


def slugs(text: str, choices: Choices = NO_CHOICES) -> list[str]:
    """Kinds of errors, in order of place."""
    found = check_source(Source("app.flow", text), choices)[1]
    return [d.slug for d in found if d.severity == "error"]


def operators(text: str, name: str, choices: Choices = NO_CHOICES) -> Iterator[Node]:
    for flow in plan(text, choices).flows:
        yield from (n for n in flow.nodes() if n.op == name)


def param_of(text: str, op: str, param: str, choices: Choices = NO_CHOICES) -> Any:
    return next(operators(text, op, choices)).params[param]


def physical(text: str, choices: Choices = NO_CHOICES) -> PhysicalPlan:
    return lower([plan(text, choices)], Machine(8))


# Errors


def test_all_errors_of_a_file_come_in_one_run() -> None:
    """Mistakes of syntax, names, types, files and schedules are told together, by place."""
    text = """
flow a = decode rgb
param size = "
flow b = decode -> resise(224) -> trt("none.onnx", fp61, wait=5)
flow c = decode -> gray -> rgb
export flow d = decode -> resize(0) -> resize -> top(5, k=3)
schedule { b(batch=0..4, wait=2, colour=3) nope(x=1) }
"""
    found = check_source(Source("app.flow", text))[1]
    assert [(d.span.line, d.slug) for d in found] == [
        (2, "missing-arrow"),
        (3, "unclosed-string"),
        (4, "unknown-operator"),
        (4, "missing-file"),
        (4, "unknown-word"),
        (4, "missing-unit"),
        (5, "type-mismatch"),
        (6, "out-of-range"),
        (6, "missing-parameter"),
        (6, "given-twice"),
        (7, "bad-range"),
        (7, "missing-unit"),
        (7, "unknown-setting"),
        (7, "unknown-target"),
    ]


def test_one_mistake_is_told_once() -> None:
    """What follows from a mistake, however often it is mentioned, is not told again."""
    assert slugs("param size = nope\nexport flow a = decode -> resize(size) -> rgb") == [
        "unknown-name"
    ]
    assert slugs(f"flow a = decode rgb\nexport flow b = a -> resize(224)\n{NET}") == [
        "missing-arrow"
    ]
    assert slugs("flow a = resise(3)\nexport flow b = decode -> { x: a, y: a, z: a -> a }") == [
        "unknown-operator"
    ]
    assert slugs('export flow b = decode -> resize(224) -> rgb -> trt("no.onnx") -> top(5)') == [
        "missing-file"
    ]
    assert slugs("type t = { a: nope }\nexport flow b: bytes -> t = decode -> { a: rgb }") == [
        "unknown-type"
    ]


@pytest.mark.parametrize("name", sorted(CALLERS))
def test_a_parameter_is_not_named_as_what_callers_say(name: str) -> None:
    """What whoever calls a flow can say besides its parameters is none of them."""
    text = f"export flow f({name}: int, k: int): bytes -> int {{ return {name} + k }}"
    assert slugs(text) == ["reserved-word"]


def test_a_check_that_stops_says_so() -> None:
    """So many errors help nobody; but that there may be more is told, in every form."""
    many = "export flow main = decode\n" + "".join(
        f"flow a{i} = nope{i}\n" for i in range(MAX_DIAGNOSTICS + 50)
    )
    found = check_source(Source("app.flow", many))[1]
    assert len(found) == MAX_DIAGNOSTICS
    assert found[-1].note == f"checking stopped at {MAX_DIAGNOSTICS} messages; there may be more"
    assert all(not d.note for d in found[:-1])
    few = "export flow main = decode\n" + "".join(
        f"flow a{i} = nope{i}\n" for i in range(MAX_DIAGNOSTICS - 10)
    )
    assert all(not d.note for d in check_source(Source("app.flow", few))[1])


def test_a_syntax_error_hides_no_other_declaration() -> None:
    """Names a broken declaration would have declared are not called unknown elsewhere."""
    broken = {
        "param size =": "flow a = decode -> resize(size)",
        "param models = = 3": 'flow a = decode -> resize(224) -> trt("{models}/x.onnx")',
        "type t = {": "flow a: bytes -> t = decode",
        "flow net = (": "flow a = decode -> net",
        'use "x.flow" as x y': "flow a = decode -> x.prepare",
        "flow net = ) ": "schedule { net(batch=1) }",
    }
    for lost, other in broken.items():
        assert len(slugs(f"{lost}\n{other}")) == 1, lost


def test_the_text_of_an_exception_shows_the_first_errors() -> None:
    """CompileError carries every error, and shows fifty of a thousand."""
    text = "\n".join(f"export flow a{i} = nope" for i in range(300))
    with pytest.raises(CompileError) as caught:
        plan(text)
    assert len(caught.value.diagnostics) == 300
    assert str(caught.value).count("error[unknown-operator]") == 50
    assert str(caught.value).endswith("and 250 more")


def test_hints_do_not_stop_a_plan() -> None:
    """A program with hints only is compiled, and carries them."""
    compiled = plan('decode -> resize(224) -> rgb -> trt("resnet50.onnx")')
    assert [d.slug for d in compiled.hints] == ["unscaled-input"]


# Params


@pytest.mark.parametrize(
    ("default", "value", "expected"),
    [
        ("224", "448", 448),
        ("224", " 448 ", 448),
        ("0.5", "1", 1.0),
        ("0.5", "-2.5e-1", -0.25),
        ("5ms", "2s", 2.0),
        ("5ms", "100us", 1e-4),
        ("1MiB", "2GiB", 2 << 30),
        ("50%", "25%", 0.25),
        ("true", "False", False),
        ('"a"', "5", "5"),
        ('"a"', "", ""),
        ("1..4", "2..8", (2, 8)),
        ("1..4", "1..2..8", (1, 2, 8)),
    ],
)
def test_a_value_from_outside_is_read_as_the_default_is(
    default: str, value: str, expected: object
) -> None:
    """`--set` and the environment are read by the kind of the default."""
    text = f"param a = {default}\nexport flow f = decode"
    assert plan(text, Choices({"a": value}, {})).params[0].value.value == pytest.approx(expected)
    text = f'param a = env("A", {default})\nexport flow f = decode'
    if value.strip():
        found = plan(text, Choices({}, {"A": value})).params[0]
        assert found.value.value == pytest.approx(expected)
        assert found.origin == "environment"


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("int = 1", "1.5"), ("int = 1", "one"), ("int = 1", ""), ("int = 1", "1ms"),
        ("float = 1", "50%"), ("bool = true", "yes"), ("duration = 5ms", "5"),
        ("duration = 5ms", "5MiB"), ("size = 1MiB", "1"), ("int = 1", "9" * 5000),
        ("float = 1", "1e999"), ("int = 1", "\u0661"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(declared: str, value: str) -> None:
    """What does not read as a value of the param's type is an error at the place it came from."""
    choices = Choices({"a": value}, {})
    found = check_source(Source("app.flow", f"param a: {declared}\nflow f = decode"), choices)[1]
    assert found[0].slug in ("bad-value", "out-of-range")
    assert found[0].span.source.name == "--set a"


def test_set_comes_before_the_environment_and_that_before_the_file() -> None:
    """The order of precedence is the file, the environment, `--set`."""
    text = 'param size = env("SIZE", 1)\nexport flow f = decode -> resize(size)'
    cases = [
        (Choices({}, {}), 1, "file"),
        (Choices({}, {"SIZE": "2"}), 2, "environment"),
        (Choices({"size": "3"}, {"SIZE": "2"}), 3, "--set"),
    ]
    for choices, size, origin in cases:
        assert param_of(text, "resize", "size", choices) == size
        assert plan(text, choices).params[0].origin == origin


def test_the_environment_is_read_only_where_env_says_so() -> None:
    """A variable that happens to have a param's name changes nothing."""
    text = "param size = 1\nexport flow f = decode -> resize(size)"
    assert param_of(text, "resize", "size", Choices({}, {"size": "2", "SIZE": "2"})) == 1


def test_env_stands_in_params_only() -> None:
    """A flow reads no environment: the result could change from one machine to the next."""
    assert slugs('export flow f = decode -> resize(env("SIZE", 1))') == ["not-a-constant"]


def test_a_param_is_of_the_type_it_declares() -> None:
    """A whole number may be the default of a float, and is one then."""
    (found,) = plan("param a: float = 1\nexport flow f = decode").params
    assert (found.value.kind, type(found.value.value)) == ("float", float)
    text = "param a: float = 1\nexport flow f: bytes -> float = decode -> .width * 0 + a"
    assert slugs(text) == []


def test_env_takes_its_arguments_by_name() -> None:
    """In any order, and no others."""
    choices = Choices({}, {"HOME": "there"})
    for call in ('env(default="x", name="HOME")', 'env("HOME", default="x")', 'env(name="HOME")'):
        (found,) = plan(f"param a = {call}\nexport flow f = decode", choices).params
        assert (found.value.value, found.origin) == ("there", "environment")
    for call in ('env(default="x")', 'env("HOME", other="x")', 'env("HOME", "x", name="HOME")'):
        assert slugs(f"param a = {call}\nexport flow f = decode", choices) != []


def test_a_flow_that_nobody_mentions_needs_no_values() -> None:
    """It is checked as far as that goes without those that a mention would give."""
    text = """flow part(side: int, file: str, k: int) {
  let small = in -> resize(side) -> rgb
  return small -> if .width > side + 1 then (trt(file) -> top(k)) else (trt(file) -> top(k))
}
export flow f = decode"""
    assert slugs(text) == []


def test_params_are_computed_from_params_above() -> None:
    """Arithmetic, interpolation and lists see the params declared before them."""
    text = """
param half = 112
param size = half * 2 - 4 / 2 + 2
param third = size / 3
param folder = "models"
param model = "{folder}/resnet{half}.onnx"
param odd = "{{{half}}}"
param all = [half, size]
export flow f = decode -> resize(half)
"""
    values = {p.name: p.value.value for p in plan(text).params}
    assert values["size"] == 224
    assert isinstance(values["size"], int)
    assert values["third"] == pytest.approx(74.6667)
    assert values["model"] == "models/resnet112.onnx"
    assert values["odd"] == "{112}"
    assert values["all"] == (112, 224)


def test_a_param_can_be_a_range_a_word_is_not() -> None:
    """A setting takes a range from a param; a word of an operator is no value."""
    text = 'param sizes = 1..8\nflow net = trt("resnet50.onnx", batch=sizes)'
    assert physical(text).stages[0].batch == (1, 8, 8)
    assert slugs("param how = letterbox\nexport flow f = decode") == ["unknown-name"]


def test_files_are_looked_for_beside_the_flow(tmp_path: Path, folder: Path) -> None:
    """The folder of the flow file counts, not the current one."""
    write_model(tmp_path / "own.onnx", [("x", "f32", ("N", 3))], [("y", "f32", ("N", 3))])
    source = Source(str(tmp_path / "app.flow"), 'trt("own.onnx")')
    assert compile_source(source).flows[0].output.type
    assert slugs('trt("own.onnx")') == ["missing-file"]


# Schedules


def test_a_line_of_a_schedule_sets_what_an_inline_setting_sets() -> None:
    """Both spellings give the same stages."""
    inline = f'export flow classify = {HEAD} -> trt("resnet50.onnx", batch=1..2..4, wait=3ms) x2'
    apart = f"""export flow classify = {HEAD} -> trt("resnet50.onnx")
schedule {{ classify(batch=1..2..4, wait=3ms) x2 }}"""
    for text in (inline, apart):
        stage = physical(text).stages[0]
        assert (stage.batch, stage.wait_s, stage.instances) == ((1, 2, 4), 3e-3, 2)


def test_a_block_overrules_an_inline_setting() -> None:
    """The schedule has the last word, and leaves what it does not name."""
    text = f"""flow net = trt("resnet50.onnx", batch=1..2, wait=1ms) x4
export flow classify = {HEAD} -> net
schedule {{ net(batch=1..8) x2 }}"""
    stage = physical(text).stages[0]
    assert (stage.batch, stage.wait_s, stage.instances) == ((1, 8, 8), 1e-3, 2)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_named_schedule_is_laid_over_the_unnamed_one(is_first: bool) -> None:
    """Wherever it stands, it counts only when chosen, and then before the unnamed one."""
    blocks = [
        "schedule { net(batch=1..2, wait=1ms) x1 }\n",
        "schedule prod { net(batch=1..8) x4 }\n",
    ]
    text = CLASSIFY + "".join(reversed(blocks) if is_first else blocks)
    stage = physical(text).stages[0]
    assert (stage.batch, stage.wait_s, stage.instances) == ((1, 2, 2), 1e-3, 1)
    stage = physical(text, Choices({}, {}, "prod")).stages[0]
    assert (stage.batch, stage.wait_s, stage.instances) == ((1, 8, 8), 1e-3, 4)


def test_a_schedule_that_is_not_chosen_is_checked_too() -> None:
    """A mistake in any schedule is found before the day it is used."""
    assert slugs(CLASSIFY + "schedule prod { net(bach=1) }") == ["unknown-setting"]
    assert slugs(CLASSIFY + "schedule prod { net(batch=4) }\nschedule test { net(batch=8) }") == []
    text = 'flow f = trt("fixed.onnx")\nschedule prod { f(batch=8) }'
    assert slugs(text, Choices({}, {}, "prod")) == ["fixed-batch"]


def test_settings_of_the_entrance_belong_to_the_served_flow() -> None:
    """`slo` and `queue` go to the flow that is called, with its own defaults elsewhere."""
    text = CLASSIFY + "export flow other = decode\nschedule { classify(slo=30ms, queue=7) }"
    first, second = physical(text).programs
    assert (first.slo_s, first.queue) == (0.03, 7)
    assert (second.slo_s, second.queue) == (None, 256)


def test_the_limits_of_decode_can_be_scheduled() -> None:
    """`max_bytes` and `max_pixels` find the flow's one decoder."""
    text = "export flow f = decode -> rgb\nschedule { f(max_bytes=1MiB, max_pixels=1000) }"
    settings = physical(text).stages[0].settings
    assert (settings["max_bytes"], settings["max_pixels"]) == (1 << 20, 1000)


def test_every_setting_has_an_example_that_fits() -> None:
    """The example a message gives for a setting is one the checker takes."""
    for setting in SETTING_TABLE:
        target = "net" if setting.level == "stage" else "classify"
        text = f"{CLASSIFY}schedule {{ {target}({setting.name}={setting.example}) }}"
        assert slugs(text) == []
    assert len(SETTINGS) == len(SETTING_TABLE)


# Models


def test_a_model_with_several_outputs_gives_a_record() -> None:
    """Its outputs are fields by their names, in the order of the file."""
    flow = plan(
        'decode -> resize(h=480, w=640) -> rgb -> normalize(unit) -> trt("det.onnx")'
    ).flows[0]
    assert str(flow.output.type) == "{ boxes: tensor<f32, 100x4>, scores: tensor<f32, 100> }"


def test_a_model_with_several_inputs_takes_a_record() -> None:
    """Its inputs are found by name, in any order, images among them."""
    text = """export flow compare: tensor<f32, 1000> -> tensor<f32, 1> {
  return { right: in, left: in } -> trt("pair.onnx")
}"""
    assert str(plan(text).flows[0].output.type) == "tensor<f32, 1>"


def test_an_image_among_several_inputs_is_packed(tmp_path: Path) -> None:
    """The image goes in as the tensor its input wants, beside the other inputs."""
    ports = [("picture", "f32", ("N", 3, 8, 8)), ("about", "f32", ("N", 4))]
    write_model(tmp_path / "both.onnx", ports, [("y", "f32", ("N", 2))])
    text = """export flow f: { a: bytes, b: tensor<f32, 4> } -> tensor<f32, 2> {
  let picture = in -> .a -> decode -> resize(8) -> rgb -> normalize(unit)
  return { picture, about: in -> .b } -> trt("both.onnx")
}"""
    source = Source(str(tmp_path / "app.flow"), text)
    region = lower([compile_source(source)], Machine(1)).stages[0].region
    assert [n.op for n in region] == ["decode", "resize", "rgb", "pack"]


PAIRS = {
    "elements": '{ let p = { left: i, right: i }  return [p, p] -> map(trt("two.onnx")) }',
    "an if": "{ return (if true then { left: i, right: i } else { right: i, left: i }) -> net }",
    "a fallback": "{ return ({ left: i, right: i } ?? { left: i, right: i }) -> net }",
    "a way of an if": "{ let p = { left: i, right: i }  return p -> if true then net else net }",
}


@pytest.mark.parametrize("name", PAIRS)
def test_images_of_a_record_from_elsewhere_are_packed(name: str, tmp_path: Path) -> None:
    """A model's record need not be written right before it."""
    ports = [(n, "f32", ("N", 3, 8, 8)) for n in ("left", "right")]
    write_model(tmp_path / "two.onnx", ports, [("y", "f32", ("N", 2))])
    flow = PAIRS[name].replace("{", "{ let i = in -> decode -> resize(8) -> rgb ", 1)
    text = f'flow net = trt("two.onnx")\nexport flow f {flow}'
    app = lower([compile_source(Source(str(tmp_path / "app.flow"), text))], Machine(1))
    packed = [n for s in app.stages for n in s.nodes if n.op == "pack"]
    assert {str(n.type) for n in packed} == {"tensor<f32, 3x8x8>"}


def test_the_images_a_flow_declares_to_take_are_packed(tmp_path: Path) -> None:
    """Those of the record that a request brings, too, and nothing else of it."""
    ports = [("left", "f32", ("N", 3, 8, 8)), ("right", "f32", ("N", 4))]
    write_model(tmp_path / "two.onnx", ports, [("y", "f32", ("N", 2))])
    text = """type two = { right: tensor<f32, 4>, left: image<rgb, u8, 8x8>, more: int }
export flow f: two -> tensor<f32, 2> = trt("two.onnx")"""
    app = lower([compile_source(Source(str(tmp_path / "app.flow"), text))], Machine(1))
    assert [n.op for s in app.stages for n in s.nodes] == ["pack", "trt"]


def test_a_fixed_batch_is_the_batch() -> None:
    """Without a setting, a model runs at the size it was exported for; with one, at that only."""
    text = f'{HEAD} -> trt("fixed.onnx"{{}})'
    assert physical(text.format("")).stages[0].batch == (4, 4, 4)
    assert physical(text.format(", batch=4")).stages[0].batch == (4, 4, 4)
    assert physical(text.format(", batch=4..4")).stages[0].batch == (4, 4, 4)
    assert slugs(text.format(", batch=2")) == ["fixed-batch"]


@pytest.mark.parametrize(
    ("stages", "model", "slug"),
    [
        ("resize(224) -> rgb -> normalize(unit)", "resnet50.onnx", None),
        ("rgb -> resize(224) -> normalize(unit)", "resnet50.onnx", None),
        ("resize(224) -> bgr", "resnet50.onnx", None),
        ("resize(300, fit=shorter) -> crop(224) -> rgb", "resnet50.onnx", None),
        ("rgb", "levels.onnx", None),
        ("resize(28) -> gray -> normalize(imagenet)", "gray.onnx", None),
        ("rgb", "resnet50.onnx", "type-mismatch"),
        ("resize(w=224) -> rgb", "resnet50.onnx", "type-mismatch"),
        ("resize(h=224, most=300) -> rgb", "resnet50.onnx", "type-mismatch"),
        ("resize(225) -> rgb", "resnet50.onnx", "size-mismatch"),
        ("resize(224) -> gray", "resnet50.onnx", "channel-mismatch"),
        ("resize(224)", "resnet50.onnx", "undecided-colour"),
        ("rgb -> normalize(unit)", "levels.onnx", "dtype-mismatch"),
        ("resize(224) -> rgb", "vector.onnx", "rank-mismatch"),
        ("resize(224) -> rgb", "ids.onnx", "rank-mismatch"),
    ],
)
def test_what_a_model_takes_is_held_against_what_arrives(
    stages: str, model: str, slug: str | None
) -> None:
    """Size, colour, rank and dtype are checked, and nothing but packing is done on its own."""
    assert slugs(f'decode -> {stages} -> trt("{model}")') == ([slug] if slug else [])


def test_a_model_that_is_read_twice_is_one_file(folder: Path) -> None:
    """The same file named twice is read once and stays two operators."""
    model = 'trt("resnet50.onnx")'
    text = f"decode -> resize(224) -> rgb -> {{ a: {model}, b: {model} }}"
    first, second = operators(text, "trt")
    assert first.model is second.model
    assert first.site != second.site


@pytest.mark.parametrize(
    ("found", "picture", "slug"),
    [
        ("in -> .a -> find", "in -> .a -> read", None),
        ("in -> .a -> find", "in -> .b -> read", "frame-mismatch"),
        ("{ x: in -> .a } -> .x -> find", "in.a -> decode(libjpeg)", None),
        ("(if true then one else two)", "in -> .b -> read", None),
        ("(one ?? two) -> pass", "in -> .a -> read", None),
        ("(one ?? (in -> .a -> find)) -> pass", "in -> .b -> read", "frame-mismatch"),
    ],
)
def test_boxes_lie_in_the_picture_that_was_decoded(
    found: str, picture: str, slug: str | None
) -> None:
    """One file is one picture, however often it is decoded; what lies in one of two is let pass."""
    text = f"""flow read = decode -> rgb
flow find = read -> resize(640) -> normalize(unit) -> trt("yolov8n.onnx") -> boxes(yolov8)
export flow f: {{ a: bytes, b: bytes }} -> list<image> {{
  let one = in -> .a -> find
  let two = in -> .b -> find
  let found = {found}
  let picture = {picture}
  return found -> map(.box -> crop(picture))
}}"""
    assert slugs(text) == ([slug] if slug else [])


# Flows and types


def test_a_named_flow_is_one_thing_however_often_it_is_mentioned() -> None:
    """All mentions share one stage, across flows; an operator written twice is two."""
    text = f"""{NET}flow head = {HEAD}
export flow a = head -> net
export flow b = head -> net -> top(5)"""
    names = [s.name for s in physical(text).stages if s.model is not None]
    assert len(names) == 1
    text = f"""export flow a = {HEAD} -> trt("resnet50.onnx")
export flow b = {HEAD} -> trt("resnet50.onnx")"""
    assert len([s for s in physical(text).stages if s.model is not None]) == 2


def test_a_declared_type_is_held_against_what_flows() -> None:
    """Inputs and outputs of flows and `as` accept what fits and refuse what does not."""
    fine = [
        "export flow f: bytes -> image = decode -> rgb",
        "export flow f: bytes -> image<rgb, u8, 224x224> = decode -> resize(224) -> rgb",
        "export flow f: bytes -> image<rgb> ? = decode -> rgb",
        f'export flow f: bytes -> tensor<f32, ?x?> = {HEAD} -> trt("rec.onnx")'.replace(
            HEAD, "decode -> resize(h=32, w=512) -> gray"
        ),
        "type two = { a: image, b: image<gray> }\n"
        "export flow f: bytes -> two = decode -> { b: gray, a: rgb }",
        f'{HEAD} -> trt("resnet50.onnx") -> as tensor<f32, 1000> -> top(5) -> as list<label>',
    ]
    for text in fine:
        assert slugs(text) == [], text
    wrong = [
        "export flow f: bytes -> image<bgr> = decode -> rgb",
        "export flow f: bytes -> image<rgb, f32> = decode -> rgb",
        "export flow f: bytes -> { a: image } = decode -> { a: rgb, b: gray }",
        "export flow f: bytes -> list<image> = decode",
        f'{HEAD} -> trt("resnet50.onnx") -> as tensor<f32, 10>',
        f'{HEAD} -> trt("resnet50.onnx") -> as tensor<f16, 1000>',
        f'{HEAD} -> trt("resnet50.onnx") -> as tensor<f32, 1x1000>',
    ]
    for text in wrong:
        assert slugs(text) == ["type-mismatch"], text


def test_what_a_flow_takes_is_what_its_first_operator_takes() -> None:
    """Inputs are inferred through flows, groups, records and bodies."""
    inputs = {
        "decode -> rgb": "bytes",
        "(decode) -> rgb": "bytes",
        "{ a: decode, b: decode -> rgb }": "bytes",
        'trt("resnet50.onnx")': "tensor<f32, 3x224x224>",
        'trt("pair.onnx")': "{ left: tensor<f32, 1000>, right: tensor<f32, 1000> }",
        "as tensor<f32, 5> -> top(2)": "tensor<f32, 5>",
        "top(3)": "tensor<f32, ?>",
        "flow a = b -> rgb\nflow b = decode\nexport flow c = a -> gray": "bytes",
        "export flow a { let x = in -> decode return x -> rgb }": "bytes",
        "export flow a { return in -> decode }": "bytes",
        "export flow a { let x = decode return x -> rgb }": "bytes",
        "export flow a { let x = decode -> rgb let y = x -> gray return { x, y } }": "bytes",
        "flow x = decode\nexport flow a(k: int) { let y = x return { y, k } }": "bytes",
    }
    for text, expected in inputs.items():
        assert str(plan(text).flows[0].input.type) == expected, text


@pytest.mark.parametrize(("head", "asked"), [("yolov5", "yolov8"), ("yolov8", "yolov5")])
def test_a_head_is_held_against_the_classes_that_the_exporter_tells(
    head: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as the other head every class would be off by one, and nothing would fail."""
    monkeypatch.chdir(tmp_path)
    models.detector("det.onnx", head=head, side=64)
    text = 'decode -> resize(64) -> rgb -> normalize(unit) -> trt("det.onnx") -> boxes({})'
    assert slugs(text.format(head)) == []
    assert slugs(text.format(asked)) == ["type-mismatch"]


def test_records_and_lets_carry_items_around() -> None:
    """Fields, shorthands, spreads and lets give the types they are made of."""
    text = """export flow f {
  let picture = in -> decode
  let both = { small: picture -> resize(8), picture }
  return both -> { ..., grey: .small -> gray, same: both.picture }
}"""
    assert str(plan(text).flows[0].output.type) == (
        "{ small: image<undecided, u8, hwc, 8x8>, picture: image<undecided, u8, hwc>, "
        "grey: image<gray, u8, hwc, 8x8>, same: image<undecided, u8, hwc> }"
    )


def test_documentation_goes_to_the_next_declaration() -> None:
    """A run of `##` comments right above a declaration documents it; other comments do not."""
    text = "## Not this one.\n\n## Reads a picture.\n##  As it is.\nflow f = decode # no\n"
    assert plan(text).flows[0].doc == "Reads a picture.\nAs it is."
    assert plan("# no\nflow f = decode\n").flows[0].doc is None
    first, second = plan("## One.\nexport flow a = decode export flow b = decode\n").flows
    assert (first.doc, second.doc) == ("One.", None)


def test_the_place_of_an_error_counts_characters() -> None:
    """Columns count characters, and wide ones are pointed at by as many columns as they take."""
    found = check_source(Source("app.flow", '# 全角\n{ a: decode -> as image<"全"> }'))[1]
    assert [(d.span.line, d.span.column) for d in found] == [(2, 25)]
    text = 'flow f = decode -> trt("\u5168\u89d2.onnx") -> nope'
    lines = [render(d).splitlines() for d in check_source(Source("app.flow", text))[1]]
    assert lines[0][3] == f"  | {' ' * 23}{'^' * 11}"
    assert lines[1][3] == f"  | {' ' * 39}{'^' * 4}"
