"""Arguments that are known before anything runs: numbers, quantities, ranges, strings, lists.

Layer 2. An expression becomes a Constant here, and a Constant is fitted to what a parameter or a
setting wants, or complained about at its place.
"""

from __future__ import annotations

import difflib
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.types import BOOL, FLOAT, INT, STR, Scalar, Type
from flowlang.syntax import tree

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


# The kinds of constants that can be values of a flow.
LITERALS: Mapping[str, Type] = {
    "int": INT,
    "float": FLOAT,
    "percent": FLOAT,
    "str": STR,
    "bool": BOOL,
    "duration": Scalar("duration"),
}
MAX_TYPOS = 6  # letters more or less
MOST = 10**15  # numbers beyond this are typing mistakes, and floats no longer count by ones


class Refused(Exception):
    """An expression that gives no constant, with the reason; None where it was told before."""

    def __init__(self, diagnostic: Diagnostic | None) -> None:
        super().__init__(diagnostic.message if diagnostic else "")
        self.diagnostic = diagnostic


@dataclass(frozen=True, slots=True)
class Constant:
    """A value known at compile time.

    `kind` is one of int, float, str, bool, duration (seconds), bytes, percent, range (a tuple of
    values), list, word (a bare name), unknown (what could not be read, and was complained about).
    """

    kind: str
    value: Any
    span: Span

    @property
    def noun(self) -> str:
        if self.kind == "list":
            return f"a list of {len(self.value)}"
        return {
            "int": "a number",
            "float": "a number with a fraction",
            "str": "a string",
            "bool": "true or false",
            "bytes": "an amount of memory",
            "word": "a word",
            "range": "a range",
            "duration": "a duration",
            "percent": "a percentage",
        }[self.kind]


def refuse(slug: str, message: str, span: Span, **more: Any) -> Refused:
    label = more.pop("label", "")
    return Refused(Diagnostic(slug, message, Label(span, label), **more))


def number(node: tree.Number) -> Constant:
    amount = float(node.digits)
    if amount > MOST:
        raise _too_large(node.span)
    if not node.unit:
        if node.is_int:
            digits = (
                node.digits.lstrip("0") or "0"
            )  # Python counts them, those too that say nothing
            return Constant("int", int(digits), node.span)
        return Constant("float", amount, node.span)
    if node.unit in SECONDS:
        return Constant("duration", amount * SECONDS[node.unit], node.span)
    if node.unit in BYTES:
        return Constant("bytes", int(amount * BYTES[node.unit]), node.span)
    return Constant("percent", amount / 100, node.span)


def _too_large(span: Span) -> Refused:
    return refuse("out-of-range", "this is too large a number", span)


def interpolate(text: str, names: Mapping[str, Constant], span: Span) -> str:
    """`{param}` replaced by its value; `{{` and `}}` are braces."""

    def value(found: re.Match[str]) -> str:
        piece = found.group()
        if piece in ("{{", "}}"):
            return piece[0]
        place = _inside(span, text, found)
        if len(piece) == 1:
            raise refuse(
                "bad-escape",
                f"a lone `{piece}` means nothing in a string",
                place,
                note=f"write `{piece * 2}` for the brace itself, or `{{name}}` for a param",
            )
        return _piece(piece[1:-1], names, place)

    return re.sub(r"\{\{|\}\}|\{[^{}]*\}|[{}]", value, text)


def _inside(span: Span, text: str, found: re.Match[str]) -> Span:
    """Where the name or the lone brace found in a string's text is written in the program."""
    piece = found.group()
    before = text.count(piece, 0, found.start())
    written = list(re.finditer(re.escape(piece), span.text))
    if len(written) <= before:
        return span  # its braces are written as escapes
    start, end = (span.start + at for at in written[before].span())
    return (
        Span(span.source, start + 1, end - 1) if len(piece) > 1 else Span(span.source, start, end)
    )


def _piece(name: str, names: Mapping[str, Constant], span: Span) -> str:
    if name not in names:
        like = nearest(name, names)
        raise refuse(
            "unknown-name",
            f"there is no param named `{name}`",
            span,
            help=f"did you mean `{like}`?" if like else None,
            note="strings interpolate params only; write `{{` for a brace",
        )
    given = names[name]
    if given.kind == "unknown":
        raise Refused(None)
    if given.kind not in ("str", "int", "float"):
        raise refuse("wrong-kind", f"`{name}` is {given.noun}, which no string can hold", span)
    return str(given.value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like a misspelt one, if one is like it; of very many, the first.

    Capitals count for little: `RGB` is `rgb` before it is anything else.
    """
    near = (k for k in known if abs(len(k) - len(word)) <= MAX_TYPOS)
    small: dict[str, str] = {}
    for each in itertools.islice(near, 500):
        small.setdefault(each.casefold(), each)
    found = difflib.get_close_matches(word.casefold(), small, n=1, cutoff=0.6)
    return small[found[0]] if found else None


_FILE_NAME = re.compile(r"[\w/.-]+\.(onnx|txt|names|json|csv|ort|engine|plan|pb|pt|pth|tflite)")
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda a, b: a // b if type(a) is type(b) is int and a % b == 0 else a / b,
}


def evaluate(node: tree.Expr, names: Mapping[str, Constant]) -> Constant:
    """The constant an expression gives. Raises Refused where it gives none."""
    span = node.span
    if isinstance(node, tree.Group):
        return evaluate(node.value, names)
    if isinstance(node, tree.Number):
        return number(node)
    if isinstance(node, tree.String):
        if node.is_broken:
            raise Refused(None)
        return Constant("str", interpolate(node.value, names, span), span)
    if isinstance(node, tree.Bool):
        return Constant("bool", node.value, span)
    if isinstance(node, tree.Range):
        return _range(node)
    if isinstance(node, tree.ListOf):
        items = [evaluate(i, names) for i in node.items]
        if word := next((i for i in items if i.kind == "word"), None):
            raise refuse(
                "unknown-name",
                f"there is no param named `{word.value}`",
                word.span,
                help=f'"{word.value}"',
                note="a string is written in double quotes",
                fix=word.span,
            )
        return Constant("list", tuple(i.value for i in items), span)
    if isinstance(node, tree.Unary) and node.operator == "-":
        inner = evaluate(node.value, names)
        if inner.kind in ("int", "float", "duration", "percent"):
            return Constant(inner.kind, -inner.value, span)
    if isinstance(node, tree.Binary) and not _FILE_NAME.fullmatch(span.text):
        return _arithmetic(node, names)
    if isinstance(node, tree.Call) and node.args is None:
        name = str(node.path)
        if name in names and names[name].kind == "unknown":
            raise Refused(None)
        if name in names:
            return Constant(names[name].kind, names[name].value, span)
        if len(node.path.names) == 1:
            return Constant("word", name, span)
    if isinstance(node, tree.Repeat):
        copied = node.stage.span.text
        raise refuse(
            "replica-of-value",
            f"`x{node.count}` copies a stage, but `{copied}` is a number",
            node.count_span,
        )
    if _FILE_NAME.fullmatch(span.text):
        message = "a file is named in double quotes"
        raise refuse("not-a-constant", message, span, help=f'"{span.text}"', fix=span)
    raise refuse("not-a-constant", "this must be known before anything runs", span)


def _range(node: tree.Range) -> Constant:
    parts = [number(p) for p in node.parts]
    if len({p.kind for p in parts}) > 1:
        raise refuse("bad-range", "the ends of a range are of one kind", node.span)
    if parts[0].kind not in ("int", "float"):
        plain = "..".join(p.digits for p in node.parts)
        raise refuse("bad-range", "a range has no unit", node.span, help=plain, fix=node.span)
    values = tuple(p.value for p in parts)
    if list(values) != sorted(values):
        raise refuse(
            "bad-range",
            "a range goes from its least to its greatest",
            node.span,
            help="..".join(p.span.text for p in sorted(parts, key=lambda p: float(p.value))),
            fix=node.span,
        )
    return Constant("range", values, node.span)


def _joined(node: tree.Expr, names: Mapping[str, Constant]) -> str | None:
    """What stands in a string that is put together with `+`, or None where that is no string."""
    if isinstance(node, tree.Binary) and node.operator == "+":
        left, right = _joined(node.left, names), _joined(node.right, names)
        return left + right if left is not None and right is not None else None
    if isinstance(node, tree.String):
        return node.span.text[1:-1]
    return (
        f"{{{node.span.text}}}" if isinstance(node, tree.Call) and _is_text(node, names) else None
    )


def _is_text(call: tree.Call, names: Mapping[str, Constant]) -> bool:
    found = names.get(str(call.path)) if call.args is None else None
    return found is not None and found.kind == "str"


def _arithmetic(node: tree.Binary, names: Mapping[str, Constant]) -> Constant:
    if node.operator not in _ARITHMETIC:
        raise refuse("not-a-constant", "this must be known before anything runs", node.span)
    text = _joined(node, names)
    if text is not None and '"' in node.span.text:
        message = "a string is put together by naming params inside it"
        raise refuse("not-a-constant", message, node.span, help=f'"{text}"', fix=node.span)
    left, right = evaluate(node.left, names), evaluate(node.right, names)
    kinds = {left.kind, right.kind}
    if not kinds <= {"int", "float"}:
        raise refuse("not-a-constant", "arithmetic on constants is on plain numbers", node.span)
    if node.operator == "/" and right.value == 0:
        raise refuse("not-a-constant", "this divides by zero", right.span)
    value = _ARITHMETIC[node.operator](left.value, right.value)
    if abs(value) > MOST:
        raise _too_large(node.span)
    return Constant("int" if isinstance(value, int) else "float", value, node.span)


def from_text(text: str, kind: str, span: Span) -> Constant:
    """A constant from the command line or the environment, read as a value of `kind`."""
    if kind in ("str", "path"):
        return Constant("str", text, span)
    if kind == "bool" and text.lower() in ("true", "false"):
        return Constant("bool", text.lower() == "true", span)
    if kind == "range":
        parts = [_number_from(p, span) for p in text.split("..")]
        if 2 <= len(parts) <= 3 and all(p is not None and p.kind == "int" for p in parts):
            values = tuple(p.value for p in parts if p is not None)
            if list(values) == sorted(values):
                return Constant("range", values, span)
    constant = _number_from(text, span)
    wanted = "bytes" if kind == "size" else kind
    if constant is not None and kind == "float" and constant.kind == "int":
        return Constant("float", float(constant.value), span)
    if constant is None or constant.kind != wanted:
        raise refuse("bad-value", f"`{text}` is not {_NOUN.get(kind, f'a {kind}')}", span)
    return constant


def _number_from(text: str, span: Span) -> Constant | None:
    found = re.fullmatch(
        r"(-?)([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(us|ms|s|KiB|MiB|GiB|%)?", text.strip()
    )
    if not found:
        return None
    constant = number(tree.Number(found.group(2), found.group(3) or "", span))
    return Constant(constant.kind, -constant.value, span) if found.group(1) else constant


def written(value: Any) -> str:
    """A plain value as it is written in a flow."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("{", "{{").replace("}", "}}")
    return str(value)


def shown(constant: Constant) -> str:
    """A constant as it is written in a flow."""
    value = constant.value
    if constant.kind == "duration":
        return seconds(value)
    if constant.kind == "bytes":
        unit = next((u for u in ("GiB", "MiB", "KiB") if value and value % BYTES[u] == 0), "KiB")
        return f"{value / BYTES[unit]:g}{unit}"
    if constant.kind == "percent":
        return f"{value * 100:g}%"
    if constant.kind == "range":
        return "..".join(f"{v:g}" for v in value)
    return written(value)


def seconds(value: float) -> str:
    """A duration in the unit that reads best."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return "0ms"


_NOUN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "duration": "a duration (like 5ms)",
    "size": "an amount of memory (like 512MiB)",
    "bytes": "an amount of memory (like 512MiB)",
    "percent": "a percentage (like 50%)",
    "range": "a range (like 1..8)",
    "list": "a list, which only the file can give",
}
