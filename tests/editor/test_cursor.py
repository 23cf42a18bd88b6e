"""Where a cursor stands: told from half a program, however broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import Source
from flowlang.editor.cursor import LONG, locate
from flowlang.syntax.parse import parse_leniently
from tests.editor.programs import CURSOR

ROOT = Path(__file__).parents[2]
PROGRAMS = [p.read_text("utf-8") for p in sorted((ROOT / "tests" / "programs").glob("*.flow"))]
BODY = "flow f {\n  let a = in -> decode\n"

PLACES = [
    ("", "declaration"),
    ("fl█", "declaration"),
    ("flowlang 1\n█", "declaration"),
    ("decode -> █", "stage"),
    ("decode -> re█", "stage"),
    ("decode ?? █", "operand"),
    ("decode █", "after"),
    ("decode x█", "after"),
    ("flow a = rgb\nex█", "after"),
    ("export █", "flow"),
    ("flow f: █", "type"),
    ("flow f: bytes -> { a: list<█", "type-argument"),
    ("flow f: post.█", "type-field"),
    ("flow f: bytes -> { a: int } = █", "stage"),
    ("flow f(k: int, j█", "input"),
    ("flow f(k: █", "type"),
    ("flow f(k: int = █", "constant"),
    ("param a: █", "type"),
    ("param a = █", "constant"),
    ("type t = { a: █", "type"),
    ("type t = █", "type"),
    ("type t = {\n  type: █", "type"),
    ("flow a = decode -> resize(\nflow b = █", "stage"),
    ("flow a = decode -> resize(\nexport █", "flow"),
    ('use "█', "string"),
    ('use "a.py" as █', "name"),
    ("flow f = decode -> as tensor<█", "type-argument"),
    ("flow f = decode -> as im█", "type"),
    ("flow f = as tensor<f32, ?> -> █", "stage"),
    ("flow f = decode -> as image -> █", "stage"),
    ("schedule { █", "entry"),
    ("schedule prod { net(█", "setting"),
    ("schedule { net(batch=█", "setting-value"),
    ("schedule { net(batch=1..4) x2 █", "entry"),
    ("decode -> resize(█", "argument"),
    ("decode -> resize(224, f█", "argument"),
    ("decode -> resize(224, fit=█", "value"),
    ('decode -> trt("mod█', "string"),
    ("decode -> { a: █", "stage"),
    ("decode -> { █", "field-name"),
    ("decode -> { ..., █", "field-name"),
    ("decode -> (rgb -> █", "stage"),
    ("decode -> .█", "field"),
    ("decode -> filter(.label == █", "operand"),
    ("decode -> filter(.label == .█", "field"),
    ("decode -> filter(not █", "stage"),
    ("decode -> if █", "stage"),
    ("decode -> if .a > 3 █", "after"),
    ("decode -> if .a then █", "stage"),
    ("decode -> match █", "subject"),
    ("decode -> match .a { █", "pattern"),
    ('decode -> match .a { "b" | █', "pattern"),
    ('decode -> match .a { "b" => █', "stage"),
    ('decode -> match .a { "b" => rgb, █', "pattern"),
    (f"{BODY}  let b = █", "stage"),
    (f"{BODY}  let b = a.█", "field"),
    (f"{BODY}  █", "after"),
    (f"{BODY}  return {{ a, b: █", "stage"),
    ("flow f { █", "statement"),
    ("flow f { let █", "name"),
    ("decode -> resize(5m█", "nothing"),
    ("decode -> resize(1.█", "nothing"),
    ("decode # a █", "nothing"),
    ("## a █", "nothing"),
    ("decode # a\n-> █", "stage"),
    ("decode -> resize(224)) -> █", "stage"),
    ("decode -> ]]] ?? ( -> █", "stage"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wants"), PLACES)
def test_what_can_stand_at_a_place(text: str, wants: str) -> None:
    """Each place in half a program has its kind of thing."""
    offset = text.index(CURSOR) if CURSOR in text else 0
    assert locate(text.replace(CURSOR, ""), offset).wants == wants


def test_what_the_brackets_belong_to() -> None:
    """Inside a call, its operator, the arguments given so far and the one in hand are known."""
    text = "decode -> resize(h=3, fit=letterbox, fill="
    frame = locate(text, len(text)).frame
    assert (frame.callee, frame.argument, frame.given) == ("resize", "fill", ["h", "fit", "fill"])
    text = "decode -> post.shout("
    assert locate(text, len(text)).frame.callee == "post.shout"
    text = "flow f = decode -> as image<"
    assert locate(text, len(text)).frame.callee == "image"


def test_the_names_that_are_known() -> None:
    """Inputs, and the lets above; a let is not known in its own value, nor behind its flow."""
    text = "flow f(k: int) { let a = in -> decode let b = "
    assert locate(text, len(text)).names == ("k", "a")
    text += "a return "
    assert locate(text, len(text)).names == ("k", "a", "b")
    text += "b }\nflow g = "
    assert locate(text, len(text)).names == ()


def test_a_long_body_is_looked_at_like_a_short_one() -> None:
    """Where lets start their lines, those before the last need not be walked over."""
    lets = "".join(f"  let a{i} = in -> resize(h={i}, w=3) -> {{ x: rgb }}\n" for i in range(400))
    body = f"flow f(k: int): bytes -> image {{\n{lets}  return a7 -> crop(h=3, "
    assert len(body) > LONG
    cursor = locate(body, len(body))
    assert (cursor.wants, cursor.frame.callee, cursor.frame.given) == ("argument", "crop", ["h"])
    assert cursor.names == ("k", *(f"a{i}" for i in range(400)))
    whole, start, end = cursor.probe()
    assert whole[start:end] == "pass"
    assert whole.count("let ") == 1
    assert not parse_leniently(Source("app.flow", whole))[1]


def test_the_word_being_typed() -> None:
    """It starts at its first letter, and a dot before it has an owner."""
    cursor = locate("decode -> resi", 14)
    assert (cursor.start, cursor.offset, cursor.owner) == (10, 14, "")
    cursor = locate("flow f { let a = in return a.b.le", 33)
    assert (cursor.start, cursor.owner) == (31, "a.b")
    assert locate("decode -> .a.", 13).owner == ".a"


@pytest.mark.parametrize("text", PROGRAMS)
def test_half_a_program_can_be_made_whole(text: str) -> None:
    """Cut off where a stage is typed, every program can be completed so that it can be read."""
    probed = 0
    for found in re.finditer(r"(?<=[\s({|.])[a-z]+", text):
        start = max(m.start() for m in re.finditer(r"^(?=\S)", text[: found.end()], re.MULTILINE))
        piece = text[start:]
        cursor = locate(piece, found.end() - start)
        if cursor.wants not in ("stage", "operand", "field", "subject", "pattern"):
            continue
        whole, at, end = cursor.probe()
        if not whole.startswith(("flow ", "export ", "decode", "{")):
            continue  # the middle of a declaration that goes over several lines
        problems = parse_leniently(Source("app.flow", whole))[1]
        assert not problems, (whole, problems)
        assert whole[at:end] in ("pass", cursor.owner)
        probed += 1
    assert probed


PIECES = st.sampled_from(
    ["flow f", "(", ")", "{", "}", "[", "]", "<", ">", ":", "->", "=>", "=", ",", '"', ".", "a",
     "x2", "let ", "return ", "if ", "then ", "else ", "match ", "as ", "use ", "schedule ",
     "param ", "type ", "export ", "\n", "# c", "1", "5ms", "..", "...", "|", "??", "?", "\u4e16"]
)  # fmt: skip


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=30).map("".join), st.integers(0, 120))
def test_any_place_in_any_text_is_somewhere(text: str, offset: int) -> None:
    """Nothing that can be typed makes it fail, and what it makes whole is the text before."""
    offset = min(offset, len(text))
    cursor = locate(text, offset)
    assert 0 <= cursor.start <= cursor.offset == offset
    whole, start, end = cursor.probe()
    assert 0 <= start <= end <= len(whole)
    last = cursor.text[cursor.statements[-1][0] :] if cursor.statements else cursor.text
    assert cursor.wants in ("nothing", "string") or last in whole
