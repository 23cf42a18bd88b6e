"""Where things are declared, and what a file declares."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.editor.navigation import definition, symbols
from tests.editor.programs import TEXT, at, opened

MORE = """\
flow z(side: int = 8): pair -> image<rgb> = .left -> as image -> resize(side)
flow y = common.prepared -> trt("{models}/resnet50.onnx")
flow x = z(side=9) -> post.shout
flow w: post.Face -> str = .name
flow v = decode -> normalize(unit) -> net -> top(3, names="imagenet.txt")
"""


def found(folder: Path, marked: str, inside: int = 1) -> tuple[str, str, int] | None:
    """The file that a place leads to, the text there, and the line (from 1)."""
    document = opened(folder, TEXT + MORE)
    place = definition(document, at(document, marked, inside))
    if place is None:
        return None
    text = place.path.read_text("utf-8", "replace") if place.path else document.text
    name = place.path.name if place.path else "app.flow"
    return name, text[place.start : place.end], text[: place.start].count("\n") + 1


@pytest.mark.parametrize(
    ("marked", "inside", "name", "line"),
    [
        ("net -> top", 1, "net", 9),
        ("(size)", 1, "size", 4),
        ("top(k)", 4, "k", 11),
        ("img -> resize", 1, "img", 14),
        ("{ img,", 3, "img", 14),
        ("first: first", 8, "first", 15),
        ("net(batch", 1, "net", 9),
        ("z(side: int", 1, "z", 19),
        ("pair -> image", 1, "pair", 7),
        ("resize(side)", 8, "side", 19),
        ("{models}", 2, "models", 5),
        ("side=9", 1, "side", 19),
    ],
)
def test_names_lead_to_their_declaration(
    folder: Path, marked: str, inside: int, name: str, line: int
) -> None:
    """Flows, params, types, inputs and lets, from wherever they are named."""
    assert found(folder, marked, inside) == ("app.flow", name, line)


@pytest.mark.parametrize(
    ("marked", "inside", "file", "name", "line"),
    [
        ('"post.py"', 3, "post.py", "", 1),
        ("post.shout", 1, "post.py", "", 1),
        ("post.shout", 7, "post.py", "shout", 12),
        ("post.Face", 7, "post.py", "Face", 7),
        ("common.prepared", 9, "common.flow", "prepared", 2),
        ("common.prepared", 2, "common.flow", "", 1),
        ('"resnet50.onnx"', 3, "resnet50.onnx", "", 1),
        ('{models}/resnet50.onnx"', 12, "resnet50.onnx", "", 1),
        ('"imagenet.txt"', 3, "imagenet.txt", "", 1),
    ],
)
def test_other_files_are_opened(
    folder: Path, marked: str, inside: int, file: str, name: str, line: int
) -> None:
    """What is used, what is in it, and every file that is named."""
    assert found(folder, marked, inside) == (file, name, line)


@pytest.mark.parametrize(
    ("marked", "inside", "file", "name", "line"),
    [
        ("three.two", 2, "three.flow", "", 1),
        (".two.inner", 2, "two.flow", "", 1),
        (".inner.prep", 3, "inner.flow", "", 1),
        (".prep ->", 2, "inner.flow", "prep", 2),
        (".word", 2, "post.py", "word", 3),
    ],
)
def test_names_of_used_files_lead_through_all_of_them(
    tmp_path: Path, marked: str, inside: int, file: str, name: str, line: int
) -> None:
    """Each name of a path is the file or the flow it stands for, also where lines end otherwise."""
    (tmp_path / "inner.flow").write_bytes(b"# first\r\nflow prep = rgb\r\n")
    (tmp_path / "post.py").write_bytes(b"# a\r\n\r\ndef word(item: str) -> str: ...\r\n")
    (tmp_path / "two.flow").write_text('use "inner.flow" as inner\nuse "post.py" as post\n')
    (tmp_path / "three.flow").write_text('use "two.flow" as two\n')
    text = (
        'use "three.flow" as three\n'
        "flow a = decode -> three.two.inner.prep -> size\n"
        "flow b: str -> str = three.two.post.word\n"
    )
    document = opened(tmp_path, text)
    place = definition(document, at(document, marked, inside))
    assert place is not None
    assert place.path is not None
    lead = place.path.read_bytes().decode()
    told = (place.path.name, lead[place.start : place.end], lead[: place.start].count("\n") + 1)
    assert told == (file, name, line)


@pytest.mark.parametrize("marked", ["decode", "224", "bytes ->", "flowlang", "batch=1..4"])
def test_what_is_declared_nowhere_leads_nowhere(folder: Path, marked: str) -> None:
    """Operators, types and settings of the language have no place in a file."""
    assert found(folder, marked) is None


def test_the_symbols_of_a_file(folder: Path) -> None:
    """All declarations in order, those of a flow inside it, each within its own extent."""
    document = opened(folder)
    listed = symbols(document)
    assert [(s.kind, s.name) for s in listed] == [
        ("module", "post"), ("module", "common"), ("param", "size"), ("param", "models"),
        ("type", "pair"), ("flow", "net"), ("flow", "classify"), ("flow", "views"),
        ("schedule", "schedule"),
    ]  # fmt: skip
    by_name = {s.name: s for s in listed}
    assert [c.name for c in by_name["views"].children] == ["img", "first"]
    assert [c.name for c in by_name["classify"].children] == ["k"]
    for symbol in [*listed, *by_name["views"].children]:
        assert symbol.start <= symbol.name_start <= symbol.name_end <= symbol.end
        if symbol.kind != "schedule":
            assert document.text[symbol.name_start : symbol.name_end] == symbol.name


def test_a_broken_declaration_keeps_its_symbol(folder: Path) -> None:
    """What cannot be read is still listed where it stands."""
    document = opened(folder, "flow a = rgb\nexport flow b = (\nparam c = = 3\nflow d = bgr\n")
    assert [(s.kind, s.name) for s in symbols(document)] == [
        ("flow", "a"), ("flow", "b"), ("param", "c"), ("flow", "d"),
    ]  # fmt: skip


def test_a_bare_pipeline_is_the_flow_main(folder: Path) -> None:
    """A file without declarations has the one flow that it is."""
    (symbol,) = symbols(opened(folder, "# what it does\ndecode -> rgb\n"))
    assert (symbol.name, symbol.start, symbol.end) == ("main", 15, 28)
