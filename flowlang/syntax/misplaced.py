"""Tokens in the wrong place, by the mistake that put them there.

Layer 1. Each function of MISTAKES knows one kind of mistake: it is given the token, its kind and
what the grammar would have accepted, and gives a Diagnostic, or None where it is another.
"""

from __future__ import annotations

import re

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.syntax.scan import (
    CLOSER,
    DECLARATIONS,
    RESERVED,
    declaration_like,
    is_in_call,
    is_let,
    lacks_return,
    open_bracket,
    stage_after,
    stage_before,
    starts_line,
)
from flowlang.syntax.wording import STARTS_STAGE, listed, one_line

_UNITS = ("us", "ms", "s", "KiB", "MiB", "GiB")
_ARROWS = frozenset({"=>", "|>", ">", ">>", "|", "~>", "-->", "->>", "--", "- >"})


_COMPARISONS = frozenset({"==", "!=", "<", "<=", ">", ">="})
_OPERATORS = _COMPARISONS | {"+", "-", "*", "/", "and", "or", "??"}


def _arrow(span: Span, kind: str, accepts: set[str]) -> Diagnostic | None:
    """Something drawn like an arrow, where `->` is meant."""
    text = span.source.text
    start, end = span.start, span.end
    while end < len(text) and text[end] in "->|=":
        end += 1
    while start and text[start - 1] in "-=|~>":
        start -= 1
    if span.text == ">" and text[:start].endswith("- "):
        start -= 2
    drawn = Span(span.source, start, end)
    if drawn.text == "||":
        return _swapped(drawn, "`||` is written `or`", "or")
    if drawn.text == "->" and span.text == ">":
        return Diagnostic("missing-stage", "there is no stage before this `->`", Label(drawn))
    is_arrow = drawn.text in _ARROWS and (start < span.start or "ARROW" in accepts)
    if not is_arrow or stage_before(text, start) is None:
        return None
    return Diagnostic(
        "wrong-arrow",
        f"stages are joined with `->`, not `{drawn.text}`",
        Label(drawn),
        help="->",
        fix=drawn,
    )


def _number(span: Span, kind: str, accepts: set[str]) -> Diagnostic | None:
    """A unit that does not touch its number, or is none."""
    text = span.source.text
    before = text[max(0, span.start - 40) : span.start]
    number = re.search(r"(?<![\w.])[0-9]+(\.[0-9]+)?(\s*)$", before)
    if kind != "NAME" or number is None:
        return None
    both = Span(span.source, span.start - len(number.group()), span.end)
    digits, gap, unit = number.group().strip(), number.group(2), span.text
    if unit in _UNITS and gap:
        return Diagnostic(
            "missing-unit",
            f"`{unit}` must touch its number",
            Label(both),
            help=f"{digits}{unit}",
            fix=both,
        )
    if gap or not unit.isalpha():
        return None
    like = {"KB": "KiB", "MB": "MiB", "GB": "GiB", "K": "KiB", "M": "MiB", "G": "GiB"}
    meant = like.get(unit.upper(), "ms" if unit.lower().startswith("m") else "s")
    is_time = unit.lower() in ("sec", "secs", "second", "seconds", "msec", "millis")
    is_known = unit.upper() in like or is_time or unit.lower() in _UNITS
    help_text = f"{digits}{meant}" if is_known else digits if unit == "px" else None
    return Diagnostic(
        "unknown-unit",
        f"there is no unit `{unit}`",
        Label(span),
        help=help_text,
        note=f"units are {' '.join(_UNITS)} and %, and touch their number",
        fix=both if help_text else None,
    )


def _branch(span: Span, kind: str, accepts: set[str]) -> Diagnostic | None:
    """An `if` without its `else`, or with branches of several stages."""
    if "ELSE" not in accepts or "NAME" in accepts:
        return None
    if span.text == "->":
        return Diagnostic(
            "unexpected-token",
            "a way out of an `if` that has several stages needs parentheses",
            Label(span),
            note="if .wide then (cut(w=512) -> map(rec) -> join) else rec",
        )
    if span.text in _OPERATORS:
        return Diagnostic(
            "unexpected-token",
            "a way out of an `if` that is an expression needs parentheses",
            Label(span),
            note="if .a > 3 then (.a - 3) else .a",
        )
    if span.text in ("elif", "elsif", "elseif"):
        return _swapped(span, "another `if` stands behind `else`", "else if")
    before = stage_before(span.source.text, span.start)
    left = Span(span.source, *before) if before else None
    gap = "" if span.text in ")]}," else " "
    return Diagnostic(
        "unexpected-token",
        f"`if` needs its `else` before `{span.text}`",
        Label(span),
        help=f"{one_line(left) if left else ''} else pass{gap}{span.text}".strip(),
        fix=left.to(span) if left else span,
    )


def _neighbour(span: Span, kind: str, accepts: set[str]) -> Diagnostic | None:
    """Two things side by side with no arrow or comma between them."""
    text, found = span.source.text, span.text
    if kind == "$END" or found in DECLARATIONS:
        return Diagnostic(
            "unexpected-token",
            f"a new declaration starts before the last one is complete: `{found}`",
            Label(span, f"expected {listed(accepts)}"),
        )
    if accepts == {"FLOW"} and kind == "NAME" and found not in RESERVED:
        is_kind = re.compile(r"\s+[A-Za-z_]").match(text, span.end)
        meant = "flow" if is_kind and declaration_like(found) == "flow" else f"flow {found}"
        return _swapped(span, f"expected `flow` before `{found}`", meant)
    before = stage_before(text, span.start)
    starts_stage = kind in STARTS_STAGE or found in ("if", "match")
    if before is None or not (starts_stage or (found == "else" and "COMMA" in accepts)):
        return None
    if found == "[" and before[1] == span.start and text[before[0]].isidentifier():
        return _swapped(span, "arguments stand in parentheses", "(")
    if kind == "FIELD" and before[1] == span.start and {"COLON", "RBRACE"} <= accepts:
        return _nameless(Span(span.source, before[0], span.end))
    if re.fullmatch("X[1-9][0-9]*", found):
        return _swapped(span, "copies are written with a small x", found.lower())
    if found.startswith("x") and (said := _copies(span)):
        return said
    left = Span(span.source, *before)
    if left.text in ("let", "return"):
        return Diagnostic(
            "unexpected-token",
            f"`{left.text}` stands only in the body of a flow",
            Label(left),
            note="flow name { let picture = in -> decode return picture -> rgb }",
        )
    if _wants_comma(text, span, accepts):
        named = re.search(r"\w+\s*[=:]\s*$", text[max(0, left.start - 80) : left.start])
        if named:
            left = Span(span.source, left.start - len(named.group()), left.end)
        right = Span(span.source, span.start, _argument_end(text, span))
        return Diagnostic(
            "missing-comma",
            f"expected `,` before `{found}`",
            Label(span),
            help=f"{one_line(left)}, {one_line(right)}",
            fix=left.to(right),
        )
    if "ARROW" not in accepts:
        return None
    is_last = starts_line(text, span.start) or is_let(text, span)
    if "RETURN" in accepts and is_last and lacks_return(text, span.start):
        return _swapped(span, "the body of a flow ends with `return`", f"return {found}")
    right = Span(span.source, *stage_after(text, span.start))
    return Diagnostic(
        "missing-arrow",
        f"expected `->` before `{found}`",
        Label(span, "nothing flows into this stage"),
        help=f"{one_line(left)} -> {one_line(right)}",
        fix=left.to(right),
    )


def _nameless(span: Span) -> Diagnostic | None:
    """`{ size.height }`: a field of a record that is made of another's, and has no name."""
    path = re.compile(r"\w*(\.(\w+))+").match(span.source.text, span.start)
    if path is None:
        return None
    whole = Span(span.source, *path.span())
    return _swapped(whole, "a record's field has a name", f"{path[2]}: {whole.text}")


def _copies(span: Span) -> Diagnostic | None:
    """`x 4` and `x0`, written for `x4`."""
    if re.fullmatch(r"x0+", span.text):
        message = f"`{span.text}` would be no copy at all"
        return Diagnostic("bad-range", message, Label(span), help="x1", fix=span)
    digits = re.compile(r"\s+([1-9][0-9]*)").match(span.source.text, span.end)
    if span.text != "x" or digits is None:
        return None
    both = Span(span.source, span.start, digits.end())
    return _swapped(both, "copies are written in one word", f"x{digits.group(1)}")


def _mark(span: Span, kind: str, accepts: set[str]) -> Diagnostic | None:
    """A mark that belongs somewhere else."""
    text, found = span.source.text, span.text
    for start in (span.start, max(0, span.start - 1)):
        if text[start : start + 2] in ("//", "/*"):
            return _swapped(Span(span.source, start, start + 2), "a comment starts with `#`", "#")
    if found == "->" and "STRING" in accepts:
        return Diagnostic("missing-stage", "there is no stage before this `->`", Label(span))
    if accepts == {"COLON"} and open_bracket(text, span.start) == "(":
        return _untyped(span)
    if found in (")", "]", "}"):
        return _closer(span, accepts)
    if found == "=" and "COLON" in accepts:
        return _swapped(span, "a record's field is given with `:`", ":")
    if found == "=" and _is_compared(text, span.start, accepts):
        return _swapped(span, "values are compared with `==`", "==")
    if found == ":" and is_in_call(text, span.start):
        if re.search(r"[=(,]\s*[0-9]+\s*$", text[max(0, span.start - 40) : span.start]):
            return _swapped(span, "a range is written with `..`", "..")
        return _swapped(span, "an argument is given with `=`", "=")
    if "GIVES" in accepts and found in ("->", ":", "then"):
        return _swapped(span, "what a `match` does is given with `=>`", "=>")
    if "EQUAL" in accepts and "ARROW" not in accepts:
        return _unequal(span, kind)
    if "RETURN" in accepts and "NAME" not in accepts and kind in STARTS_STAGE:
        if re.compile(r"\s*=(?![=>])").match(text, span.end):
            return _swapped(span, "a value in a body is named with `let`", f"let {found}")
        return _swapped(span, "the body of a flow ends with `return`", f"return {found}")
    if found == "=" and accepts == {"ARROW"}:
        return Diagnostic(
            "unexpected-token",
            "a flow says both what it takes and what it gives",
            Label(span),
            note="flow name: bytes -> label = ...",
        )
    if found == "," and "GIVES" in accepts:
        return _swapped(span, "values that go one way have a `|` between them", "|")
    if found == "," and "RPAR" in accepts and "COMMA" not in accepts:
        return Diagnostic(
            "unexpected-token",
            "parentheses hold one stage, and these are several",
            Label(span),
            note="`{ a, b }` is a record of what several give, `[a, b]` a list of it",
        )
    if found == "(" and {"COLON", "RBRACE"} <= accepts and (head := stage_before(text, span.start)):
        call = Span(span.source, head[0], stage_after(text, head[0])[1])
        name = text[slice(*head)]
        return _swapped(call, "a record's field has a name", f"{name}: {one_line(call)}")
    is_field = {"NAME", "RBRACE"} <= accepts and "ARROW" not in accepts
    if is_field and kind == "FIELD":
        return _nameless(span)
    if is_field and re.fullmatch(r'"[A-Za-z_]\w*"', found, re.ASCII):
        return _swapped(span, "a field's name has no quotes", found.strip('"'))
    word = re.compile(r"[\w./-]+").match(text, span.start)
    is_path = word and found in ("..", "/") and re.search(r"/[\w.-]*\.\w+$", word.group())
    if word and (accepts == {"STRING"} or is_path):
        before = re.search(r"[\w./-]*$", text[max(0, span.start - 80) : span.start])
        start = span.start - len(before.group() if before else "")
        return unquoted(Span(span.source, start, word.end()))
    if found == "?":
        is_optional = accepts == {"COLON"}
        return Diagnostic(
            "unexpected-token",
            "`?` cannot stand here",
            Label(span),
            note="a field that may be missing is written `name: TYPE?`"
            if is_optional
            else "a choice is written `if CONDITION then STAGE else STAGE`; `a ?? b` is a fallback",
        )
    if found in _COMPARISONS and "OR" in accepts:
        return Diagnostic(
            "unexpected-token",
            f"`{found}` cannot compare what is a comparison already",
            Label(span),
            note="`.a > 1 and .a < 3` is two of them",
        )
    if found == "," and accepts <= {"NAME", "RBRACE", "LPAR", "REPEAT", "FIELD", "__FIELD"}:
        return Diagnostic(
            "unexpected-token",
            "nothing stands between the lines of a schedule",
            Label(span),
            note="schedule { net(batch=1..8) x2   small(batch=1..32) }",
        )
    return None


def _untyped(span: Span) -> Diagnostic:
    """A parameter of a flow without its type, which its default tells if it has one."""
    text = span.source.text
    before = text[: span.start].rstrip()
    name = re.search(r"\w*$", before)
    place = Span(span.source, name.start() if name else span.start, len(before))
    kinds = {r'"': "str", "true|false": "bool", r"-?[0-9]+\.": "float", "-?[0-9]": "int"}
    found = (k for p, k in kinds.items() if re.compile(rf"=\s*({p})").match(text, span.start))
    kind = next(found, None)
    return Diagnostic(
        "unexpected-token",
        f"`{place.text}` has no type: parameters of a flow are typed",
        Label(place),
        help=f"{place.text}: {kind or 'int'}",
        fix=place,
    )


def _is_compared(text: str, at: int, accepts: set[str]) -> bool:
    """Whether a `=` stands behind a field, where it can only be meant as `==`."""
    before = text[max(0, at - 80) : at]
    return "ARROW" in accepts and re.search(r"\.[A-Za-z_]\w*\s*$", before) is not None


def _unequal(span: Span, kind: str) -> Diagnostic | None:
    """A declaration whose `=` is missing, or drawn otherwise."""
    gives = r"->\s*[A-Za-z_][\w.]*(<[^>\n]*>)?\??\s*(=(?![=>])|\{)"
    if re.compile(gives).match(span.source.text, span.start):
        return _swapped(span, "the types of a flow stand after `:`", ": bytes ->")
    if span.text in ("->", "=>", "==", ":="):
        return _swapped(span, "what is declared stands after `=`", "=")
    if kind in STARTS_STAGE or kind in ("INT", "FLOAT", "QUANTITY"):
        stage = Span(span.source, *stage_after(span.source.text, span.start))
        return Diagnostic(
            "unexpected-token",
            f"expected `=` before `{span.text}`",
            Label(span),
            help=f"= {one_line(stage)}",
            fix=stage,
        )
    return None


def _swapped(span: Span, message: str, right: str) -> Diagnostic:
    return Diagnostic("unexpected-token", message, Label(span), help=right, fix=span)


def unquoted(path: Span) -> Diagnostic:
    return _swapped(path, "a file is named in double quotes", f'"{path.text}"')


def _closer(span: Span, accepts: set[str]) -> Diagnostic:
    before = span.source.text[: span.start].rstrip()
    if before.endswith("->"):
        arrow = Span(span.source, len(before) - 2, len(before))
        return Diagnostic("missing-stage", "there is no stage after this `->`", Label(arrow))
    opening = open_bracket(span.source.text, span.start)
    if opening is None:
        message = f"`{span.text}` closes nothing that is open here"
        return Diagnostic("unexpected-token", message, Label(span), note="remove it")
    if CLOSER[opening] != span.text:
        return _swapped(span, f"`{span.text}` cannot close a `{opening}`", CLOSER[opening])
    return Diagnostic(
        "unexpected-token",
        f"`{span.text}` comes too early",
        Label(span, f"expected {listed(accepts)}"),
    )


def _wants_comma(text: str, span: Span, accepts: set[str]) -> bool:
    if "COMMA" not in accepts:
        return False
    if "ARROW" not in accepts or re.compile(r"\s*[=:](?!=)").match(text, span.end):
        return True
    if text[: span.start].rstrip()[-1:] in '}"0123456789':
        return True
    return is_in_call(text, span.start) and text[span.end : span.end + 1] != "("


def _argument_end(text: str, span: Span) -> int:
    named = re.compile(r"[\w.]+\s*[=:](?![=>])\s*").match(text, span.start)
    return max(span.end, stage_after(text, named.end() if named else span.start)[1])


MISTAKES = (_arrow, _number, _branch, _neighbour, _mark)
