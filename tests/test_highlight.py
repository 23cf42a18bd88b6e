"""Colours: no text is lost or left without one, and every word of the language has its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.token import Comment, Error, Keyword, Name, Number, Operator, String, Token

from flowlang.highlight import FlowlangLexer
from flowlang.plan.ops import OPS
from flowlang.plan.types import COLOURS, DTYPES, NAMED
from flowlang.syntax.scan import RESERVED
from tests.cases import Case, all_cases

ROOT = Path(__file__).parents[1]
GRAMMAR = ROOT / "grammar" / "flow.tmLanguage.json"
REGENERATE = bool(os.environ.get("FLOWLANG_REGENERATE"))
VALID = [
    *sorted((ROOT / "tests" / "programs").glob("*.flow")),
    *sorted((ROOT / "tests" / "golden").glob("*.flow")),
    *sorted((ROOT / "examples").glob("*.flow")),
]
LEXER = FlowlangLexer()


def tokens(text: str) -> list[tuple[Any, str]]:
    return [(kind, piece) for _, kind, piece in LEXER.get_tokens_unprocessed(text)]


def kinds(text: str) -> dict[str, Any]:
    """By piece of a text, its kind of token; the last one where it comes again."""
    return {piece: kind for kind, piece in tokens(text)}


# Pygments


@pytest.mark.parametrize("file", VALID, ids=lambda file: file.name)
def test_programs_have_no_unknown_tokens(file: Path) -> None:
    """A valid program is covered by tokens, none of them an error and none of them empty."""
    text = file.read_text("utf-8")
    found = tokens(text)
    assert "".join(piece for _, piece in found) == text
    assert not [piece for kind, piece in found if kind is Error or not piece]


@pytest.mark.parametrize("case", list(all_cases()), ids=str)
def test_wrong_programs_lose_no_text(case: Case) -> None:
    """A program with errors is covered by tokens too."""
    assert "".join(piece for _, piece in tokens(case.text)) == case.text


PIECES = st.sampled_from(
    ["flow f", "(", ")", "{", "}", "[", "]", ":", "->", "=", "<", ">", "?", '"', "\\", "{a}", "x4",
     "as ", "type t", "use ", "schedule p {", "\n", "# c", "1..4", "5ms", ".a", ",", "??", "\u4e16"]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_any_text_is_kept(text: str) -> None:
    """Whatever is typed, the lexer comes to its end and keeps every character."""
    assert "".join(piece for _, piece in tokens(text)) == text


def test_the_tokens_say_what_a_thing_is() -> None:
    """Operators, flows, types, parameters, fields, quantities and copies are told apart."""
    found = kinds(
        "## Doc.\nexport flow net(k: int): bytes -> list<label> = decode(libjpeg) "
        '-> crop(img) -> .box -> trt("{models}/a\\n.onnx", wait=5ms) x4 -> mine -> own(1.5) # end'
    )
    assert {n: found[n] for n in ("## Doc.", "# end")} == {
        "## Doc.": String.Doc,
        "# end": Comment.Single,
    }
    assert found["net"] is Name.Function
    assert found["int"] is found["bytes"] is found["label"] is Keyword.Type
    assert found["decode"] is found["trt"] is Name.Builtin
    assert (found["mine"], found["own"]) == (Name, Name.Function)
    assert (found[".box"], found["wait"], found["k"]) == (
        Name.Property,
        Name.Attribute,
        Name.Variable,
    )
    assert (found["{models}"], found["\\n"]) == (String.Interpol, String.Escape)
    assert (found["5ms"], found["x4"], found["1.5"]) == (Number.Other, Number.Other, Number.Float)


def test_a_name_like_a_count_of_copies_is_a_name() -> None:
    """`x1` is a count only behind what can be copied."""
    found = tokens("flow f { let x1 = in -> decode return { x2: x1, a: net x3 } }")
    numbers = [piece for kind, piece in found if kind in Number]
    assert numbers == ["x3"]


def test_a_body_is_told_from_a_record_type() -> None:
    """Braces in a signature hold types, and those behind it statements."""
    found = tokens("flow f: { box: bytes } -> { box: str } { let box = in -> .box return box }")
    assert [kind for kind, piece in found if piece == "box"] == [
        Name.Attribute,
        Name.Attribute,
        Name.Variable,
        Name,
    ]


def test_every_word_of_the_language_has_a_colour() -> None:
    """No reserved word, operator or type is lexed as a plain name where it has its meaning."""
    for word in RESERVED - {"flowlang"}:
        assert kinds(f"{word} ")[word] not in (Name, Error, Token.Text), word
    assert kinds("flowlang 1")["flowlang"] in Keyword
    assert all(kinds(f"-> {op}")[op] is Name.Builtin for op in OPS)
    assert all(kinds(f"as {name}")[name] is Keyword.Type for name in NAMED)
    assert kinds("a ?? b")["??"] is Operator


def test_pygments_finds_the_lexer_and_writes_with_it() -> None:
    """The lexer works with Pygments' own formatters and knows its file names."""
    html = highlight('decode -> trt("a.onnx")', LEXER, HtmlFormatter())
    assert '<span class="nb">decode</span>' in html
    assert (LEXER.filenames, LEXER.aliases) == (["*.flow"], ["flowlang", "flow"])


# TextMate


def grammar() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(GRAMMAR.read_text("utf-8"))
    return loaded


def rules(node: Any) -> Iterator[dict[str, Any]]:
    """Every rule of a TextMate grammar, however deep."""
    if isinstance(node, dict):
        if {"match", "begin", "include", "patterns"} & node.keys():
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from rules(child)


def words_of(scope: str) -> set[str]:
    """The words that rules list by name under a scope, in a group or all together."""
    found: set[str] = set()
    for rule in rules(grammar()):
        for pattern, captures in (
            (rule.get("match", ""), rule.get("captures", {})),
            (rule.get("begin", ""), rule.get("beginCaptures", {})),
            (rule.get("end", ""), rule.get("endCaptures", {})),
        ):
            names = [rule.get("name", ""), *(c["name"] for c in captures.values())]
            if any(name.startswith(scope) for name in names):
                lists = re.findall(r"\((?:\?:)?([a-z0-9_|]+)\)", pattern)
                found |= {word for group in lists for word in group.split("|")}
    return found


LISTS = {
    "stage": (sorted(OPS), r"\b(?:{})\b(?!\s*\.\w)"),
    "type": (sorted({*NAMED, "image", "tensor", "list"}), r"\b(?:{})\b(?!\.)"),
    "type-arguments": (
        [d for d in (*DTYPES, *COLOURS, "hwc", "undecided") if d not in NAMED],
        r"\b(?:{})\b",
    ),
}
LISTED = {
    "stage": "support.function.operator.flowlang",
    "type": "support.type.flowlang",
    "type-arguments": "constant.language.type.flowlang",
}


@pytest.mark.parametrize("name", LISTS)
def test_the_grammar_lists_what_the_tables_hold(name: str) -> None:
    """Operators, types and dtypes are those of the code; FLOWLANG_REGENERATE=1 writes them."""
    listed, form = LISTS[name]
    wanted = form.replace("{}", "|".join(listed))
    loaded = grammar()
    rule = next(r for r in loaded["repository"][name]["patterns"] if r.get("name") == LISTED[name])
    if REGENERATE and rule["match"] != wanted:
        rule["match"] = wanted
        GRAMMAR.write_text(json.dumps(loaded, indent=2, ensure_ascii=False) + "\n", "utf-8")
    assert rule["match"] == wanted


def test_the_grammar_colours_every_reserved_word() -> None:
    """Each reserved word is listed under a scope that themes colour."""
    scopes = ("keyword", "storage", "constant.language", "variable.language")
    assert set().union(*map(words_of, scopes)) >= RESERVED


@pytest.mark.parametrize("word", ["type", "schedule", "param", "flow", "use", "export"])
def test_a_field_may_be_named_like_a_declaration(word: str) -> None:
    """In the grammar a type that is not closed ends at a declaration, and not at a field."""
    for name in ("type-record", "type-arguments"):
        end = re.compile(grammar()["repository"][name]["end"])
        assert end.search(f"a: int\n{word} b")
        assert not end.search(f"{word}: int, .{word}")


def test_the_grammar_is_whole() -> None:
    """Every rule that is included exists and is used, and every pattern is one Python can read."""
    loaded = grammar()
    assert (loaded["scopeName"], loaded["fileTypes"]) == ("source.flowlang", ["flow"])
    included = {r["include"].removeprefix("#") for r in rules(loaded) if "include" in r}
    assert included == set(loaded["repository"])
    for rule in rules([loaded["patterns"], loaded["repository"]]):
        assert ("begin" in rule) == ("end" in rule)
        for key in ("match", "begin", "end"):
            re.compile(rule.get(key, ""))
        named = [rule, *rule.get("captures", {}).values(), *rule.get("beginCaptures", {}).values()]
        assert all(n["name"].endswith(".flowlang") for n in named if "name" in n)
