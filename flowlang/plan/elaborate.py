"""Expressions to plan nodes: every stage applied to the item that arrives at it.

Layer 2. Named flows are inlined where they are mentioned; their operators keep the site where they
are written, so that all mentions share one physical thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan import graph
from flowlang.plan.arguments import Binder, Bound, did_you_mean
from flowlang.plan.extent import field_value
from flowlang.plan.fitting import ModelFitter, called, mismatch
from flowlang.plan.graph import Node, Site
from flowlang.plan.model import input_type
from flowlang.plan.onnx import Opener
from flowlang.plan.ops import OPS, UNBUILT, Mismatch, Op
from flowlang.plan.schedule import COPIES, Given, Settings
from flowlang.plan.types import UNKNOWN, Record, Type, Unknown, fits, why_vast
from flowlang.syntax import tree
from flowlang.syntax.scan import RESERVED

_CONSTRUCTS: dict[type, str] = {
    tree.If: "`if`",
    tree.Match: "`match`",
    tree.Fallback: "`??`",
    tree.Binary: "an expression on items",
    tree.Unary: "an expression on items",
}


@dataclass(slots=True)
class Scope:
    """Where an expression stands: its flow, and the values it can name."""

    flow: str
    values: dict[str, Node] = field(default_factory=dict)
    lets: frozenset[str] = frozenset()


class Elaborator:
    """Makes nodes, collects what is wrong, and fills the table of settings."""

    def __init__(
        self,
        flows: Mapping[str, tree.Flow],
        lost: frozenset[str],
        binder: Binder,
        resolve: Callable[[tree.TypeExpr], Type],
        opener: Opener | None,
    ) -> None:
        self.flows = flows
        self.lost = lost
        self.binder = binder
        self.resolve = resolve
        self.report = binder.report
        self.fitter = ModelFitter(self.report, opener)
        self.settings = Settings()
        self._bound: dict[Span, Bound] = {}

    # Flows

    def flow(self, name: str, item: Node) -> Node:
        """The nodes of a named flow, its item arriving from `item`."""
        flow = self.flows[name]
        scope = Scope(name)
        if not isinstance(flow.body, tree.Body):
            result = self.apply(flow.body, item, scope)
        else:
            scope.values["in"] = item
            scope.lets = frozenset(let.name for let in flow.body.lets)
            for let in flow.body.lets:
                if let.name in scope.values:
                    self.report(
                        Diagnostic(
                            "duplicate-name",
                            f"`{let.name}` is declared twice in `{name}`",
                            Label(let.name_span),
                        )
                    )
                scope.values[let.name] = self.apply(let.value, item, scope)
            result = self.apply(flow.body.result, item, scope)
        if flow.signature:
            wanted = self.resolve(flow.signature[1])
            if not fits(result.type, wanted):
                mismatch(
                    self.report,
                    flow.signature[1].span,
                    result,
                    f"`{name}` is declared to give `{wanted}`",
                    f"but it ends with {called(result)}",
                )
        return result

    def head_type(self, expr: tree.Expr) -> Type:
        """What a stage takes where nothing arrives yet: the type of its first operator."""
        if isinstance(expr, tree.Pipeline):
            return self.head_type(expr.steps[0])
        if isinstance(expr, (tree.Group, tree.Repeat)):
            return self.head_type(expr.value if isinstance(expr, tree.Group) else expr.stage)
        if isinstance(expr, tree.Record):
            branches = [f.value for f in expr.fields if f.value is not None]
            return self.head_type(branches[0]) if branches else UNKNOWN
        if isinstance(expr, tree.Ascribe):
            return self.resolve(expr.type)
        if isinstance(expr, tree.Call) and len(expr.path.names) == 1:
            name = expr.path.names[0]
            if name in self.flows:
                return self.flow_input(self.flows[name])
            op = OPS.get(name)
            if op is not None and op.kind == "model":
                model = self.fitter.model_of(self._bind(expr, op))
                return input_type(model) if model else UNKNOWN
            return op.takes if op else UNKNOWN
        return UNKNOWN

    def flow_input(self, flow: tree.Flow) -> Type:
        """The type of item a flow takes: declared, or what its first operator takes."""
        if flow.signature:
            return self.resolve(flow.signature[0])
        if not isinstance(flow.body, tree.Body):
            return self.head_type(flow.body)
        for let in flow.body.lets:
            steps = let.value.steps if isinstance(let.value, tree.Pipeline) else ()
            if len(steps) > 1 and steps[0].span.text == "in":
                return self.head_type(steps[1])
        result = flow.body.result
        steps = result.steps if isinstance(result, tree.Pipeline) else ()
        if len(steps) > 1 and steps[0].span.text == "in":
            return self.head_type(steps[1])
        return UNKNOWN

    # Expressions

    def apply(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """The node that gives what `expr` makes of `item`."""
        if isinstance(expr, tree.Pipeline):
            for step in expr.steps:
                item = self.apply(step, item, scope)
            return item
        if isinstance(expr, tree.Group):
            return self.apply(expr.value, item, scope)
        if isinstance(expr, tree.Call):
            return self._call(expr, item, scope)
        if isinstance(expr, tree.Repeat):
            return self._repeat(expr, item, scope)
        if isinstance(expr, tree.Record):
            return self._record(expr, item, scope)
        if isinstance(expr, tree.Current):
            return self._fields(expr, item, scope)
        if isinstance(expr, tree.Ascribe):
            wanted = self.resolve(expr.type)
            if not fits(item.type, wanted):
                mismatch(self.report, expr.span, item, f"this is not `{wanted}`", f"wants {wanted}")
            return item
        if type(expr) in _CONSTRUCTS:
            return self._unbuilt(expr.span, _CONSTRUCTS[type(expr)], item, scope)
        self.report(
            Diagnostic(
                "not-a-stage",
                f"`{expr.span.text}` is a value, and a stage belongs here",
                Label(expr.span),
            )
        )
        return self._unknown(expr.span, item, scope)

    def _unknown(self, span: Span, item: Node, scope: Scope) -> Node:
        return Node("unknown", {}, (item,), UNKNOWN, span, Site(scope.flow, span))

    def _unbuilt(self, span: Span, what: str, item: Node, scope: Scope) -> Node:
        self.report(
            Diagnostic(
                "not-built",
                f"{what} is part of the language, and this version cannot run it yet",
                Label(span),
            )
        )
        return self._unknown(span, item, scope)

    def _repeat(self, expr: tree.Repeat, item: Node, scope: Scope) -> Node:
        inner = expr.stage
        while isinstance(inner, tree.Group):
            inner = inner.value
        node = self.apply(inner, item, scope)
        if isinstance(inner, tree.Call):
            name = inner.path.names[0]
            given = Given(expr.count, expr.count_span)
            if name in OPS and OPS[name].kind != "host":
                self.settings.sites.setdefault(Site(scope.flow, inner.span), {})[COPIES] = given
                return node
            if name in self.flows:
                self.report(
                    Diagnostic(
                        "replica-of-flow",
                        f"`{name}` is one thing however often it is mentioned, so its copies are "
                        "counted where it is scheduled",
                        Label(expr.count_span),
                        help=f"schedule {{ {name} x{expr.count} }}",
                    )
                )
                return node
        if not isinstance(node.type, Unknown):
            self.report(
                Diagnostic(
                    "replica-of-value",
                    f"`x{expr.count}` copies an operator that has instances, and this is none",
                    Label(expr.count_span),
                )
            )
        return node

    def _record(self, expr: tree.Record, item: Node, scope: Scope) -> Node:
        fields: dict[str, Node] = {}
        spans: dict[str, Span] = {}
        for part in expr.fields:
            if part.name is None:
                if isinstance(item.type, Record):
                    for name, _ in item.type.fields:
                        fields[name] = self._field(item, name, part.span, scope)
                elif not isinstance(item.type, Unknown):
                    mismatch(
                        self.report,
                        part.span,
                        item,
                        "`...` copies the fields of a record",
                        "wants a record",
                    )
                continue
            if part.name in spans:
                self.report(
                    Diagnostic(
                        "duplicate-name",
                        f"this record has two fields named `{part.name}`",
                        Label(part.span),
                        (Label(spans[part.name], "first here"),),
                    )
                )
            spans[part.name] = part.span
            fields[part.name] = self.apply(field_value(part), item, scope)
        kind: Type = Record(tuple((n, f.type) for n, f in fields.items()))
        if slug := why_vast(kind):
            what = "have too many parts" if slug == "too-large" else "are nested too deep"
            message = f"the records in this one {what}"
            self.report(Diagnostic(slug, message, Label(expr.span)))
            kind = UNKNOWN
        site = Site(scope.flow, expr.span)
        params = {"names": tuple(fields)}
        return Node(graph.RECORD, params, tuple(fields.values()), kind, expr.span, site)

    def _fields(self, expr: tree.Current, item: Node, scope: Scope) -> Node:
        for name in expr.fields:
            item = self._field(item, name, expr.span, scope)
        return item

    def _field(self, item: Node, name: str, span: Span, scope: Scope) -> Node:
        kind: Type | None = UNKNOWN
        if isinstance(item.type, Record):
            kind = item.type.get(name)
            if kind is None:
                self._unknown_field(item.type, name, span)
        elif not isinstance(item.type, Unknown):
            mismatch(self.report, span, item, f"there is no field `{name}` here", "wants a record")
        params = {"name": name}
        return Node(graph.FIELD, params, (item,), kind or UNKNOWN, span, Site(scope.flow, span))

    def _unknown_field(self, kind: Record, name: str, span: Span) -> None:
        known = [n for n, _ in kind.fields]
        like = did_you_mean(name, known)
        owner = f"`{kind.name}`" if kind.name else "this record"
        self.report(
            Diagnostic(
                "unknown-field",
                f"{owner} has no field `{name}`",
                Label(span, like.replace("`", "`.", 1) if like else ""),
                note=f"fields are {', '.join(known)}",
            )
        )

    # Operators

    def _call(self, call: tree.Call, item: Node, scope: Scope) -> Node:
        name, prefix = str(call.path), call.path.names[0]
        if call.args is None and prefix in scope.values:
            value = scope.values[prefix]
            for part in call.path.names[1:]:
                value = self._field(value, part, call.path.span, scope)
            return value
        if name in self.flows:
            if call.args:
                return self._unbuilt(call.span, "passing arguments to a flow", item, scope)
            return self._arrive(name, call, item)
        if name in OPS:
            return self._operator(call, OPS[name], item, scope)
        if name in UNBUILT and name not in self.binder.names:
            return self._unbuilt(call.span, f"`{name}`", item, scope)
        if not {name, prefix} & {*self.lost, *RESERVED} or prefix == "in":
            self.report(self._unknown_stage(call, scope))
        return self._unknown(call.span, item, scope)

    def _unknown_stage(self, call: tree.Call, scope: Scope) -> Diagnostic:
        name, place = str(call.path), Label(call.path.span)
        if name in scope.values:
            message = f"`{name}` is a value, and takes no arguments"
            return Diagnostic("not-a-stage", message, place, help=name, fix=call.span)
        if name in self.binder.names:
            message = f"`{name}` is a param, and a stage belongs here"
            return Diagnostic("not-a-stage", message, place)
        if name in scope.lets:
            message = f"`{name}` is used before it is declared"
            return Diagnostic("unknown-name", message, place, note="lets are read in order")
        if name == "in":
            return Diagnostic(
                "not-a-stage",
                "`in` is the item of a flow that has a body",
                place,
                note="flow name { return in -> decode }",
            )
        known = [*OPS, *UNBUILT, *self.flows, *scope.values]
        like = did_you_mean(name, [k for k in known if k != "in"])
        message = f"there is no operator or flow named `{name}`"
        return Diagnostic("unknown-operator", message, place, help=like)

    def _arrive(self, name: str, call: tree.Call, item: Node) -> Node:
        """A mention of a flow: its declared input is checked, then its nodes follow."""
        signature = self.flows[name].signature
        if signature:
            wanted = self.resolve(signature[0])
            if not fits(item.type, wanted):
                mismatch(
                    self.report,
                    call.span,
                    item,
                    f"`{name}` cannot take what {called(item)} gives",
                    f"wants {wanted}",
                )
                item = replace(item, type=wanted)
        return self.flow(name, item)

    def bound_at(self, call: tree.Call) -> Bound | None:
        """The arguments of a call that has been met."""
        return self._bound.get(call.span)

    def _bind(self, call: tree.Call, op: Op) -> Bound:
        """The arguments of a call, bound once however often its flow is mentioned."""
        if call.span not in self._bound:
            self._bound[call.span] = self.binder.bind(call, op)
        return self._bound[call.span]

    def _operator(self, call: tree.Call, op: Op, item: Node, scope: Scope) -> Node:
        bound = self._bind(call, op)
        site = Site(scope.flow, call.span)
        if bound.settings:
            self.settings.sites.setdefault(site, {}).update(bound.settings)
        if not bound.is_whole:
            return self._unknown(call.span, item, scope)
        node = Node(op.name, bound.params, (item,), UNKNOWN, call.span, site, bound.spans)
        if op.kind == "model":
            return self.fitter.fit(node, item, bound)
        if op.kind == "image" and op.name != "decode" and isinstance(item.type, Unknown):
            return node
        try:
            return replace(node, type=op.rule(item.type, bound.params))
        except Mismatch as misfit:
            mismatch(
                self.report,
                call.span,
                item,
                f"`{op.name}` cannot take what {called(item)} gives",
                f"wants {misfit.wants}",
            )
            return self._unknown(call.span, item, scope)
