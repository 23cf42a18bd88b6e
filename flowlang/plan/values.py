"""Arguments that are known before anything runs: numbers, quantities, ranges, strings, lists.

Layer 2. An expression becomes a Constant here, and a Constant is fitted to what a parameter or a
setting wants, or complained about at its place.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.syntax import tree

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Refused(Exception):
    """An expression that gives no constant, with the reason."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


@dataclass(frozen=True, slots=True)
class Constant:
    """A value known at compile time.

    `kind` is one of int, float, str, bool, duration (seconds), bytes, percent, range (a tuple of
    values), list, word (a bare name).
    """

    kind: str
    value: Any
    span: Span

    @property
    def noun(self) -> str:
        return {
            "int": "a number",
            "float": "a number",
            "str": "a string",
            "bool": "true or false",
            "bytes": "an amount of memory",
            "word": "a word",
            "list": "a list",
            "range": "a range",
            "duration": "a duration",
            "percent": "a percentage",
        }[self.kind]


def refuse(slug: str, message: str, span: Span, **more: Any) -> Refused:
    label = more.pop("label", "")
    return Refused(Diagnostic(slug, message, Label(span, label), **more))


def number(node: tree.Number) -> Constant:
    if not node.unit:
        if node.is_int:
            return Constant("int", int(node.digits), node.span)
        return Constant("float", float(node.digits), node.span)
    amount = float(node.digits)
    if node.unit in SECONDS:
        return Constant("duration", amount * SECONDS[node.unit], node.span)
    if node.unit in BYTES:
        return Constant("bytes", int(amount * BYTES[node.unit]), node.span)
    return Constant("percent", amount / 100, node.span)


def interpolate(text: str, names: Mapping[str, Constant], span: Span) -> str:
    """`{param}` replaced by its value; `{{` and `}}` are braces."""

    def value(found: re.Match[str]) -> str:
        piece = found.group()
        if piece in ("{{", "}}"):
            return piece[0]
        name = piece[1:-1]
        if name not in names:
            raise refuse(
                "unknown-name",
                f"there is no param named `{name}`",
                span,
                note="strings interpolate params only; write `{{` for a brace",
            )
        return str(names[name].value)

    return re.sub(r"\{\{|\}\}|\{\w*\}", value, text)


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def evaluate(node: tree.Expr, names: Mapping[str, Constant]) -> Constant:
    """The constant an expression gives. Raises Refused where it gives none."""
    span = node.span
    if isinstance(node, tree.Group):
        return evaluate(node.value, names)
    if isinstance(node, tree.Number):
        return number(node)
    if isinstance(node, tree.String):
        return Constant("str", interpolate(node.value, names, span), span)
    if isinstance(node, tree.Bool):
        return Constant("bool", node.value, span)
    if isinstance(node, tree.Range):
        return _range(node)
    if isinstance(node, tree.ListOf):
        items = [evaluate(i, names) for i in node.items]
        return Constant("list", tuple(i.value for i in items), span)
    if isinstance(node, tree.Unary) and node.operator == "-":
        inner = evaluate(node.value, names)
        if inner.kind in ("int", "float", "duration", "percent"):
            return Constant(inner.kind, -inner.value, span)
    if isinstance(node, tree.Binary) and node.operator in _ARITHMETIC:
        return _arithmetic(node, names)
    if isinstance(node, tree.Call) and node.args is None and len(node.path.names) == 1:
        name = node.path.names[0]
        if name in names:
            return Constant(names[name].kind, names[name].value, span)
        return Constant("word", name, span)
    if isinstance(node, tree.Repeat):
        copied = node.stage.span.text
        raise refuse(
            "replica-of-value",
            f"`x{node.count}` copies a stage, but `{copied}` is a number",
            node.count_span,
        )
    raise refuse("not-a-constant", "this must be known before anything runs", span)


def _range(node: tree.Range) -> Constant:
    parts = [number(p) for p in node.parts]
    if len({p.kind for p in parts}) > 1:
        raise refuse("bad-range", "the ends of a range are of one kind", node.span)
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


def _arithmetic(node: tree.Binary, names: Mapping[str, Constant]) -> Constant:
    left, right = evaluate(node.left, names), evaluate(node.right, names)
    kinds = {left.kind, right.kind}
    if not kinds <= {"int", "float"}:
        raise refuse("not-a-constant", "arithmetic on constants is on plain numbers", node.span)
    if node.operator == "/" and right.value == 0:
        raise refuse("not-a-constant", "this divides by zero", right.span)
    value = _ARITHMETIC[node.operator](left.value, right.value)
    return Constant("int" if isinstance(value, int) else "float", value, node.span)


def from_text(text: str, kind: str, span: Span) -> Constant:
    """A constant from the command line or the environment, read as a value of `kind`."""
    refusal = refuse("bad-value", f"`{text}` is not {_NOUN.get(kind, kind)}", span)
    if kind in ("str", "path"):
        return Constant("str", text, span)
    if kind == "bool":
        if text.lower() in ("true", "false"):
            return Constant("bool", text.lower() == "true", span)
        raise refusal
    found = re.fullmatch(
        r"(-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(us|ms|s|KiB|MiB|GiB|%)?", text
    )
    if not found:
        raise refusal
    unit = found.group(2) or ""
    constant = number(tree.Number(found.group(1).lstrip("-"), unit, span))
    if text.startswith("-"):
        constant = Constant(constant.kind, -constant.value, span)
    if kind == "float" and constant.kind == "int":
        constant = Constant("float", float(constant.value), span)
    if constant.kind != ("bytes" if kind == "size" else kind):
        raise refusal
    return constant


_NOUN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "duration": "a duration",
}
