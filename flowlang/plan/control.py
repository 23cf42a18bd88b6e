"""Control: `map`, `filter` and `top` over lists, `if`, `match` and `??`, as nodes with bodies.

Layer 2. A body is a graph of its own: it is run for each element, or only where it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, Label
from flowlang.plan import graph
from flowlang.plan.arguments import Bound
from flowlang.plan.expression import EMPTY, Expression, is_plain, widened
from flowlang.plan.extent import ungrouped
from flowlang.plan.fitting import called
from flowlang.plan.graph import Body, Node
from flowlang.plan.ops import Op
from flowlang.plan.scope import Bodies, Scope, start
from flowlang.plan.types import (
    BOOL,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    ListOf,
    Optional,
    Record,
    Type,
    Unknown,
    unify,
    without_null,
)
from flowlang.plan.values import Refused, evaluate
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.plan.elaborate import Elaborator


MAX_SIFTED = 100_000  # elements of a list that a condition with operators is asked about


class Control:
    """The constructs that have bodies, for an Elaborator."""

    def __init__(self, elaborator: Elaborator) -> None:
        self._elaborator = elaborator
        self._report = elaborator.report

    def _body(
        self,
        bodies: Bodies,
        expr: tree.Expr,
        kind: Type,
        scope: Scope,
        *,
        is_value: bool = False,
        is_element: bool = False,
    ) -> Body:
        """The body that `expr` is for an item of this type."""
        inside, source = scope.inside(), bodies.inputs[0]
        item = start(kind, source, "an element" if is_element else called(source))
        inside.item = None if is_element else (item, source)
        apply = self._elaborator.operand if is_value else self._elaborator.apply
        return bodies.add(item, apply(expr, item, inside), inside)

    # Lists

    def over_list(self, node: Node, op: Op, bound: Bound, scope: Scope) -> Node:
        """`map`, `filter` or `top`, with what they run on each element."""
        given = node.inputs[0].type
        if op.name == "top" and not self._suits_top(node, bound, given):
            return self._elaborator.unknown(node.span, node.inputs[0], scope)
        if not bound.bodies:
            return self._elaborator.calls.typed(node, op)
        if not isinstance(given, (ListOf, Unknown)):
            return self._elaborator.calls.typed(node, op)  # which says so
        (name, expr), *_ = bound.bodies.items()
        bodies = Bodies(list(node.inputs))
        element = given.item if isinstance(given, ListOf) else UNKNOWN
        is_value = op.name != "map"
        body = self._body(bodies, expr, element, scope, is_value=is_value, is_element=True)
        if op.name == "map":
            params = {**node.params, "stage": body}
            node = replace(node, op=graph.MAP, params=params, inputs=tuple(bodies.inputs))
            node = self._elaborator.calls.typed(node, op)
            params = {n: v for n, v in params.items() if n != "stage"}
            return replace(node, params=params, bodies=(body,))
        if not self._suits(name, body.output, expr):
            return self._elaborator.unknown(node.span, node.inputs[0], scope)
        if is_plain(body):
            params = {**node.params, name: Expression(body, expr.span.text)}
            inputs = tuple(bodies.inputs)
            return self._elaborator.calls.typed(replace(node, params=params, inputs=inputs), op)
        return self._select(node, name, body, bodies)

    def _select(self, node: Node, name: str, body: Body, bodies: Bodies) -> Node:
        """`filter` by a condition with operators in it: it is run as `map`, and the list sifted."""
        if name != "condition":
            message = "`by` is an expression on the element, without operators"
            self._report(Diagnostic("not-a-constant", message, Label(node.param_spans[name])))
            return Node("unknown", {}, node.inputs, UNKNOWN, node.span, node.site)
        params = {"max": MAX_SIFTED, "on_error": "fail"}
        conditions = Node(
            graph.MAP, params, tuple(bodies.inputs), ListOf(BOOL), node.span, node.site,
            bodies=(body,),
        )  # fmt: skip
        items = node.inputs[0]
        return Node(graph.SELECT, {}, (items, conditions), items.type, node.span, node.site)

    def _suits_top(self, node: Node, bound: Bound, given: Type) -> bool:
        """A list is ranked by a key, and a tensor by its values."""
        if isinstance(given, ListOf) and not bound.bodies:
            message = "`top` of a list needs to know what to go by"
            key = _key(given.item)
            k = node.param_spans["k"].text
            help_text = f"top({k}, by={key})" if key else None
            self._report(
                Diagnostic(
                    "missing-parameter",
                    message,
                    Label(node.span),
                    help=help_text,
                    fix=node.span if key else None,
                )
            )
            return False
        if bound.bodies and not isinstance(given, (ListOf, Unknown)):
            message = "`by` is for lists; a tensor is ranked by its values"
            self._report(Diagnostic("unknown-parameter", message, Label(node.param_spans["by"])))
            return False
        return True

    def _suits(self, name: str, output: Node, expr: tree.Expr) -> bool:
        """Whether a condition gives true or false, and a key what can be ranked."""
        kind = output.type
        if name == "condition":
            return self.is_condition(output, expr)
        if isinstance(kind, Unknown) or without_null(kind) in (INT, FLOAT, STR):
            return True
        message = "a list is ranked by numbers or texts"
        self._report(Diagnostic("type-mismatch", message, Label(expr.span, f"gives {kind}")))
        return False

    def is_condition(self, output: Node, expr: tree.Expr) -> bool:
        """Whether a node gives true or false. Reports where it does not."""
        kind = output.type
        if kind == BOOL or isinstance(kind, Unknown):
            return True
        null = ", which may be null" if isinstance(kind, Optional) else ""
        message = "a condition gives true or false"
        self._report(Diagnostic("type-mismatch", message, Label(expr.span, f"gives {kind}{null}")))
        return False

    # Branches

    def choose(self, expr: tree.If, item: Node, scope: Scope) -> Node:
        """`if condition then stage else stage`."""
        condition = self._elaborator.operand(expr.condition, item, scope)
        self.is_condition(condition, expr.condition)
        bodies = Bodies([item, condition])
        for branch in (expr.then, expr.otherwise):
            self._body(bodies, branch, item.type, scope)
        what = "the ways out of this `match`" if expr.is_match else "the two ways out of this `if`"
        kind = self._one_type(bodies.made, [expr.then, expr.otherwise], what)
        params = {"cases": {True: 0}, "otherwise": 1}
        return self._control(graph.ROUTE, params, bodies, kind, expr, scope)

    def match(self, expr: tree.Match, item: Node, scope: Scope) -> Node:
        """`match .field { "a" | "b" => stage, else => stage }`, or conditions in order."""
        *arms, last = expr.arms
        if last.patterns or any(not arm.patterns for arm in arms):
            place = next((arm for arm in arms if not arm.patterns), last)
            message = "the last way of a `match`, and only that, is `else`"
            mended = self._with_else(expr.arms, item, scope) if place is last else None
            self._report(
                Diagnostic(
                    "missing-else",
                    message,
                    Label(place.span),
                    help=mended,
                    note=None if mended else "`else => STAGE` says what becomes of all others",
                    fix=place.span if mended else None,
                )
            )
            return self._elaborator.unknown(expr.span, item, scope)
        if expr.subject is None:
            return self._conditions(arms, last, expr, item, scope)
        subject = self._elaborator.operand(expr.subject, item, scope)
        bodies = Bodies([item, subject])
        cases: dict[Any, int] = {}
        for number, arm in enumerate(expr.arms):
            for pattern in arm.patterns:
                self._case(pattern, subject, cases, number, scope)
            self._body(bodies, arm.value, item.type, scope)
        ways = [arm.value for arm in expr.arms]
        kind = self._one_type(bodies.made, ways, "the ways out of this `match`")
        params = {"cases": cases, "otherwise": len(arms)}
        return self._control(graph.ROUTE, params, bodies, kind, expr, scope)

    def _with_else(self, arms: Sequence[tree.Arm], item: Node, scope: Scope) -> str | None:
        """The last arm of a `match` without `else`, as one or with one of the type of its ways."""
        last = arms[-1]
        if [p.span.text for p in last.patterns] in (["_"], ["default"], ["otherwise"]):
            return f"else => {last.value.span.text}"
        bodies = Bodies([item])
        for arm in arms:
            self._body(bodies, arm.value, item.type, scope)
        ways = [arm.value for arm in arms]
        kind = self._one_type(bodies.made, ways, "the ways out of this `match`")
        way = "pass" if unify(kind, item.type) is not None else EMPTY.get(without_null(kind))
        return f"{last.span.text}, else => {way}" if way else None

    def _case(
        self, pattern: tree.Expr, subject: Node, cases: dict[Any, int], number: int, scope: Scope
    ) -> None:
        """A pattern is a value known beforehand, of the subject's type, and leads to one arm."""
        note = "`match { .x > 1 => ... }` tests conditions"
        if scope.is_live(pattern):
            message, place = "this must be known before anything runs", Label(pattern.span)
            self._report(Diagnostic("not-a-constant", message, place, note=note))
            return
        try:
            given = evaluate(pattern, scope.constants)
        except Refused as refused:
            if refused.diagnostic is not None:
                self._report(replace(refused.diagnostic, note=note))
            return
        kind = {"int": INT, "float": FLOAT, "str": STR, "bool": BOOL}.get(given.kind)
        wanted = without_null(subject.type)
        if kind is None or not (isinstance(wanted, Unknown) or unify(kind, wanted) is not None):
            message = f"`{pattern.span.text}` is no {wanted}, so it is never met"
            shown = f'"{pattern.span.text}"' if given.kind == "word" and wanted == STR else None
            self._report(
                Diagnostic(
                    "type-mismatch",
                    message,
                    Label(pattern.span),
                    (Label(subject.span, f"gives {subject.type}"),),
                    help=shown,
                    fix=pattern.span if shown else None,
                )
            )
        elif cases.setdefault(given.value, number) != number:
            message = f"`{pattern.span.text}` is met by an arm above"
            self._report(Diagnostic("given-twice", message, Label(pattern.span)))

    def _conditions(
        self, arms: Sequence[tree.Arm], last: tree.Arm, expr: tree.Match, item: Node, scope: Scope
    ) -> Node:
        """`match { condition => stage, ... }` is an `if` in the `else` of the one before."""
        chain: tree.Expr = last.value
        for arm in reversed(arms):
            condition = tree.joined("or", arm.patterns)
            chain = tree.If(condition, arm.value, chain, expr.span, is_match=True)
        return self._elaborator.apply(chain, item, scope)

    def fall_back(self, expr: tree.Fallback, item: Node, scope: Scope) -> Node:
        """`a ?? b`: `b` where `a` fails, misses its timeout, or gives null."""
        bodies = Bodies([item])
        for choice in expr.choices:
            self._body(bodies, choice, item.type, scope, is_value=True)
        made = [b.output.type for b in bodies.made]
        # Null goes on to the next choice, so only the last one's can come out.
        outputs = [*(without_null(k) for k in made[:-1]), made[-1]]
        kind = self._one_type(bodies.made, list(expr.choices), "the choices of this `??`", outputs)
        is_nullable = any(isinstance(k, (Optional, Unknown)) for k in made[:-1])
        params = {"skips_null": is_nullable}
        return self._control(graph.FALLBACK, params, bodies, kind, expr, scope)

    def _control(
        self,
        op: str,
        params: dict[str, Any],
        bodies: Bodies,
        kind: Type,
        expr: tree.If | tree.Match | tree.Fallback,
        scope: Scope,
    ) -> Node:
        site = scope.site(expr.span)
        inputs = tuple(bodies.inputs)
        made = tuple(replace(b, output=widened(b.output, kind)) for b in bodies.made)
        return Node(op, params, inputs, kind, expr.span, site, bodies=made)

    def _one_type(
        self,
        bodies: Sequence[Body],
        ways: Sequence[tree.Expr],
        what: str,
        outputs: Sequence[Type] | None = None,
    ) -> Type:
        """The type that all ways give. Reports the first that gives another."""
        kinds = list(outputs) if outputs is not None else [b.output.type for b in bodies]
        kind = kinds[0]
        for way, other in zip(ways[1:], kinds[1:], strict=True):
            both = unify(kind, other)
            if both is None:
                first = Label(ungrouped(ways[0]).span, f"gives {kinds[0]}")
                mend = _mend(kinds[0], other, ways[0], way)
                self._report(
                    Diagnostic(
                        "branch-types",
                        f"{what} give different types",
                        Label(ungrouped(way).span, f"gives {other}"),
                        (first,),
                        help=mend,
                    )
                )
                return UNKNOWN
            kind = both
        return kind


def _key(element: Type) -> str | None:
    """What elements of a list can be ranked by, as it is written; None where nothing is."""
    if element in (INT, FLOAT, STR):
        return "pass"
    fields = element.fields if isinstance(element, Record) else ()
    keys = (name for wanted in (FLOAT, INT) for name, kind in fields if kind == wanted)
    return next((f".{name}" for name in keys), None)


def _mend(first: Type, other: Type, one: tree.Expr, two: tree.Expr) -> str | None:
    """How two ways could give the same: a list of texts is joined to one."""
    if first == ListOf(STR) and other == STR:
        return "end the first way with `-> join`"
    if other == ListOf(STR) and first == STR:
        return "end this way with `-> join`"
    return None
