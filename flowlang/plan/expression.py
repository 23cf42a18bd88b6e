"""Expressions on items: what they give, and how it is computed.

Layer 2. Glue nodes (records, fields, lists, literals, arithmetic, comparisons) are plain Python on
plain values: the scheduler computes them between stages, and operators such as `filter` inside one.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flowlang.plan import graph
from flowlang.plan.graph import Body, Node, topological
from flowlang.plan.types import (
    BOOL,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    Image,
    ListOf,
    Record,
    Tensor,
    Type,
    Unknown,
    is_vague,
    optional,
    without_null,
)

ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
ORDERING: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
EQUALITY: Mapping[str, Callable[[Any, Any], Any]] = {"==": operator.eq, "!=": operator.ne}
LOGIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
}
# A value of each plain type, for help to put where one is missing.
EMPTY: Mapping[Type, str] = {INT: "0", FLOAT: "0.0", STR: '""', BOOL: "false"}
_BINARY = {**ARITHMETIC, **ORDERING, **EQUALITY, **LOGIC}
_PLAIN = frozenset({graph.INPUT, "pass"})


class Unsuited(Exception):
    """An operand of a wrong type: which one (0 or 1), and what it should have been."""

    def __init__(self, operand: int, wants: str) -> None:
        super().__init__(wants)
        self.operand = operand
        self.wants = wants


def _is_number(kind: Type) -> bool:
    return kind in (INT, FLOAT) or (isinstance(kind, Tensor) and kind.shape == ())


def binary_type(sign: str, left: Type, right: Type) -> Type:
    """The type that `left sign right` gives. Raises Unsuited."""
    sides = (left, right)
    if sign in LOGIC:
        _check(sides, lambda kind: kind == BOOL, "wants true or false")
        return BOOL
    if sign in EQUALITY:
        _check_alike(without_null(left), without_null(right))
        return BOOL
    if sign in ARITHMETIC:
        _check(sides, _is_number, "wants a number")
        return INT if left == right == INT and sign != "/" else _float_of(sides)
    _check(sides, lambda kind: _is_number(kind) or kind == STR, "wants a number or a string")
    _check_alike(*sides)
    return BOOL


def _float_of(sides: Sequence[Type]) -> Type:
    return UNKNOWN if any(isinstance(s, Unknown) for s in sides) else FLOAT


def _check(sides: Sequence[Type], suits: Callable[[Type], bool], wants: str) -> None:
    for index, kind in enumerate(sides):
        if not isinstance(kind, Unknown) and not suits(kind):
            raise Unsuited(index, wants)


def _check_alike(left: Type, right: Type) -> None:
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return
    if not (_is_number(left) or left in (STR, BOOL)):
        raise Unsuited(0, "wants a number, a string, or true or false")
    if not (left == right or (_is_number(left) and _is_number(right))):
        raise Unsuited(1, f"wants {left}, as on the other side")


def unary_type(sign: str, kind: Type) -> Type:
    """The type that `-value` or `not value` gives. Raises Unsuited."""
    if sign == "not":
        _check((kind,), lambda k: k == BOOL, "wants true or false")
        return BOOL
    _check((kind,), _is_number, "wants a number")
    return kind if kind == INT else _float_of((kind,))


def compute(node: Node, values: Sequence[Any]) -> Any:
    """What a glue node gives. Raises what Python raises (ZeroDivisionError, TypeError on null)."""
    if node.op == graph.FIELD:
        return field_of(values[0], node)
    if node.op == graph.RECORD:
        return dict(zip(node.params["names"], values, strict=True))
    if node.op == graph.LITERAL:
        return node.params["value"]
    if node.op == graph.BINARY:
        sign = node.params["operator"]
        result = _BINARY[sign](plain(values[0]), plain(values[1]))
        return float(result) if node.type == FLOAT else result
    if node.op == graph.UNARY:
        value = plain(values[0])
        result = not value if node.params["operator"] == "not" else -value
        return float(result) if node.type == FLOAT else result
    if node.op == graph.WIDEN:
        return _widen(values[0], node.params["given"], node.params["wanted"])
    return values[0] if node.op == "pass" else list(values)


def plain(value: Any) -> Any:
    """A number of an array as Python's own, which neither wraps nor rounds to a few bits."""
    return value.item() if hasattr(value, "item") else value


def known_value(node: Node) -> Any:
    """What a node gives that needs no item, as the default of a parameter."""
    return compute(node, [known_value(each) for each in node.inputs])


def is_known(node: Node) -> bool:
    """Whether a node needs no item: it is a literal, or a list or record of such."""
    known = (graph.LITERAL, graph.LIST, graph.RECORD, graph.WIDEN)
    return all(n.op in known for n in topological(node))


def widened(node: Node, wanted: Type) -> Node:
    """A node whose values are wholly of a wider type: fields they may lack are there, as null.

    What a type leaves open is taken to be as wanted.
    """
    is_told = is_vague(node.type) and node.type != wanted and not is_vague(wanted)
    if not is_told and not _is_wider(node.type, wanted):
        return node
    if node.op == graph.LITERAL:
        return replace(node, params={"value": float(node.params["value"])}, type=FLOAT)
    params = {"given": node.type, "wanted": wanted}
    return Node(graph.WIDEN, params, (node,), wanted, node.span, node.site)


def _is_wider(given: Type, wanted: Type) -> bool:
    """Whether values of one type have to be changed to be values of the other."""
    given, wanted = without_null(given), without_null(wanted)
    if isinstance(given, Record) and isinstance(wanted, Record):
        have = dict(given.fields)
        return any(n not in have or _is_wider(have[n], t) for n, t in wanted.fields)
    if isinstance(given, ListOf) and isinstance(wanted, ListOf):
        return _is_wider(given.item, wanted.item)
    return given == INT and wanted == FLOAT


def _widen(value: Any, given: Type, wanted: Type) -> Any:
    given, wanted = without_null(given), without_null(wanted)
    if value is None or not _is_wider(given, wanted):
        return value
    if isinstance(given, Record) and isinstance(wanted, Record):
        have = dict(given.fields)
        return {n: _widen(value[n], have[n], t) if n in have else None for n, t in wanted.fields}
    if isinstance(given, ListOf) and isinstance(wanted, ListOf):
        return [_widen(part, given.item, wanted.item) for part in value]
    return float(value)


def field_of(value: Any, node: Node) -> Any:
    """A field of a record, null where the record is null; the sides of an image."""
    name = node.params["name"]
    if value is None:
        return None
    if isinstance(value, Mapping):
        return value[name]
    return int(value.shape[0 if name == "height" else 1])


def is_plain(body: Body) -> bool:
    """Whether a body is an expression alone, with no operator in it but `pass`."""
    return all(
        all(map(is_plain, n.bodies)) if n.op == graph.FALLBACK else n.op in _PLAIN | graph.GLUE
        for n in topological(body.output)
    )


def failure(error: Exception) -> str:
    """Why something could not be computed, for whoever reads an answer."""
    if isinstance(error, ZeroDivisionError):
        return "division by zero"
    return f"{type(error).__name__}: {error}"


def function_of(body: Body) -> Callable[..., Any]:
    """A plain body as a function of its item and of the values it captures, in order."""
    order = topological(body.output)
    places = {id(n): i for i, n in enumerate(order)}
    given = [
        (places.get(id(n)), i) for i, n in enumerate([body.item, *(n for n, _ in body.captures)])
    ]
    steps = [
        (places[id(n)], _step(n), [places[id(i)] for i in n.inputs])
        for n in order
        if n.op != graph.INPUT
    ]
    last = places[id(body.output)]

    def call(*values: Any) -> Any:
        slots: list[Any] = [None] * len(order)
        for place, index in given:
            if place is not None:
                slots[place] = values[index]
        for place, step, sources in steps:
            slots[place] = step([slots[s] for s in sources])
        return slots[last]

    return call


def _step(node: Node) -> Callable[[Sequence[Any]], Any]:
    """What a node of an expression makes of the values of its inputs."""
    if node.op != graph.FALLBACK:
        return partial(compute, node)
    choices = [(function_of(b), [index for _, index in b.captures]) for b in node.bodies]
    skips_null = node.params["skips_null"]

    def first(values: Sequence[Any]) -> Any:
        """What the first choice gives that neither fails nor gives null."""
        *others, last = choices
        for call, captured in others:
            with contextlib.suppress(Exception):
                value = call(values[0], *(values[i] for i in captured))
                if value is not None or not skips_null:
                    return value
        call, captured = last
        return call(values[0], *(values[i] for i in captured))

    return first


class Expression:
    """An expression on each element of a list, as an argument of `filter` or `top`.

    Called with an element, and with the values of the flow that it uses. `text` is as written.
    """

    __slots__ = ("_call", "body", "text")

    def __init__(self, body: Body, text: str) -> None:
        self.body = body
        self.text = text
        self._call = function_of(body)

    def __call__(self, *values: Any) -> Any:
        return self._call(*values)


def field_type(kind: Type, name: str) -> Type | None:
    """The type of a field, optional where its record is; None where there is none."""
    inner = without_null(kind)
    found = dict(fields_of(inner)).get(name)
    return optional(found) if found is not None and inner is not kind else found


def fields_of(kind: Type) -> tuple[tuple[str, Type], ...]:
    """The fields that a value of this type has: those of a record, the sides of an image."""
    if isinstance(kind, Image):
        return (("height", INT), ("width", INT))
    return kind.fields if isinstance(kind, Record) else ()
