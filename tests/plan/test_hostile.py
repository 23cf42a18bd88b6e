"""Hostile files: each is answered at its place or accepted, and none brings the checker down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import CompileError, Diagnostic, Source, render
from flowlang.plan.check import check_source
from flowlang.plan.explain import explain_physical, explain_plan
from flowlang.plan.physical import Machine, lower
from flowlang.syntax.format import format_program
from flowlang.syntax.parse import MAX_SOURCE_BYTES, decode_source, parse
from tests.cases import all_cases
from tests.standins import furnish

LONG = 30_000  # characters of most files


def fill(piece: str, end: str = "") -> str:
    return piece * (LONG // len(piece)) + end


def lines(pattern: str, count: int) -> str:
    """Lines made from their number and the number before."""
    return "".join(pattern.format(i=i, j=i - 1) for i in range(1, count))


NESTED: dict[str, str] = {
    "parentheses": fill("(") + "rgb" + fill(")"),
    "braces": fill("{a: ") + "rgb" + fill("}"),
    "squares": fill("[") + fill("]"),
    "calls": fill("f(") + fill(")"),
    "arrows": fill("a -> (b -> ") + "c" + fill(")"),
    "open parentheses": "(" * 250_000,
    "open braces": "{" * 250_000,
    "open squares": "[" * 250_000,
    "if in else": fill("if a then b else ", "c"),
    "if in if": fill("if ", "a"),
    "not": fill("not ", "a"),
    "minus": fill("-", "a"),
    "spaced minus": fill("- ", "a"),
    "plus": fill("1 + ", "1"),
    "groups of or": "(" * 60 + "a" + " or a)" * 60,
    "arms": "decode -> match { " + fill(".width > 3 => rgb, ") + "else => rgb }",
    "ors in ifs": fill("if a or b then c else ", "d"),
    "match": fill("match .a { else => ") + "b" + fill("}"),
    "lists of types": "type t = " + fill("list<") + "int" + fill(">"),
    "records of types": "type t = " + fill("{a: list<"),
    "comparisons": fill("a < "),
    "flows of flows": "flow a0 = rgb\n" + lines("flow a{i} = a{j}\n", 900),
    "lets of lets": "flow f {\n  let a0 = in -> decode\n"
    + lines("  let a{i} = {{ x: a{j} }}\n", 300)
    + "  return a0\n}",
    "types of types": "type a0 = int\n" + lines("type a{i} = list<a{j}>\n", 900),
}
TOO_LARGE: dict[str, str] = {
    "1 MiB of declarations": lines("flow a{i} = rgb\n", 60_000)[: 1 << 20],
    "300k parentheses": "(" * 300_000,
    "doubling flows": "flow a0 = decode\n"
    + lines("flow a{i} = {{ x: a{j}, y: a{j} }}\n", 60)
    + "export flow main = a59",
    "doubling types": "type a0 = int\n"
    + lines("type a{i} = {{ x: a{j}, y: a{j} }}\n", 60)
    + "export flow main = decode",
    "doubling lets": "export flow main {\n  let a0 = in -> decode\n"
    + lines("  let a{i} = {{ x: a{j}, y: a{j} }}\n", 40)
    + "  return a39\n}",
    "many copies of fields": "type r = { "
    + ", ".join(f"a{i}: int" for i in range(900))
    + " }\nexport flow f: r -> r = "
    + " -> ".join(["{ ... }"] * 300),
    "many fields": "decode -> {" + ", ".join(f"a{i}: rgb" for i in range(1500)) + "}",
}
OTHER: dict[str, tuple[str, str]] = {
    "nothing": ("", "empty-program"),
    "blanks": (fill(" \n"), "empty-program"),
    "comments": (fill("# (\n"), "empty-program"),
    "unclosed string": ('decode -> trt("a', "unclosed-string"),
    "long unclosed string": ('"' + fill("a"), "unclosed-string"),
    "or": (fill("a or ", "a"), "unknown-operator"),
    "quotes": ('"' * 10_001, "missing-arrow"),
    "commas": (fill(","), "unexpected-token"),
    "dots": (fill("."), "unexpected-token"),
    "copies": (fill("x4 "), "unexpected-token"),
    "keywords": (fill("flow "), "unexpected-token"),
    "schedules": (fill("schedule { "), "too-deep"),
    "thousands of syntax errors": (fill("flow a = \n"), "unexpected-end"),
    "thousands of unknown names": (lines("flow a{i} = nope{i}\n", 1400), "unknown-operator"),
    "thousands of repeats": (fill("flow a = rgb\n"), "duplicate-name"),
    "flows in circles": (
        "".join(
            f"flow a{i} = {{ {', '.join(f'x{j}: a{j}' for j in range(40))} }}\n" for i in range(40)
        ),
        "recursive-flow",
    ),
    "long name": (fill("a"), "unknown-operator"),
    "long path": (f'decode -> trt("{fill("a")}")', "missing-file"),
    "long number": (f"decode -> resize({fill('9')})", "out-of-range"),
    "long fraction": (f"decode -> resize(0.{fill('9')}e999)", "out-of-range"),
    "long product": (
        f"param a = {'999999999999999 * ' * 50}9\nexport flow f = decode",
        "out-of-range",
    ),
    "many copies": (f"decode x{fill('9')}", "out-of-range"),
    "long shape": (f"decode -> as tensor<f32, {'9' * 5000}x1>", "out-of-range"),
    "long edition": (f"flowlang {fill('1')}\ndecode", "unknown-edition"),
    "long line": (fill("rgb -> ") + "rgb rgb", "missing-arrow"),
    "many arguments": ("f(" + fill("a, ") + ")", "unknown-operator"),
    "many braces in a string": ('decode -> trt("' + fill("{a}") + '")', "unknown-name"),
    "NUL in a path": ('decode -> trt("a\\u0000b")', "missing-file"),
    "surrogate in a path": ('decode -> trt("\\ud800")', "missing-file"),
    "NUL in a used path": ('use "a\\u0000.flow" as a\nflow f = decode', "missing-file"),
    "surrogate in a used path": ('use "\\ud800.flow" as a\nflow f = decode', "missing-file"),
    "escapes in a path": ('decode -> trt("\\u001b[31m\\n\\r")', "missing-file"),
    "folder as a path": ('decode -> trt("")', "missing-file"),
    "tabs": ("\tdecode\t->\trgb\trgb", "missing-arrow"),
    "carriage returns": ("decode\r-> rgb rgb", "missing-arrow"),
    "line ends of Windows": ("decode\r\n-> rgb rgb\r\n", "missing-arrow"),
    "full-width characters": ("decode -> resize\uff08224\uff09", "unexpected-character"),
    "emoji": ("decode -> \U0001f642", "unexpected-character"),
    "joiners and overrides": ("decode -> \u200d\u202ergb", "unexpected-character"),
    "combining accent": ("de\u0301code -> rgb", "unexpected-character"),
    "mark in the middle": ("decode -> \ufeffrgb", "unexpected-character"),
}
NO_TEXT: dict[str, bytes] = {
    "every byte": bytes(range(256)) * 100,
    "NUL": b"decode\0",
    "UTF-16": "decode -> rgb".encode("utf-16"),
    "Latin-1": "flow d\xe9code = rgb".encode("latin-1"),
    "mark and rubbish": b"\xef\xbb\xbfdecode \xc3\xa9 \xff",
    "surrogate": b"decode -> \xed\xa0\x80",
}
FINE: dict[str, bytes] = {
    "byte-order mark": b"\xef\xbb\xbfdecode -> rgb",
    "Windows": b"decode\r\n  -> rgb\r\n",
    "long pipeline": fill("rgb -> ", "rgb")[: LONG // 3].rpartition(" ->")[0].encode(),
    "many flows": lines("flow a{i} = rgb\n", 500).encode() + b"export flow main = decode -> rgb",
    "many zeros": b"decode -> rgb -> resize(" + b"0" * 4400 + b"7)",
    "many patterns": b"decode -> match { "
    + b" | ".join(b".width == %d" % i for i in range(200))
    + b" => 1, else => 0 }",
    "many operands": b"decode -> " + b" or ".join(b".width == %d" % i for i in range(200)),
    "many arms": b"decode -> match { "
    + b"".join(b".width == %d => %d, " % (i, i) for i in range(120))
    + b"else => 0 }",
    "long documentation": fill("## more\n").encode() + b"decode -> rgb",
}
FILES: dict[str, tuple[bytes, str | None]] = {
    **{name: (text.encode()[:125_000], "too-deep") for name, text in NESTED.items()},
    **{name: (text.encode(), "too-large") for name, text in TOO_LARGE.items()},
    **{name: (text.encode(), slug) for name, (text, slug) in OTHER.items()},
    **{name: (data, "not-text") for name, data in NO_TEXT.items()},
    **{name: (data, None) for name, data in FINE.items()},
    "10 MB of parentheses": (b"(" * 10_000_000, "too-large"),
}
EACH_FILE = pytest.mark.parametrize("name", FILES)

PROGRAM = """
import json, sys
from pathlib import Path
from tests.plan.test_hostile import work
for path in sorted(Path(sys.argv[1]).iterdir(), key=lambda p: int(p.name)):
    print(json.dumps([path.name, work(path.read_bytes())]), flush=True)
"""


def work(data: bytes) -> list[dict[str, Any]]:
    """Everything that is said of a file, after checking, showing, explaining and formatting it."""
    try:
        source = decode_source(data, "app.flow")
        plan, found = check_source(source)
        if plan is not None:
            physical = lower([plan], Machine(2))
            assert explain_plan(plan)
            assert explain_physical(physical)
            again = parse(Source("app.flow", format_program(parse(source))))
            assert again == parse(source)
    except CompileError as error:
        found = error.diagnostics
    return [told(diagnostic) for diagnostic in found]


def told(diagnostic: Diagnostic) -> dict[str, Any]:
    """A diagnostic's slug, place and width, its spans and text found sound."""
    for label in (diagnostic.primary, *diagnostic.secondary):
        assert 0 <= label.span.start <= label.span.end <= len(label.span.source.text)
    text = render(diagnostic)
    assert text.encode()
    assert all(line.isprintable() for line in text.split("\n"))
    widest = max(len(line) for line in text.split("\n"))
    line, column = diagnostic.span.source.position(diagnostic.span.start)
    return {"slug": diagnostic.slug, "line": line, "column": column, "widest": widest}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By name of a file, what is said of it; all of them within one generous limit of time."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, (data, _) in enumerate(FILES.values()):
        (folder / str(number)).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=len(FILES),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    return {name: said[str(number)] for number, name in enumerate(FILES)}


@EACH_FILE
def test_a_hostile_file_is_answered_at_its_place(
    name: str, outcomes: dict[str, list[dict[str, Any]]]
) -> None:
    """A file that is wrong is told so with lines and columns, and one that is not is taken."""
    slug = FILES[name][1]
    found = outcomes[name]
    if slug is None:
        assert not found
    else:
        assert slug in {d["slug"] for d in found}
        assert all(d["line"] >= 1 and d["column"] >= 1 for d in found)
    assert len(found) <= 1100
    assert all(d["widest"] < 2000 for d in found)


def test_a_file_of_the_greatest_size_is_taken() -> None:
    """The limit of size is of bytes, and a file of exactly that size is read."""
    data = b"decode -> rgb #".ljust(MAX_SOURCE_BYTES, b"x")
    assert check_source(decode_source(data, "app.flow"))[1] == []
    with pytest.raises(CompileError, match="too-large"):
        decode_source(data + b"x", "app.flow")


def test_a_text_with_lone_surrogates_is_answered() -> None:
    """Text that came from elsewhere than a file can hold what no encoding holds."""
    plan, found = check_source(Source("app.flow", 'decode -> trt("\udfff") -> \ud800'))
    assert plan is None
    assert [told(d)["slug"] for d in found] == ["unexpected-character"]


PROGRAMS = [
    *(case.text for case in all_cases()),
    *(p.read_text("utf-8") for p in (Path(__file__).parents[1] / "programs").glob("*.flow")),
]
PIECES = [
    "decode", "resize", "trt", "rgb", "top", "pass", "softmax", "net", "main", "in", "x4", "x1",
    "->", "=>", "??", "...", "..", "=", ":", ",", "|", "?", "<", ">", "<=", "==", "!=", "+", "-",
    "*", "/", "(", ")", "[", "]", "{", "}", ".a", ".label", "1", "224", "0.5", "5ms", "2GiB", "50%",
    "3x224x224", '"a.onnx"', '"{a}"', '"', "#", "##", "\n", "\t", "flowlang", "use", "as", "param",
    "type", "export", "flow", "let", "return", "schedule", "match", "if", "then", "else", "not",
    "and", "or", "true", "false", "bytes", "int", "image", "tensor", "f32", "list", "fp16", "batch",
    "wait", "fit", "imagenet", "\u2192", "\uff08", "'", ";", "\\", "env",
]  # fmt: skip


@settings(max_examples=1500)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_soups_of_tokens_are_answered(soup: list[str]) -> None:
    """No sequence of tokens raises anything but CompileError, and all that is said is sound."""
    for joint in (" ", ""):
        work(joint.join(soup).encode())


@settings(max_examples=600)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "ignore")))
def test_any_bytes_are_answered(data: bytes) -> None:
    """No bytes raise anything but CompileError, and all that is said is sound."""
    work(data)


DECLARATIONS = st.sampled_from(
    [
        "param a = 224", "param b: int = a", 'param c = env("C", "x")', "type t = { a: int }",
        "type u = list<t?>", "flow f = decode -> rgb", "export flow g = f -> resize(a)",
        "flow h { let i = in -> decode return { i, j: i -> gray } }", "export flow k = h -> .j",
        "schedule { f(device=cpu) }", "schedule prod { g(slo=5ms, queue=3) }", "flow f = f",
        "export flow m: bytes -> t = g", "flow n = { a: m, b: n }", 'use "x.flow" as y',
    ]
)  # fmt: skip


@settings(max_examples=600)
@given(st.lists(DECLARATIONS, max_size=12), st.integers(0, 300), st.integers(0, 12))
def test_damaged_declarations_are_answered(parts: list[str], at: int, length: int) -> None:
    """Declarations in any order, with a hole torn into them, are checked without harm."""
    text = "\n".join(parts)
    work((text[:at] + text[at + length :]).encode())


@pytest.fixture
def furnished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(furnish(tmp_path))
    return tmp_path


@settings(
    max_examples=600,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(PROGRAMS),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), st.sampled_from(["", *PIECES]))),
)
def test_damaged_programs_are_answered(
    furnished: Path, text: str, blows: list[tuple[int, int, str]]
) -> None:
    """Programs with tokens taken out and others put in are checked without harm."""
    tokens = re.split(r"(\s+|\b)", text)
    for at, count, piece in blows:
        tokens[at * 3 : at * 3 + count] = [piece]
    work("".join(tokens).encode())
