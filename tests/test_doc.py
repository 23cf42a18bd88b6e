"""Documentation made from the tables and from flow files: it is whole, and says what they say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flowlang.diagnostics import Source
from flowlang.doc import (
    file_markdown,
    file_text,
    gives,
    operator_markdown,
    operators_markdown,
    operators_text,
    parameter_text,
    replace_tables,
    settings_markdown,
    settings_text,
    signature,
    takes,
)
from flowlang.plan.check import check_source
from flowlang.plan.declare import Choices
from flowlang.plan.ops import OPS, TABLE
from flowlang.plan.schedule import COPIES
from flowlang.plan.schedule import TABLE as SETTINGS
from flowlang.plan.types import Unknown
from flowlang.syntax.parse import parse
from tests.standins import furnish

TEXT = """\
## Side of the picture.
param size: int = env("SIZE", 224)
## Two at once.
type pair = { left: image, right: image }
flow net = trt("resnet50.onnx", fp16)
## Classes, best first.
##
## Of any JPEG.
export flow classify(k: int = 5, name: str): bytes -> list<label> = decode -> resize(size) -> rgb
  -> normalize(imagenet) -> net -> top(k)
export flow views = decode -> { small: resize(8), same: pass }
schedule { net(batch=1..4, wait=2ms) x2 classify(slo=50ms) }
schedule prod { net(batch=1..8) }
"""


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without its head."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_tables_are_replaced_between_their_markers_only() -> None:
    """What stands around a table, and a page without markers, stay as they are."""
    old = "a\n<!-- operators -->\nold | table\n<!-- /operators -->\nb\n"
    assert replace_tables(old) == (
        f"a\n<!-- operators -->\n{operators_markdown()}<!-- /operators -->\nb\n"
    )
    assert replace_tables(replace_tables(old)) == replace_tables(old)
    empty = "<!-- settings -->\n<!-- /settings -->"
    assert settings_markdown() in replace_tables(empty)
    assert replace_tables("no tables | here\n") == "no tables | here\n"


@pytest.mark.parametrize("name", OPS)
def test_every_operator_says_what_it_takes_and_gives(name: str) -> None:
    """In words or as a type, and never that nothing is known."""
    op = OPS[name]
    assert takes(op)
    assert gives(op)
    assert "unknown" not in takes(op) + gives(op)
    assert takes(op) != "anything" or name == "pass"


def test_the_table_of_operators_has_everything() -> None:
    """Each operator has a row with all that it can be told."""
    table = rows(operators_markdown())
    assert [row[0] for row in table] == [f"`{op.name}`" for op in TABLE]
    for op, row in zip(TABLE, table, strict=True):
        cell = row[4]
        assert all(f"`{p.name}" in cell for p in op.params)
        assert all(f"`{word}`" in cell for p in op.params for word in p.words)
        assert all(f"`{setting}`" in cell for setting in op.settings)
        assert op.doc.replace("|", "\\|") in row[3]


def test_operators_in_a_terminal() -> None:
    """The text has every operator with every parameter, without markup, in lines that fit."""
    text = operators_text()
    assert "`" not in text
    assert max(map(len, text.splitlines())) <= 96
    for op in TABLE:
        page = next(p for p in text.split("\n\n") if re.match(rf"{op.name}\b", p))
        assert all(re.search(rf"^    {p.name} ", page, re.MULTILINE) for p in op.params)
        assert f"between devices: {op.tolerance}" in " ".join(page.split())


def test_signatures_tell_how_to_call() -> None:
    """By position or by name, with defaults and words."""
    assert signature(OPS["rgb"]) == "rgb"
    assert signature(OPS["decode"]) == "decode(auto|nvjpeg|libjpeg, truncated=fail)"
    assert signature(OPS["top"]) == "top(k, by=..., names=...)"
    assert signature(OPS["top"], "post.top") == "post.top(k, by=..., names=...)"


def test_parameters_tell_their_kind_range_and_default() -> None:
    """What can be written, what is taken otherwise, and what it means."""
    fill = OPS["resize"].param("fill")
    assert fill is not None
    assert parameter_text(fill) == "int 0..255; default `114`: level of the filled rest"
    k = OPS["top"].param("k")
    assert k is not None
    assert parameter_text(k) == "int 1..100000; required; may come with the request: how many"
    assert parameter_text(replace(k, doc="", is_live=False)) == "int 1..100000; required"


def test_an_operator_as_a_page() -> None:
    """Its signature, its line, its types and its parameters."""
    page = operator_markdown(OPS["best"])
    assert page.startswith("```flow\nbest(names=...)\n```\n\n")
    assert OPS["best"].doc in page
    assert "`tensor<f32, ?>` -> label" in page
    assert "- `names=` text file" in page


def test_the_table_of_settings_has_everything() -> None:
    """Each of the closed list and the copies, with what is taken otherwise."""
    table = {row[0]: row for row in rows(settings_markdown())}
    assert set(table) == {f"`{s.name}`" for s in SETTINGS} | {f"`{COPIES}N`"}
    assert all(all(row) for row in table.values())
    assert table["`wait`"][4] == "`0ms`"
    assert table["`slo`"][1] == "a served flow"
    assert table["`max_bytes`"][1] == "`decode`"
    for name in ("`batch`", "`wait`", "`timeout`", f"`{COPIES}N`"):
        assert "in Python" in table[name][1]
    assert table["`graphs`"][1] == "a model"
    assert table["`timeout`"][4] == "none; in Python `30s`"
    assert all(s.name in settings_text() for s in SETTINGS)


def pages(tmp_path: Path, text: str = TEXT, **environment: str) -> tuple[str, str]:
    """What is said of a file, as text and as Markdown."""
    source = Source(str(furnish(tmp_path) / "app.flow"), text)
    plan = check_source(source, Choices({}, environment))[0]
    program = parse(source)
    return file_text(program, plan), file_markdown(program, plan)


def test_a_file_is_documented_by_its_declarations(tmp_path: Path) -> None:
    """Flows, params and types with their comments, requests' parameters and schedules."""
    text, markdown = pages(tmp_path)
    assert text.startswith(
        "flow classify(k: int = 5, name: str): bytes -> list<label>\n"
        "  Classes, best first.\n\n"
        "  Of any JPEG.\n"
        "    k         int; default 5\n"
        "    name      str; required\n"
        "    schedule  slo=50ms\n"
    )
    assert "flow views: bytes -> { small: image<undecided, u8, hwc, 8x8>," in text
    assert "    schedule       batch=1..4 wait=2ms x2\n    schedule prod  batch=1..8\n" in text
    assert 'param size: int = env("SIZE", 224)\n  Side of the picture.\n' in text
    assert "type pair = { left: image, right: image }\n  Two at once.\n" in text
    heads = re.findall(r"^#+ .*", markdown, re.MULTILINE)
    assert heads == [
        "# app.flow", "## Flows", "### classify", "### views", "## Parts", "### net",
        "## Params", "### size", "## Types", "### pair",
    ]  # fmt: skip
    assert "- `k`: int; default `5`" in markdown


def test_a_param_tells_what_the_environment_made_of_it(tmp_path: Path) -> None:
    """A value that is not the file's is told with where it came from."""
    flow = 'param size: int = env("SIZE", 8)\nflow f = decode -> resize(size)'
    assert "environment" not in pages(tmp_path, flow)[0]
    assert "    environment  32" in pages(tmp_path, flow, SIZE="32")[0]


def test_a_bare_pipeline_is_documented_too(tmp_path: Path) -> None:
    """Its comments at the head of the file are its documentation."""
    text, markdown = pages(tmp_path, "## What it does.\n# not this\ndecode -> rgb\n")
    assert text == "flow main: bytes -> image<rgb, u8, hwc>\n  What it does.\n"
    assert markdown == (
        "# app.flow\n\n## Flows\n\n### main\n\n"
        "```flow\nflow main: bytes -> image<rgb, u8, hwc>\n```\n\nWhat it does.\n"
    )


def test_a_file_that_does_not_check_is_documented_without_inferred_types() -> None:
    """What is written is told, and what would have been inferred is left out."""
    program = parse(Source("app.flow", "## It.\nflow f = decode -> nothing\n"))
    assert file_text(program) == "flow f\n  It.\n"


def test_types_that_say_nothing_are_put_into_words() -> None:
    """An operator whose row has no type of its own has words for it."""
    for op in TABLE:
        if isinstance(op.takes, Unknown):
            assert not takes(op).startswith("tensor")
