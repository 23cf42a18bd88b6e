"""Expressions to plan nodes: every stage applied to the item that arrives at it.

Layer 2. Named flows are inlined where they are mentioned; their operators keep the site where they
are written, so that all mentions share one physical thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan import graph
from flowlang.plan.arguments import Report, did_you_mean, type_of
from flowlang.plan.calls import Calls
from flowlang.plan.control import Control
from flowlang.plan.expression import (
    EMPTY,
    Unsuited,
    binary_type,
    field_type,
    fields_of,
    unary_type,
    widened,
)
from flowlang.plan.extent import MAX_UNROLLED, field_value, ungrouped
from flowlang.plan.fitting import called, mismatch
from flowlang.plan.graph import Node
from flowlang.plan.model import input_type, tensor_packing
from flowlang.plan.module import Declared
from flowlang.plan.onnx import Opener
from flowlang.plan.ops import OPS
from flowlang.plan.schedule import COPIES, Given, Settings
from flowlang.plan.scope import Scope
from flowlang.plan.types import (
    STR,
    UNKNOWN,
    ListOf,
    Optional,
    Record,
    Type,
    Unknown,
    as_said,
    fits,
    is_vague,
    is_writable,
    taken,
    unify,
    why_vast,
    without_null,
)
from flowlang.plan.values import LITERALS, Constant, Refused, evaluate
from flowlang.syntax import tree
from flowlang.syntax.wording import one_line


def _heads(expr: tree.Expr) -> Sequence[tree.Expr]:
    """The stages that what arrives at an expression may reach first."""
    match expr:
        case tree.Pipeline(parts):
            return parts[:1]
        case tree.Fallback(parts):
            return parts
        case tree.Group(inner) | tree.Repeat(inner):
            return [inner]
        case tree.If(_, then, otherwise):
            return [then, otherwise]
        case tree.Match(_, arms):
            return [arm.value for arm in arms]
        case tree.Record(fields):
            return [field_value(field) for field in fields if field.name]
    return []


class Elaborator:
    """Makes nodes, collects what is wrong, and fills the table of settings.

    `seen` has every expression that was applied, with the type it gives.
    """

    def __init__(
        self, flows: Mapping[str, Declared], report: Report, opener: Opener | None
    ) -> None:
        self.flows = flows
        self.report = report
        self.settings = Settings()
        self.seen: list[tuple[Span, Type]] = []
        self._copied = 0  # fields, by `...`
        self.control = Control(self)
        self.calls = Calls(self, opener)

    # Flows

    def flow(self, declared: Declared, item: Node, scope: Scope) -> Node:
        """The nodes of a flow, its item arriving from `item`, its parameters set in `scope`."""
        flow = declared.flow
        if not isinstance(flow.body, tree.Body):
            result = self.apply(flow.body, item, scope)
        else:
            scope.put("in", item)
            scope.lets = frozenset(let.name for let in flow.body.lets)
            for let in flow.body.lets:
                if let.name in scope.values:
                    self.report(
                        Diagnostic(
                            "duplicate-name",
                            f"`{let.name}` is declared twice in `{flow.name}`",
                            Label(let.name_span),
                        )
                    )
                scope.put(let.name, self.apply(let.value, item, scope))
                self.seen.append((let.name_span, scope.values[let.name].type))
            result = self.apply(flow.body.result, item, scope)
        if flow.signature:
            wanted = as_said(declared.module.types.resolve(flow.signature[1]), result.type)
            if not fits(result.type, wanted):
                span = flow.signature[1].span
                is_told = is_writable(result.type)
                mismatch(
                    self.report,
                    span,
                    result,
                    f"`{flow.name}` is declared to give `{wanted}`",
                    f"but it ends with {called(result)}",
                    help=str(result.type) if is_told else None,
                    fix=span if is_told else None,
                )
            result = widened(result, wanted)
        return result

    def head_type(self, expr: tree.Expr, scope: Scope) -> Type:
        """What a stage takes where nothing arrives yet: the type of its first operator."""
        if isinstance(expr, tree.Call):
            return self._call_takes(expr, scope)
        if isinstance(expr, tree.Ascribe):
            return taken(scope.module.types.resolve(expr.type))
        for first in _heads(expr):
            kind = self.head_type(first, scope)
            if not isinstance(kind, Unknown):
                return kind
        return UNKNOWN

    def _call_takes(self, call: tree.Call, scope: Scope) -> Type:
        module = scope.module
        mentioned = module.declared(call.path.names)
        if mentioned is not None:
            known = self.calls.known_arguments(mentioned, call, scope)
            return taken(self.flow_input(mentioned, known))
        op = OPS.get(str(call.path)) or module.operator(call.path.names)
        if op is not None and op.kind == "model":
            model = self.calls.fitter.model_of(self.calls.bind_quietly(call, op, scope))
            return input_type(model) if model else UNKNOWN
        return op.takes if op else UNKNOWN

    def flow_input(self, declared: Declared, scope: Scope | None = None) -> Type:
        """The type of item a flow takes: declared, or what its first operator takes.

        `scope` has those of its parameters that are known.
        """
        flow = declared.flow
        if flow.signature:
            return declared.module.types.resolve(flow.signature[0])
        scope = scope or Scope(declared, constants=declared.module.constants)
        if not isinstance(flow.body, tree.Body):
            return self.head_type(flow.body, scope)
        for value in (*(let.value for let in flow.body.lets), flow.body.result):
            steps = value.steps if isinstance(value, tree.Pipeline) else ()
            if len(steps) > 1 and steps[0].span.text == "in":
                return self.head_type(steps[1], scope)
        values = {*(let.name for let in flow.body.lets), *(given.name for given in flow.inputs)}
        for let in flow.body.lets:  # `let picture = decode` is of the item too
            first = let.value.steps[0] if isinstance(let.value, tree.Pipeline) else let.value
            if isinstance(first, tree.Call) and first.path.names[0] not in values:
                return self.head_type(first, scope)
        return UNKNOWN

    # Expressions

    def apply(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """The node that gives what `expr` makes of `item`."""
        node = self._apply(expr, item, scope)
        self.seen.append((expr.span, node.type))
        return node

    def _apply(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        if isinstance(expr, tree.Pipeline):
            item = self.apply(expr.steps[0], item, scope)
            for step in expr.steps[1:]:
                item = self._step(step, item, scope)
            return item
        if isinstance(expr, tree.Group):
            return self.apply(expr.value, item, scope)
        if isinstance(expr, tree.Call):
            return self.calls.call(expr, item, scope)
        if isinstance(expr, tree.Repeat):
            return self._repeat(expr, item, scope)
        if isinstance(expr, tree.Record):
            return self._record(expr, item, scope)
        if isinstance(expr, tree.Current):
            return self._fields(expr, item, scope)
        if isinstance(expr, tree.Ascribe):
            return self._ascribe(expr, item, scope)
        if isinstance(expr, tree.If):
            return self.control.choose(expr, item, scope)
        if isinstance(expr, tree.Match):
            return self.control.match(expr, item, scope)
        if isinstance(expr, tree.Fallback):
            return self.control.fall_back(expr, item, scope)
        if isinstance(expr, tree.Binary):
            return self._binary(expr, item, scope)
        if isinstance(expr, tree.Unary) and not isinstance(expr.value, tree.Number):
            return self._unary(expr, item, scope)
        if isinstance(expr, tree.ListOf):
            return self._list(expr, item, scope)
        return self.literal(expr, item, scope)

    def _step(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """What stands behind an arrow: not a value, which would take nothing of the item."""
        inner = ungrouped(expr)
        what = self.calls.value_kind(inner, scope) if isinstance(inner, tree.Call) else None
        number = ungrouped(inner.value) if isinstance(inner, tree.Unary) else inner
        if isinstance(number, (tree.Number, tree.String, tree.Bool, tree.Range)):
            what = "value"
        if what is None:
            return self.apply(expr, item, scope)
        message = f"`{inner.span.text}` is a {what}, and a stage belongs here"
        self.report(Diagnostic("not-a-stage", message, Label(inner.span)))
        return self.unknown(inner.span, item, scope)

    def operand(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """What an expression gives where a value is wanted: there, a param's name is its value."""
        inner = ungrouped(expr)
        if isinstance(inner, tree.Call) and inner.args is None:
            name = str(inner.path)
            if scope.value(name) is None and name in scope.constants:
                return self.literal(inner, item, scope)
        return self.apply(expr, item, scope)

    def unknown(self, span: Span, item: Node, scope: Scope) -> Node:
        """What stands for something that has been complained about."""
        return Node("unknown", {}, (item,), UNKNOWN, span, scope.site(span))

    def _ascribe(self, expr: tree.Ascribe, item: Node, scope: Scope) -> Node:
        """`as TYPE` checks; where it says tensor and an image arrives, the image is packed."""
        wanted = as_said(scope.module.types.resolve(expr.type), item.type)
        packing = tensor_packing(item.type, wanted)
        if packing is not None:
            params = {**packing, "mean": None, "std": None}
            return Node(graph.PACK, params, (item,), wanted, expr.span, scope.site(expr.span))
        if not fits(item.type, wanted):
            mismatch(self.report, expr.span, item, f"this is not `{wanted}`", f"wants {wanted}")
        elif is_vague(item.type):
            return widened(item, wanted)
        return item

    def literal(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """The node of a value that is written out, or of a param by its name."""
        message = f"`{expr.span.text}` is a value, and a stage belongs here"
        try:
            given = evaluate(expr, scope.constants)
            if given.kind in LITERALS:
                return self.constant(given, scope)
            if given.kind == "list" and (kind := type_of(given.value)) is not None:
                return self._constants(given.value, kind, expr.span, scope)
            if given.kind in ("range", "bytes"):
                message = f"`{expr.span.text}` is {given.noun}, which only settings take"
        except Refused as refused:
            if refused.diagnostic is None:
                return self.unknown(expr.span, item, scope)
        self.report(Diagnostic("not-a-stage", message, Label(expr.span)))
        return self.unknown(expr.span, item, scope)

    def constant(self, given: Constant, scope: Scope) -> Node:
        """A node for a value that is known before anything runs."""
        params = {"value": given.value}
        kind = LITERALS[given.kind]
        return Node(graph.LITERAL, params, (), kind, given.span, scope.site(given.span))

    def _binary(self, expr: tree.Binary, item: Node, scope: Scope) -> Node:
        if isinstance(expr.left, tree.If):
            self._tell_both_ways(expr, expr.left)
        sides = tuple(self.operand(e, item, scope) for e in (expr.left, expr.right))
        kind: Type = UNKNOWN
        try:
            kind = binary_type(expr.operator, sides[0].type, sides[1].type)
        except Unsuited as error:
            self._unsuited(
                (expr.left, expr.right)[error.operand], sides[error.operand], error, expr
            )
        right = sides[1]
        if expr.operator == "/" and right.op == graph.LITERAL and right.params["value"] == 0:
            place = Label(expr.right.span)
            self.report(Diagnostic("out-of-range", "this divides by zero", place))
        params = {"operator": expr.operator}
        return Node(graph.BINARY, params, sides, kind, expr.span, scope.site(expr.span))

    def _constants(self, value: Any, kind: Type, span: Span, scope: Scope) -> Node:
        """A list that a param is, each of its elements a node."""
        if not isinstance(kind, ListOf):
            return Node(graph.LITERAL, {"value": value}, (), kind, span, scope.site(span))
        of = [(part, type_of(part) or UNKNOWN) for part in value]
        parts = tuple(self._constants(p, k, span, scope) for p, k in of)
        parts = tuple(widened(part, kind.item) for part in parts)
        return Node(graph.LIST, {}, parts, kind, span, scope.site(span))

    def _tell_both_ways(self, expr: tree.Binary, choice: tree.If) -> None:
        """What stands behind the last way of an `if` is done with what either gives."""
        rest = f"{expr.operator} {one_line(expr.right.span)}"
        last = one_line(choice.otherwise.span)
        self.report(
            Diagnostic(
                "unclear-branch",
                f"`{rest}` is done with what either way of this `if` gives",
                Label(expr.right.span),
                (Label(choice.span),),
                help=f"({choice.span.text})",
                note=f"of the last way alone it is `else ({last} {rest})`",
                severity="hint",
                fix=choice.span,
            )
        )

    def _unary(self, expr: tree.Unary, item: Node, scope: Scope) -> Node:
        side = self.operand(expr.value, item, scope)
        kind: Type = UNKNOWN
        try:
            kind = unary_type(expr.operator, side.type)
        except Unsuited as error:
            self._unsuited(expr.value, side, error, expr)
        params = {"operator": expr.operator}
        return Node(graph.UNARY, params, (side,), kind, expr.span, scope.site(expr.span))

    def _unsuited(
        self, side: tree.Expr, node: Node, error: Unsuited, whole: tree.Binary | tree.Unary
    ) -> None:
        may_be_null = isinstance(node.type, Optional)
        what = f"{node.type}, which may be null" if may_be_null else f"{node.type}"
        instead = EMPTY.get(without_null(node.type)) if may_be_null else None
        is_joined = isinstance(whole, tree.Binary) and whole.operator == "+" and node.type == STR
        self.report(
            Diagnostic(
                "type-mismatch",
                f"`{whole.operator}` cannot take `{side.span.text}`",
                Label(side.span, f"gives {what}, and `{whole.operator}` {error.wants}"),
                help=f"({side.span.text} ?? {instead})" if instead else None,
                note='texts are put together by `["a", "b"] -> join`' if is_joined else None,
                fix=side.span if instead else None,
            )
        )

    def _list(self, expr: tree.ListOf, item: Node, scope: Scope) -> Node:
        parts = tuple(self.operand(e, item, scope) for e in expr.items)
        kind: Type | None = parts[0].type if parts else UNKNOWN
        for given, part in zip(expr.items[1:], parts[1:], strict=True):
            both = unify(kind or UNKNOWN, part.type)
            if both is None:
                message = "the elements of a list are of one type"
                label = f"gives {part.type}, and the first gives {parts[0].type}"
                self.report(Diagnostic("type-mismatch", message, Label(given.span, label)))
            kind = both or UNKNOWN
        parts = tuple(widened(p, kind or UNKNOWN) for p in parts)
        return Node(
            graph.LIST, {}, parts, ListOf(kind or UNKNOWN), expr.span, scope.site(expr.span)
        )

    def _repeat(self, expr: tree.Repeat, item: Node, scope: Scope) -> Node:
        inner = ungrouped(expr.stage)
        node = self.apply(inner, item, scope)
        if isinstance(inner, tree.Call):
            given = Given(expr.count, expr.count_span)
            op = OPS.get(str(inner.path)) or scope.module.operator(inner.path.names)
            if op is not None and op.kind in ("image", "model", "python"):
                self.settings.put(scope.site(inner.span), {COPIES: given})
                return node
            if scope.module.declared(inner.path.names) is not None:
                self.report(
                    Diagnostic(
                        "replica-of-flow",
                        f"`{inner.path}` is one thing however often it is mentioned, so its copies "
                        "are counted where it is scheduled",
                        Label(expr.count_span),
                        help=f"schedule {{ {inner.path} x{expr.count} }}",
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
        is_open = False  # for there may be fields that nobody knows
        kind: Type
        for part in expr.fields:
            if part.name is None:
                if isinstance(item.type, Record):
                    if not self._may_copy(item.type, part.span):
                        return self.unknown(expr.span, item, scope)
                    site = scope.site(part.span)
                    for name, kind in item.type.fields:
                        if name not in spans:
                            params = {"name": name}
                            fields[name] = Node(graph.FIELD, params, (item,), kind, part.span, site)
                    continue
                is_open = True
                if not isinstance(item.type, Unknown):
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
            if part.value is None and self._is_field_meant(part.name, item, scope):
                message = f"there is no operator or flow named `{part.name}`"
                help_text, place = f"{part.name}: .{part.name}", Label(part.span)
                self.report(
                    Diagnostic("unknown-operator", message, place, help=help_text, fix=part.span)
                )
                fields[part.name] = self.unknown(part.span, item, scope)
                continue
            fields[part.name] = self.apply(field_value(part), item, scope)
        kind = UNKNOWN if is_open else Record(tuple((n, f.type) for n, f in fields.items()))
        if slug := why_vast(kind):
            what = "have too many parts" if slug == "too-large" else "are nested too deep"
            message = f"the records in this one {what}"
            self.report(Diagnostic(slug, message, Label(expr.span)))
            kind = UNKNOWN
        inputs = tuple(fields.values())
        names = {"names": tuple(fields)}
        return Node(graph.RECORD, names, inputs, kind, expr.span, scope.site(expr.span))

    @staticmethod
    def _is_field_meant(name: str, item: Node, scope: Scope) -> bool:
        """Whether `{ name }` names nothing but a field of what arrives."""
        is_known = name in scope.names() or name in scope.constants or name in OPS
        is_known = is_known or scope.module.declared((name,)) is not None
        return not is_known and field_type(item.type, name) is not None

    def _may_copy(self, kind: Record, span: Span) -> bool:
        """Whether `...` may copy these fields. Reports the first that are too many."""
        copied = self._copied
        self._copied += len(kind.fields)
        if copied <= MAX_UNROLLED < self._copied:
            message = f"with this one, `...` copies more than {MAX_UNROLLED} fields"
            self.report(Diagnostic("too-large", message, Label(span)))
        return self._copied <= MAX_UNROLLED

    def _fields(self, expr: tree.Current, item: Node, scope: Scope) -> Node:
        for name in expr.fields:
            item = self.field(item, name, expr.span, scope)
        return item

    def field(self, item: Node, name: str, span: Span, scope: Scope) -> Node:
        """The node that picks a field of what `item` gives."""
        kind = field_type(item.type, name)
        if kind is None and fields_of(without_null(item.type)):
            self._unknown_field(item, name, span, scope)
        elif kind is None and not isinstance(item.type, Unknown):
            is_mapped = self._is_of_elements(item.type, name, span)
            mismatch(
                self.report,
                span,
                item,
                f"there is no field `{name}` here",
                "wants a record",
                help=f"map({span.text})" if is_mapped else None,
                fix=span if is_mapped else None,
            )
        params = {"name": name}
        return Node(graph.FIELD, params, (item,), kind or UNKNOWN, span, scope.site(span))

    @staticmethod
    def _is_of_elements(kind: Type, name: str, span: Span) -> bool:
        """Whether the field that `span` begins with is one of each element of a list."""
        is_first = span.text == f".{name}" or span.text.startswith(f".{name}.")
        return is_first and isinstance(kind, ListOf) and field_type(kind.item, name) is not None

    def _unknown_field(self, item: Node, name: str, span: Span, scope: Scope) -> None:
        kind = without_null(item.type)
        known = [n for n, _ in fields_of(kind)]
        like = did_you_mean(name, known)
        named = kind.name if isinstance(kind, Record) else "image"
        owner = f"`{named}`" if named else "this record"
        origin = self.flows.get(item.site.flow)
        if origin is not None and origin.name != scope.declared.name:
            place = origin.flow.name_span
            note = f"fields are {', '.join(known)}; `{origin.name}` was declared at {place}"
        else:
            note = f"fields are {', '.join(known)}"
        self.report(
            Diagnostic(
                "unknown-field",
                f"{owner} has no field `{name}`",
                Label(span, like.replace("`", "`.", 1) if like else ""),
                note=note,
            )
        )
