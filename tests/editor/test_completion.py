"""What is offered at a cursor: what can stand there, from a program that is half typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.editor.completion import MAX_ITEMS, complete
from flowlang.editor.offers import Completion
from flowlang.plan.ops import OPS
from flowlang.plan.schedule import SETTINGS
from flowlang.plan.types import DTYPES, NAMED
from tests.editor.programs import CURSOR, TEXT, typed

FLOWS = {"net", "classify", "views"}
PARAMS = {"size", "models"}


def offered(folder: Path, end: str, text: str = TEXT) -> dict[str, Completion]:
    return {c.label: c for c in complete(*typed(folder, end, text)).items}


def test_operators_and_flows_stand_where_a_stage_does(folder: Path) -> None:
    """Behind an arrow, all that can run is offered, and nothing that only holds a value."""
    found = offered(folder, "flow z = decode -> █")
    assert set(found) >= {*OPS, *FLOWS, "post", "common", "if", "match", "as"}
    assert not set(found) & {"z", *(PARAMS - set(OPS)), "true"}


def test_what_takes_the_arriving_item_comes_first(folder: Path) -> None:
    """An image is offered image operators first, and those of tensors last."""
    found = offered(folder, "flow z = decode -> re█")
    assert found["resize"].rank < found["map"].rank < found["softmax"].rank
    found = offered(folder, "flow z = decode -> resize(224) -> rgb -> normalize(unit) -> net -> █")
    assert found["softmax"].rank < found["resize"].rank
    found = offered(folder, "flow z = classify -> █")
    assert found["top"].rank < found["resize"].rank


def test_an_operator_says_what_it_is(folder: Path) -> None:
    """Its types and its line of documentation are shown; what it must be told is asked for."""
    found = offered(folder, "flow z = decode -> █")
    assert (found["rgb"].detail, found["rgb"].doc) == ("image -> image<rgb>", OPS["rgb"].doc)
    assert (found["trt"].insert, found["rgb"].insert) == ("trt($0)", "")
    assert found["net"].doc == "The model."
    assert found["classify"].detail == "flow classify(k: int = 5): bytes -> list<label>"


def test_parameters_words_and_settings_stand_between_parentheses(folder: Path) -> None:
    """What was given is not offered again; a word stands for itself."""
    found = offered(folder, "flow z = decode -> resize(224, fit=letterbox, █")
    assert set(found) >= {"h=", "fill=", "antialias", "size"}
    assert not set(found) & {"fit=", "letterbox", "decode"}
    found = offered(folder, 'flow z = trt("model.onnx", █')
    assert set(found) >= {"fp16", "int8", "mean=", "batch=", "wait="}
    assert "fp32, the default" not in found
    assert found["wait="].kind == "setting"


def test_values_of_a_parameter_stand_behind_its_name(folder: Path) -> None:
    """Words, truth and params, as the parameter asks."""
    found = offered(folder, "flow z = decode -> resize(224, fit=█")
    assert set(found) == {*(OPS["resize"].param("fit") or OPS["top"].params[0]).words, *PARAMS}
    assert set(offered(folder, 'flow z = trt("model.onnx", graphs=█')) >= {"true", "false"}
    assert set(offered(folder, 'flow z = trt("model.onnx", wait=█')) >= {"2ms"}


def test_the_values_of_a_flow_can_be_named_in_its_body(folder: Path) -> None:
    """Lets above and inputs are offered, and `in`; not the let itself, nor those of others."""
    found = offered(folder, "flow z(k: int) {\n  let a = in -> decode\n  let b = █")
    assert set(found) >= {"a", "k", "in"}
    assert not set(found) & {"b", "img"}
    assert set(offered(folder, "flow z {\n  let a = in -> decode\n  █")) == {"let", "return"}
    assert set(offered(folder, "flow z {\n  let a = in -> decode\n  return a -> crop(█")) >= {"a"}


@pytest.mark.parametrize(
    ("end", "fields"),
    [
        ("flow z = classify -> best -> .█", {}),
        ("flow z = views -> .█", {"img": "image<undecided, u8, hwc>", "first": "label"}),
        ("flow z = views -> .first.█", {"index": "int", "label": "str", "score": "float"}),
        ("flow z = views -> .first.sc█", {"index": "int", "label": "str", "score": "float"}),
        ("flow z = decode -> .█", {"height": "int", "width": "int"}),
        ("flow z { let a = in -> decode return a.█", {"height": "int", "width": "int"}),
        ("flow z = classify -> map(.█", {"index": "int", "label": "str", "score": "float"}),
        ("flow z = classify -> filter(.label == \"a\" and .█", {"index": "int", "label": "str",
                                                                 "score": "float"}),
        ("flow z = classify -> top(3, by=.█", {"index": "int", "label": "str", "score": "float"}),
        ("flow z = decode -> if .█", {"height": "int", "width": "int"}),
        ("flow z = views -> .first -> match .█", {"index": "int", "label": "str",
                                                  "score": "float"}),
        ('flow z = views -> .first -> match .label { "a" => .█', {"index": "int", "label": "str",
                                                                  "score": "float"}),
        ("flow z = { a: decode, b: pass } -> { ..., c: .█", {"a": "image<undecided, u8, hwc>",
                                                             "b": "bytes"}),
    ],
)  # fmt: skip
def test_fields_are_those_of_what_arrives(folder: Path, end: str, fields: dict[str, str]) -> None:
    """Behind a dot stand the fields of the item here, in any depth of a half-typed program."""
    found = offered(folder, end)
    assert {name: c.detail for name, c in found.items()} == fields


def test_a_broken_line_elsewhere_changes_nothing(folder: Path) -> None:
    """Other declarations may be as broken as they like, and so may what stands behind."""
    text = TEXT + "flow broken = decode -> (\nflow worse = = ->\n"
    found = offered(folder, "flow z = views -> .█ -> ) = (\nflow = \n", text)
    assert set(found) == {"img", "first"}


def test_what_other_files_hold_stands_behind_their_name(folder: Path) -> None:
    """Flows of a .flow file, operators and records of a .py file, and their parameters."""
    assert set(offered(folder, "flow z = common.█")) == {"prepared"}
    found = offered(folder, "flow z = post.█")
    assert set(found) == {"shout", "face"}
    assert (found["shout"].detail, found["shout"].doc) == ("str -> str", "Say it louder.")
    assert "times=" in offered(folder, "flow z = post.shout(█")
    assert "Face" in offered(folder, "flow z: post.█")


def test_the_parameters_of_a_flow_are_offered(folder: Path) -> None:
    """A flow is told what its head declares."""
    assert "k=" in offered(folder, "flow z = classify(█")


def test_schedules_hold_flows_and_settings(folder: Path) -> None:
    """A line of a schedule starts with a flow, and its parentheses hold settings only."""
    assert set(offered(folder, "schedule prod { █")) == FLOWS
    assert set(offered(folder, "schedule prod { net(batch=1..4) █")) == FLOWS
    found = offered(folder, "schedule prod { net(batch=1..4, █")
    pictures = {"max_bytes=", "max_pixels="}
    assert set(found) == {f"{name}=" for name in SETTINGS} - pictures - {"batch="}
    assert set(offered(folder, "schedule prod { net(device=█")) >= {"cpu", "gpu"}


def test_types_stand_where_a_type_does(folder: Path) -> None:
    """Those of the language, of the file, and of the files it uses."""
    found = offered(folder, "flow z: █")
    assert set(found) == {*NAMED, "image", "tensor", "list", "pair", "post", "common"}
    assert found["pair"].detail == "{ left: image, right: image }"
    assert set(offered(folder, "flow z: tensor<█")) == set(DTYPES)
    assert set(offered(folder, "flow z: image<█")) == {"rgb", "bgr", "gray", "u8", "f32"}
    assert "pair" in offered(folder, "flow z: list<█")
    assert "pair" in offered(folder, "flow z = decode -> as █")


def test_files_and_params_stand_in_strings(folder: Path) -> None:
    """Only files of the kind that is named, folder by folder, and params in braces."""
    found = offered(folder, 'flow z = trt("█')
    assert set(found) >= {"resnet50.onnx", "models/"}
    assert not set(found) & {"keys.txt", "post.py"}
    assert set(offered(folder, 'flow z = trt("models/█')) == {"resnet50.onnx"}
    assert set(offered(folder, 'flow z = decode -> ctc("█')) >= {"keys.txt"}
    assert set(offered(folder, 'flow z = decode -> top(3, names="█')) >= {"imagenet.txt"}
    assert set(offered(folder, 'use "█')) >= {"post.py", "common.flow"}
    assert set(offered(folder, 'flow z = trt("{█')) == PARAMS
    assert not offered(folder, 'flow z = trt("nowhere/█')
    assert not offered(folder, 'param z = "█')


def test_words_of_the_language_stand_where_they_can(folder: Path) -> None:
    """Declarations at the start of a line, and what a construct still needs."""
    assert set(offered(folder, "█")) == {"flow", "export", "param", "type", "use", "schedule"}
    assert set(offered(folder, "export █")) == {"flow"}
    assert set(offered(folder, "flow z = decode -> if .width > 3 █")) == {"then", "and", "or"}
    assert "else" in offered(folder, "flow z = decode -> if .width > 3 then rgb █")
    assert "env" in offered(folder, "param z = █")


def test_an_empty_file_can_start_with_a_stage(folder: Path) -> None:
    """A bare pipeline is a whole program."""
    assert set(offered(folder, "█", "")) >= {"decode", "flow", "param"}


@pytest.mark.parametrize("end", ["# a █", "flow █", "flow z = resize(5m█", "type t = { █"])
def test_nothing_stands_where_something_is_named(folder: Path, end: str) -> None:
    """New names, units and comments are the author's."""
    assert not offered(folder, end)


def test_what_is_replaced_is_what_was_typed(folder: Path) -> None:
    """The typed word goes, and of a path in a string only its last part."""
    document, offset = typed(folder, "flow z = decode -> resi█")
    assert document.text[complete(document, offset).start : offset] == "resi"
    document, offset = typed(folder, 'flow z = trt("models/resn█')
    (found,) = complete(document, offset).items
    assert document.text[found.start : offset] == "resn"


def test_a_crowd_is_thinned_by_what_is_typed(folder: Path) -> None:
    """Of hundreds of flows, those are kept that have the typed letters in order."""
    text = "".join(f"flow part_{i} = rgb\n" for i in range(MAX_ITEMS * 2))
    document, offset = typed(folder, "flow z = decode -> pt17█", text)
    found = complete(document, offset)
    assert not found.is_whole
    assert "part_17" in {c.label for c in found.items}
    assert len(found.items) < MAX_ITEMS
    assert CURSOR not in document.text


def test_a_long_flow_is_not_read_at_each_key_press(folder: Path) -> None:
    """Behind hundreds of stages, what the last check saw pass there is what is offered."""
    stages = " -> ".join(["decode", *(f"resize({8 + i % 100})" for i in range(600)), "size"])
    document, offset = typed(folder, " -> .█", f"export flow long = {stages}")
    assert {c.label for c in complete(document, offset).items} == {"height", "width"}
    changed, offset = typed(folder, " -> rgb -> .█", f"export flow long = {stages}")
    assert not complete(changed, offset).items


def test_only_the_lets_that_are_needed_are_looked_at(folder: Path) -> None:
    """A let that is broken, or one of hundreds, does not matter to a statement without it."""
    lets = "".join(f"  let x{i} = a -> resize({8 + i}) -> (\n" for i in range(300))
    body = f"flow z {{\n  let a = in -> decode\n{lets}  let b = a -> size\n  return b -> .█"
    assert set(offered(folder, body)) == {"height", "width"}
