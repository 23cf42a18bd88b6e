"""What lark says of a text it cannot read, said so that the author can mend it.

Layer 1. lark gives the token, what it would have accepted, and where; from these three and a look
at the neighbouring text comes one Diagnostic.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Source, Span
from flowlang.syntax.misplaced import MISTAKES, unquoted
from flowlang.syntax.scan import (
    CLOSER,
    RESERVED,
    Headless,
    Outline,
    Piece,
    pieces,
    stage_before,
)
from flowlang.syntax.wording import STARTS_STAGE, listed, one_line


def lark_errors() -> Any:
    """The class of errors lark raises for a text it cannot read."""
    from lark.exceptions import UnexpectedInput

    return UnexpectedInput


def explain(
    source: Source, error: Any, found: Outline, start: int = 0, end: int | None = None
) -> Diagnostic:
    """lark's error as a Diagnostic; `start` and `end` bound the declaration in hand."""
    from lark.exceptions import UnexpectedCharacters

    if isinstance(error, UnexpectedCharacters):
        return _character(source, error.pos_in_stream or 0)
    token, accepts = error.token, set(error.accepts or error.expected)
    if token.type == "$END":
        unclosed = [b for b in found.unclosed if b.start >= start]
        return _ends_early(source, accepts, unclosed, start, end)
    span = Span(source, token.start_pos, token.start_pos + len(token))
    is_complete = "$END" in accepts and (
        "ARROW" not in accepts or source.text.startswith("param", start)
    )
    if is_complete and token.type in STARTS_STAGE:
        stop = _code_end(source.text, span.start, end or len(source.text), at_comment=True)
        return stray_pipeline(Span(source, span.start, stop))
    for complaint in MISTAKES:
        if diagnostic := complaint(span, str(token.type), accepts):
            return diagnostic
    return Diagnostic(
        "unexpected-token",
        f"`{span.text}` cannot stand here",
        Label(span, f"expected {listed(accepts)}"),
    )


def stray_pipeline(span: Span) -> Diagnostic:
    """A pipeline without a name, beside declarations; `span` is its start or all of it."""
    return Diagnostic(
        "stray-pipeline",
        "a bare pipeline is the whole file; beside declarations it needs a name",
        Label(span),
        help=f"export flow main = {one_line(span)}",
        fix=span,
    )


def headless(source: Source, found: Headless, end: int) -> Diagnostic:
    """A declaration up to `end` whose first word is missing or none of the language."""
    note = "declarations start with use, param, type, flow, export flow or schedule"
    if found.word:
        word = Span(source, found.start, found.start + len(found.word))
        return Diagnostic(
            "unexpected-token",
            f"no declaration starts with `{found.word}`",
            Label(word),
            help=found.meant,
            note=note,
            fix=word if found.meant else None,
        )
    kind = "param" if _is_constant(source.text[found.end - 1 : end]) else "flow"
    head = Span(source, found.start, found.end)
    return Diagnostic(
        "unexpected-token",
        f"expected `{kind}` before `{found.name}`",
        Label(Span(source, found.start, found.start + len(found.name))),
        help=f"{kind} {one_line(head)}",
        note=note,
        fix=head,
    )


def _is_constant(text: str) -> bool:
    """Whether what stands behind a name, from its `=` or `:`, is a param's value."""
    value = r'(-?[0-9]|"|\[|env\b|true\b|false\b)'
    return re.match(rf"(:[^=>]*)?=\s*{value}(?!.*->)", text, re.DOTALL) is not None


# Characters that mean nothing

_LOOKALIKE = {"\u2192": "->", "\u21d2": "=>", "\u2013": "-", "\u2014": "-", "&": "and", "!": "not"}
_QUOTES = "'`\u2018\u2019\u201c\u201d\u00ab\u00bb"
_REMARK = {
    ";": "nothing needs to end a line or a declaration",
    "@": "strings are written in double quotes",
    "\\": "strings are written in double quotes, with `\\\\` for a backslash",
    ".": "a dot touches the name after it, and in a number stands between digits",
}


def _character(source: Source, at: int) -> Diagnostic:
    char = source.text[at]
    span = Span(source, at, at + 1)
    if char == '"':
        return _unclosed_string(span)
    if char in _QUOTES:
        return _wrong_quotes(span)
    if char == "." and (path := re.compile(r"\./[\w./-]*\.\w+").match(source.text, at)):
        return unquoted(Span(source, at, path.end()))
    help_text, note = _LOOKALIKE.get(char), _REMARK.get(char)
    if char == ";" and re.compile(r";\s*[A-Za-z_]\w*\s*:").match(source.text, at):
        help_text, note = ",", None  # between the fields of a record
    if char == "." and re.compile(r"(?<=[\s(])\.(?=[\s)])").match(source.text, at):
        help_text, note = "pass", "the item itself is `pass`"
    if char in "&!" and source.text[at : at + 2] == "&&":
        span = Span(source, at, at + 2)
    plain = unicodedata.normalize("NFKC", char)
    if not char.isascii() and plain.isascii() and plain.strip():
        help_text = plain
    elif char.isalpha():
        note = "names are written with the letters a to z, digits and `_`"
    named = unicodedata.name(char, "").lower() or f"U+{ord(char):04X}"
    shown = f"`{span.text}`" if char.isprintable() else named
    if not char.isascii() and char.isprintable():
        shown = f"{shown} ({named})"
    return Diagnostic(
        "unexpected-character",
        f"{shown} means nothing here",
        Label(span),
        help=help_text,
        note=note,
        fix=span if help_text else None,
    )


def _unclosed_string(opening: Span) -> Diagnostic:
    """The string is shown as far as it can be meant: to a comma, a bracket or the line's end."""
    source = opening.source
    rest = source.line(opening.line)[opening.column - 1 :].rstrip()
    meant = re.match(r'"[^,(){}\[\]]*', rest)
    text = (meant.group() if meant else rest).rstrip().rstrip("\\")
    span = Span(source, opening.start, opening.start + len(text))
    return Diagnostic(
        "unclosed-string",
        "this string is not closed on its line",
        Label(span),
        help=f'{text}"',
        fix=span,
    )


def _wrong_quotes(opening: Span) -> Diagnostic:
    source = opening.source
    rest = source.line(opening.line)[opening.column - 1 :]
    quoted = re.match(f'[{_QUOTES}]([^{_QUOTES}"\\\\]*)[{_QUOTES}]', rest)
    span = Span(source, opening.start, opening.start + (quoted.end() if quoted else 1))
    return Diagnostic(
        "unexpected-character",
        f"`{opening.text}` means nothing here: strings are written in double quotes",
        Label(span),
        help=f'"{quoted.group(1)}"' if quoted else '"',
        fix=span,
    )


# Text that ends too early


def _ends_early(
    source: Source, accepts: set[str], unclosed: list[Piece], start: int, end: int | None
) -> Diagnostic:
    code = _code_end(source.text, start, len(source.text) if end is None else end)
    if code == start == 0:
        return Diagnostic(
            "empty-program",
            "there is no flow in this file",
            Label(Span(source, 0, 0)),
            help='decode -> resize(224) -> rgb -> trt("model.onnx")',
        )
    here = Span(source, code, code)
    if unclosed and {"RPAR", "RBRACE", "RSQB"} & accepts:
        return _unclosed_bracket(here, unclosed[-1])
    if source.text[start:code].endswith("->"):
        arrow = Span(source, code - 2, code)
        return Diagnostic("missing-stage", "there is no stage after this `->`", Label(arrow))
    if told := _lacks_word(here, accepts):
        return told
    is_typed = {"EQUAL", "LBRACE"} <= accepts and "COLON" not in accepts
    return Diagnostic(
        "unexpected-end",
        "this ends too early",
        Label(here, f"expected {listed(accepts)}"),
        note="types stand after `:`, the pipeline after `=`" if is_typed else None,
    )


def _lacks_word(here: Span, accepts: set[str]) -> Diagnostic | None:
    """A `use` without its `as`, or an `if` without its `else`, at the end of the text in hand."""
    before = stage_before(here.source.text, here.start)
    if before is None:
        return None
    last = Span(here.source, *before)
    if accepts == {"AS"} and last.text.startswith('"'):
        message, word = "a file in use is given a name", f"as {name_of_file(last.text)}"
    elif "ELSE" in accepts and "NAME" not in accepts:
        message, word = "`if` needs its `else`", "else pass"
    else:
        return None
    text = f"{one_line(last)} {word}"
    return Diagnostic(
        "unexpected-end",
        message,
        Label(here, f"expected `{word.split()[0]}`"),
        help=text,
        fix=last,
    )


def name_of_file(path: str) -> str:
    """What a file may be called in a flow: its name, made one of the language."""
    stem = path.strip('"').rpartition("/")[2].partition(".")[0]
    name = re.sub(r"\W", "_", stem, flags=re.ASCII)
    is_name = re.fullmatch(r"(?!x[0-9]+$)[A-Za-z_]\w*", name) and name not in RESERVED
    return name if is_name else f"my_{name}"


def _unclosed_bracket(here: Span, opening: Piece) -> Diagnostic:
    closer = CLOSER[opening.text]
    text = here.source.text
    arrow = _first_arrow(text, opening, here.start)
    if arrow is not None:
        end = _code_end(text, opening.start, arrow)
        here = Span(here.source, end, end)
    before = stage_before(text, here.start)
    fix = Span(here.source, *before) if before else here
    return Diagnostic(
        "unclosed-bracket",
        f"`{opening.text}` is not closed",
        Label(here, f"expected `{closer}`"),
        (Label(Span(here.source, opening.start, opening.start + 1), "opened here"),),
        help=f"{one_line(fix)}{closer}",
        fix=fix,
    )


def _first_arrow(text: str, opening: Piece, end: int) -> int | None:
    """Where an arrow ends the arguments of a call, of which only `map` takes whole pipelines."""
    called = re.search(r"([A-Za-z_][\w.]*)$", text[max(0, opening.start - 80) : opening.start])
    if opening.text != "(" or called is None or called.group(1) in (*RESERVED, "map"):
        return None
    level = 0
    for piece in pieces(text[opening.start + 1 : end]):
        level += (piece.kind == "open") - (piece.kind == "close")
        if piece.text == "->" and level == 0:
            return opening.start + 1 + piece.start
    return None


def _code_end(text: str, start: int, end: int, *, at_comment: bool = False) -> int:
    """Offset after the last code before `end`, or before the first comment: blanks left out."""
    last = start
    for found in re.finditer(r'#[^\n]*|"(?:\\.|[^"\\\n])*"|[^\s"#]+|"', text[start:end]):
        if not found.group().startswith("#"):
            last = start + found.end()
        elif at_comment:
            break
    return last
