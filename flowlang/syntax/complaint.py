"""What lark says of a text it cannot read, said so that the author can mend it.

Layer 1. lark gives the token, what it would have accepted, and where; from these three and a look
at the neighbouring text comes one Diagnostic.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Source, Span
from flowlang.syntax.scan import (
    CLOSER,
    DECLARATIONS,
    Outline,
    Piece,
    pieces,
    stage_after,
    stage_before,
)

STARTS_STAGE = frozenset({"NAME", "LBRACE", "STRING", "IF", "MATCH", "FIELD", "LSQB"})

_WORDS = {
    "ARROW": "`->`",
    "GIVES": "`=>`",
    "EQUAL": "`=`",
    "COMMA": "`,`",
    "COLON": "`:`",
    "RPAR": "`)`",
    "RBRACE": "`}`",
    "RSQB": "`]`",
    "LPAR": "`(`",
    "LBRACE": "`{`",
    "NAME": "a name",
    "STRING": "a string",
    "INT": "a number",
    "THEN": "`then`",
    "ELSE": "`else`",
    "AS": "`as`",
    "RETURN": "`return`",
    "FLOW": "`flow`",
    "$END": "the end of the file",
}


def lark_errors() -> Any:
    """The class of errors lark raises for a text it cannot read."""
    from lark.exceptions import UnexpectedInput

    return UnexpectedInput


def explain(source: Source, error: Any, found: Outline, end: int | None = None) -> Diagnostic:
    """lark's error as a Diagnostic; `end` is where the declaration in hand stops."""
    from lark.exceptions import UnexpectedCharacters

    if isinstance(error, UnexpectedCharacters):
        return _character(source, error.pos_in_stream or 0)
    token, accepts = error.token, set(error.accepts or error.expected)
    if token.type == "$END":
        return _ends_early(source, accepts, found, len(source.text) if end is None else end)
    start, stop = token.start_pos, token.start_pos + len(token)
    if token == ">" and source.text[start - 1 : start] == "-":
        start -= 1
    return _token(source, str(token.type), Span(source, start, stop), accepts)


def _character(source: Source, at: int) -> Diagnostic:
    char = source.text[at]
    span = Span(source, at, at + 1)
    if char == '"':
        line = source.line(span.line)
        rest = line[span.column - 1 :].rstrip()
        return Diagnostic(
            "unclosed-string",
            "this string is not closed on its line",
            Label(Span(source, at, at + max(1, len(rest)))),
            help=rest.rstrip(",)") + '"',
        )
    plain = unicodedata.normalize("NFKC", char)
    if not char.isascii() and plain.isascii() and plain.strip():
        return Diagnostic(
            "unexpected-character",
            f"`{char}` is a full-width character",
            Label(span),
            help=plain,
            fix=span,
        )
    named = unicodedata.name(char, f"U+{ord(char):04X}").lower()
    shown = f"`{char}`" if char.isprintable() else named
    help_text = '"' if char in "'\u2018\u2019\u201c\u201d`" else None
    return Diagnostic(
        "unexpected-character",
        f"{shown} means nothing here",
        Label(span),
        help=help_text,
        note="strings are written in double quotes" if help_text else None,
        fix=span if help_text else None,
    )


def _ends_early(source: Source, accepts: set[str], found: Outline, end: int) -> Diagnostic:
    code = _code_end(source.text, end)
    if code == 0:
        return Diagnostic(
            "empty-program",
            "there is no flow in this file",
            Label(Span(source, 0, 0)),
            help='decode -> resize(224) -> rgb -> trt("model.onnx")',
        )
    here = Span(source, code, code)
    bracket = _open_bracket(found, code)
    if bracket and {"RPAR", "RBRACE", "RSQB"} & accepts:
        return Diagnostic(
            "unclosed-bracket",
            f"`{bracket.text}` is not closed",
            Label(here, f"expected `{CLOSER[bracket.text]}`"),
            (Label(Span(source, bracket.start, bracket.start + 1), "opened here"),),
            help=stage_before(source.text, code) + CLOSER[bracket.text],
        )
    if source.text[:code].endswith("->"):
        return Diagnostic(
            "missing-stage",
            "there is no stage after this `->`",
            Label(Span(source, code - 2, code)),
        )
    return Diagnostic(
        "unexpected-end", "this ends too early", Label(here, f"expected {_listed(accepts)}")
    )


def _code_end(text: str, end: int) -> int:
    """Offset after the last code before `end`: blanks and comments left out."""
    last = 0
    for found in re.finditer(r'#[^\n]*|"(?:\\.|[^"\\\n])*"|\S', text[:end]):
        if not found.group().startswith("#"):
            last = found.end()
    return last


def _open_bracket(found: Outline, before: int) -> Piece | None:
    return next((b for b in reversed(found.unclosed) if b.start < before), None)


def _token(source: Source, kind: str, span: Span, accepts: set[str]) -> Diagnostic:
    text, found = source.text, span.text
    if kind == "$END" or found in DECLARATIONS:
        return Diagnostic(
            "unexpected-token",
            f"a new declaration starts before the last one is complete: `{found}`",
            Label(span, f"expected {_listed(accepts)}"),
        )
    starts = kind in STARTS_STAGE or found in ("if", "match")
    if starts and _wants_comma(text, span, accepts):
        return Diagnostic(
            "missing-comma",
            f"expected `,` before `{found}`",
            Label(span),
            help=f"{_before(text, span)}, {_argument(text, span)}",
        )
    if starts and "ARROW" in accepts:
        return Diagnostic(
            "missing-arrow",
            f"expected `->` before `{found}`",
            Label(span, "nothing flows into this stage"),
            help=f"{_before(text, span)} -> {stage_after(text, span.start)}",
        )
    if found in ("=>", "|", ">", "|>", "~") and "ARROW" in accepts:
        return Diagnostic(
            "wrong-arrow",
            f"stages are joined with `->`, not `{found}`",
            Label(span),
            help="->",
            fix=span,
        )
    if found == "->" and "NAME" in accepts:
        return Diagnostic("missing-stage", "there is no stage before this `->`", Label(span))
    if found in (")", "]", "}"):
        return Diagnostic(
            "unexpected-token",
            f"`{found}` closes nothing that is open here",
            Label(span),
            note=f"expected {_listed(accepts)}",
        )
    if found == "=" and "COLON" in accepts:
        return Diagnostic(
            "unexpected-token",
            "a record's field is given with `:`",
            Label(span),
            help=":",
            fix=span,
        )
    return Diagnostic(
        "unexpected-token",
        f"`{found}` cannot stand here",
        Label(span, f"expected {_listed(accepts)}"),
    )


def _wants_comma(text: str, span: Span, accepts: set[str]) -> bool:
    if "COMMA" not in accepts:
        return False
    named = re.compile(r"\s*[=:](?!=)").match(text, span.end) is not None
    return named or "ARROW" not in accepts or text[: span.start].rstrip()[-1:] in '}"0123456789'


def _before(text: str, span: Span) -> str:
    before = stage_before(text, span.start)
    if not before:
        found = [p for p in pieces(text) if p.kind == "string" and p.start < span.start]
        before = found[-1].text if found else ""
    return before


def _argument(text: str, span: Span) -> str:
    found = re.compile(r"[\w.]+\s*[=:]?\s*[^,)}\]\n]*").match(text, span.start)
    return found.group().strip() if found else span.text


def _listed(accepts: set[str]) -> str:
    words = [_WORDS[a] for a in _WORDS if a in accepts]
    if "NAME" in accepts and len(accepts) > 10:
        words = [
            "a stage",
            *[
                w
                for w in words
                if w not in ("a name", "a string", "a number", "`{`", "`(`", "`as`")
            ],
        ]
    if not words:
        return "something else"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"
