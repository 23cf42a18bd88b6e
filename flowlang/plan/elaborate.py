"""Expressions to plan nodes: every stage applied to the item that arrives at it.

Layer 2. Named flows are inlined where they are mentioned; their operators keep the site where they
are written, so that all mentions share one physical thing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan import graph
from flowlang.plan.arguments import Binder, Bound, Report, did_you_mean
from flowlang.plan.control import Control
from flowlang.plan.expression import Unsuited, binary_type, field_type, fields_of, unary_type
from flowlang.plan.extent import field_value
from flowlang.plan.fitting import ModelFitter, called, mismatch, shape_source
from flowlang.plan.graph import Live, Node
from flowlang.plan.model import input_type
from flowlang.plan.module import Declared, Module
from flowlang.plan.onnx import Opener
from flowlang.plan.ops import OPS, Mismatch, Op, Param
from flowlang.plan.schedule import COPIES, Given, Settings
from flowlang.plan.scope import Scope
from flowlang.plan.types import (
    BOOL,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    Image,
    ListOf,
    Optional,
    Record,
    Scalar,
    Type,
    Unknown,
    fits,
    in_frame,
    unify,
    why_vast,
    without_null,
)
from flowlang.plan.values import Constant, Refused, evaluate
from flowlang.syntax import tree
from flowlang.syntax.scan import RESERVED

_LITERALS = {"int": INT, "float": FLOAT, "percent": FLOAT, "str": STR, "bool": BOOL}
_WANTED = {"int": (INT,), "number": (INT, FLOAT), "str": (STR,), "flag": (BOOL,)}


class Elaborator:
    """Makes nodes, collects what is wrong, and fills the table of settings.

    `seen` has every expression that was applied, with the type it gives.
    """

    def __init__(
        self, flows: Mapping[str, Declared], report: Report, opener: Opener | None
    ) -> None:
        self.flows = flows
        self.report = report
        self.fitter = ModelFitter(report, opener)
        self.settings = Settings()
        self.seen: list[tuple[Span, Type]] = []
        self.control = Control(self)
        self._frames = itertools.count(1)
        self._bound: dict[tuple[Span, object], Bound] = {}
        self._binders: dict[str, Binder] = {}

    # Flows

    def flow(self, declared: Declared, item: Node, scope: Scope) -> Node:
        """The nodes of a flow, its item arriving from `item`, its parameters set in `scope`."""
        flow = declared.flow
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
                            f"`{let.name}` is declared twice in `{flow.name}`",
                            Label(let.name_span),
                        )
                    )
                scope.values[let.name] = self.apply(let.value, item, scope)
                self.seen.append((let.name_span, scope.values[let.name].type))
            result = self.apply(flow.body.result, item, scope)
        if flow.signature:
            wanted = declared.module.types.resolve(flow.signature[1])
            if not fits(result.type, wanted):
                mismatch(
                    self.report,
                    flow.signature[1].span,
                    result,
                    f"`{flow.name}` is declared to give `{wanted}`",
                    f"but it ends with {called(result)}",
                )
        return result

    def head_type(self, expr: tree.Expr, declared: Declared) -> Type:
        """What a stage takes where nothing arrives yet: the type of its first operator."""
        module = declared.module
        if isinstance(expr, tree.Pipeline):
            return self.head_type(expr.steps[0], declared)
        if isinstance(expr, (tree.Group, tree.Repeat)):
            inner = expr.value if isinstance(expr, tree.Group) else expr.stage
            return self.head_type(inner, declared)
        if isinstance(expr, tree.Fallback):
            return self.head_type(expr.choices[0], declared)
        if isinstance(expr, tree.Record):
            branches = [f.value for f in expr.fields if f.value is not None]
            return self.head_type(branches[0], declared) if branches else UNKNOWN
        if isinstance(expr, tree.Ascribe):
            return module.types.resolve(expr.type)
        if not isinstance(expr, tree.Call):
            return UNKNOWN
        mentioned = module.declared(expr.path.names)
        if mentioned is not None:
            return self.flow_input(mentioned)
        op = OPS.get(str(expr.path)) or module.operator(expr.path.names)
        if op is not None and op.kind == "model":
            scope = Scope(declared, constants=module.constants)
            model = self.fitter.model_of(self._bind(expr, op, scope))
            return input_type(model) if model else UNKNOWN
        return op.takes if op else UNKNOWN

    def flow_input(self, declared: Declared) -> Type:
        """The type of item a flow takes: declared, or what its first operator takes."""
        flow = declared.flow
        if flow.signature:
            return declared.module.types.resolve(flow.signature[0])
        if not isinstance(flow.body, tree.Body):
            return self.head_type(flow.body, declared)
        for value in (*(let.value for let in flow.body.lets), flow.body.result):
            steps = value.steps if isinstance(value, tree.Pipeline) else ()
            if len(steps) > 1 and steps[0].span.text == "in":
                return self.head_type(steps[1], declared)
        return UNKNOWN

    # Expressions

    def apply(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """The node that gives what `expr` makes of `item`."""
        node = self._apply(expr, item, scope)
        self.seen.append((expr.span, node.type))
        return node

    def _apply(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
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
        return self._literal(expr, item, scope)

    def operand(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        """What an expression gives where a value is wanted: there, a param's name is its value."""
        inner = expr
        while isinstance(inner, tree.Group):
            inner = inner.value
        if isinstance(inner, tree.Call) and inner.args is None:
            name = str(inner.path)
            if scope.value(name) is None and name in scope.constants:
                return self._literal(inner, item, scope)
        return self.apply(expr, item, scope)

    def unknown(self, span: Span, item: Node, scope: Scope) -> Node:
        """What stands for something that has been complained about."""
        return Node("unknown", {}, (item,), UNKNOWN, span, scope.site(span))

    def _ascribe(self, expr: tree.Ascribe, item: Node, scope: Scope) -> Node:
        wanted = scope.module.types.resolve(expr.type)
        if not fits(item.type, wanted):
            mismatch(self.report, expr.span, item, f"this is not `{wanted}`", f"wants {wanted}")
        elif isinstance(item.type, Unknown):
            return replace(item, type=wanted)
        return item

    def _literal(self, expr: tree.Expr, item: Node, scope: Scope) -> Node:
        try:
            given = evaluate(expr, scope.constants)
            if given.kind in _LITERALS:
                return self.constant(given, scope)
        except Refused as refused:
            if refused.diagnostic is None:
                return self.unknown(expr.span, item, scope)
        message = f"`{expr.span.text}` is a value, and a stage belongs here"
        self.report(Diagnostic("not-a-stage", message, Label(expr.span)))
        return self.unknown(expr.span, item, scope)

    def constant(self, given: Constant, scope: Scope) -> Node:
        """A node for a value that is known before anything runs."""
        kind: Type = _LITERALS[given.kind]
        params = {"value": given.value}
        return Node(graph.LITERAL, params, (), kind, given.span, scope.site(given.span))

    def _binary(self, expr: tree.Binary, item: Node, scope: Scope) -> Node:
        sides = tuple(self.operand(e, item, scope) for e in (expr.left, expr.right))
        kind: Type = UNKNOWN
        try:
            kind = binary_type(expr.operator, sides[0].type, sides[1].type)
        except Unsuited as error:
            self._unsuited(
                (expr.left, expr.right)[error.operand], sides[error.operand], error, expr
            )
        params = {"operator": expr.operator}
        return Node(graph.BINARY, params, sides, kind, expr.span, scope.site(expr.span))

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
        default = {INT: "0", FLOAT: "0.0", STR: '""', BOOL: "false"}
        instead = default.get(without_null(node.type)) if may_be_null else None
        self.report(
            Diagnostic(
                "type-mismatch",
                f"`{whole.operator}` cannot take `{side.span.text}`",
                Label(side.span, f"gives {what}, and `{whole.operator}` {error.wants}"),
                help=f"({side.span.text} ?? {instead})" if instead else None,
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
        return Node(
            graph.LIST, {}, parts, ListOf(kind or UNKNOWN), expr.span, scope.site(expr.span)
        )

    def _repeat(self, expr: tree.Repeat, item: Node, scope: Scope) -> Node:
        inner = expr.stage
        while isinstance(inner, tree.Group):
            inner = inner.value
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
        for part in expr.fields:
            if part.name is None:
                if isinstance(item.type, Record):
                    for name, _ in item.type.fields:
                        fields[name] = self.field(item, name, part.span, scope)
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
        params = {"names": tuple(fields)}
        inputs = tuple(fields.values())
        return Node(graph.RECORD, params, inputs, kind, expr.span, scope.site(expr.span))

    def _fields(self, expr: tree.Current, item: Node, scope: Scope) -> Node:
        for name in expr.fields:
            item = self.field(item, name, expr.span, scope)
        return item

    def field(self, item: Node, name: str, span: Span, scope: Scope) -> Node:
        """The node that picks a field of what `item` gives."""
        kind = field_type(item.type, name)
        if kind is None and fields_of(without_null(item.type)):
            self._unknown_field(item, name, span)
        elif kind is None and not isinstance(item.type, Unknown):
            mismatch(self.report, span, item, f"there is no field `{name}` here", "wants a record")
        params = {"name": name}
        return Node(graph.FIELD, params, (item,), kind or UNKNOWN, span, scope.site(span))

    def _unknown_field(self, item: Node, name: str, span: Span) -> None:
        kind = without_null(item.type)
        known = [n for n, _ in fields_of(kind)]
        like = did_you_mean(name, known)
        named = kind.name if isinstance(kind, Record) else "image"
        owner = f"`{named}`" if named else "this record"
        self.report(
            Diagnostic(
                "unknown-field",
                f"{owner} has no field `{name}`",
                Label(span, like.replace("`", "`.", 1) if like else ""),
                note=f"fields are {', '.join(known)}",
            )
        )

    # Calls

    def _call(self, call: tree.Call, item: Node, scope: Scope) -> Node:
        name, prefix = str(call.path), call.path.names[0]
        value = scope.value(prefix) if call.args is None else None
        if value is not None:
            for part in call.path.names[1:]:
                value = self.field(value, part, call.path.span, scope)
            return value
        declared = scope.module.declared(call.path.names)
        if declared is not None:
            return self._mention(declared, call, item, scope)
        op = OPS.get(name) or scope.module.operator(call.path.names)
        if op is not None:
            return self._operator(call, op, item, scope)
        is_told = scope.module.is_lost(call.path.names) or {name, prefix} & RESERVED
        if not is_told or prefix == "in":
            self.report(self._unknown_stage(call, scope))
        return self.unknown(call.span, item, scope)

    def _unknown_stage(self, call: tree.Call, scope: Scope) -> Diagnostic:
        name, place = str(call.path), Label(call.path.span)
        values = scope.names()
        if name in values:
            message = f"`{name}` is a value, and takes no arguments"
            return Diagnostic("not-a-stage", message, place, help=name, fix=call.span)
        if name in scope.constants:
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
        known = [*OPS, *scope.module.callable_names(), *values]
        like = did_you_mean(name, [k for k in known if k != "in"])
        message = f"there is no operator or flow named `{name}`"
        return Diagnostic("unknown-operator", message, place, help=like)

    def _mention(self, declared: Declared, call: tree.Call, item: Node, scope: Scope) -> Node:
        """A mention of a flow: its declared input is checked, then its nodes follow."""
        flow = declared.flow
        if flow.signature:
            wanted = declared.module.types.resolve(flow.signature[0])
            if not fits(item.type, wanted):
                mismatch(
                    self.report,
                    call.span,
                    item,
                    f"`{call.path}` cannot take what {called(item)} gives",
                    f"wants {wanted}",
                )
                item = replace(item, type=wanted)
        inner = Scope(declared, constants=declared.module.constants)
        self._pass_arguments(declared, call, item, scope, inner)
        return self.flow(declared, item, inner)

    def _pass_arguments(
        self, declared: Declared, call: tree.Call, item: Node, scope: Scope, inner: Scope
    ) -> None:
        """Set the parameters of a mentioned flow: constants, or values of the mentioning one."""
        inputs = {given.name: given for given in declared.flow.inputs}
        free = list(inputs)
        given: dict[str, tree.Arg] = {}
        for arg in call.args or ():
            name = arg.name if arg.name is not None else next(iter(free), "")
            if name not in inputs:
                self.report(_no_place(declared, call, arg))
                continue
            if name in given:
                message = f"`{name}` of `{call.path}` is given twice"
                first = Label(given[name].span, "first here")
                self.report(Diagnostic("given-twice", message, Label(arg.span), (first,)))
                continue
            free.remove(name)
            given[name] = arg
        constants: dict[str, Constant] = {}
        for name, wanted in inputs.items():
            default = self.default(declared, wanted, item)
            if name in given:
                value = self.operand(given[name].value, item, scope)
                self._check_argument(declared, wanted, value, given[name])
            elif default is not None:
                value = default
            else:
                message = f"`{call.path}` needs its `{name}`"
                self.report(Diagnostic("missing-parameter", message, Label(call.span)))
                value = self.unknown(call.span, item, scope)
            inner.values[name] = value
            if value.op == graph.LITERAL:
                kind = next(k for k, t in _LITERALS.items() if t == value.type)
                constants[name] = Constant(kind, value.params["value"], value.span)
        inner.constants = {**inner.constants, **constants}
        inner.arguments = tuple((n, c.value) for n, c in constants.items())

    def default(self, declared: Declared, wanted: tree.Input, item: Node) -> Node | None:
        """The default of a flow's parameter, or None where it has none."""
        if wanted.default is None:
            return None
        scope = Scope(declared, constants=declared.module.constants)
        value = self.operand(wanted.default, item, scope)
        self._check_argument(declared, wanted, value, None)
        if value.op not in (graph.LITERAL, "unknown"):
            message = f"the default of `{wanted.name}` must be known before anything runs"
            self.report(Diagnostic("not-a-constant", message, Label(wanted.default.span)))
        return value

    def _check_argument(
        self, declared: Declared, wanted: tree.Input, value: Node, arg: tree.Arg | None
    ) -> None:
        kind = declared.module.types.resolve(wanted.type)
        if not fits(value.type, kind):
            place = arg.value.span if arg is not None else wanted.span
            message = f"`{wanted.name}` of `{declared.flow.name}` is {kind}, not {value.type}"
            self.report(Diagnostic("wrong-kind", message, Label(place)))

    def bound_at(self, call: tree.Call) -> Bound | None:
        """The arguments of a call that has been met."""
        return next((b for (span, _), b in self._bound.items() if span == call.span), None)

    def _bind(self, call: tree.Call, op: Op, scope: Scope) -> Bound:
        """The arguments of a call, bound once however often its flow is mentioned alike."""
        key = (call.span, scope.arguments)
        if key not in self._bound:
            module = scope.module
            if module.prefix not in self._binders:
                self._binders[module.prefix] = Binder(module.folder, self.report)
            self._bound[key] = self._binders[module.prefix].bind(call, op, scope)
        return self._bound[key]

    def _operator(self, call: tree.Call, op: Op, item: Node, scope: Scope) -> Node:
        bound = self._bind(call, op, scope)
        site = scope.site(call.span)
        if bound.settings:
            self.settings.put(site, bound.settings)
        if not bound.is_whole:
            return self.unknown(call.span, item, scope)
        node = Node(op.name, dict(bound.params), (item,), UNKNOWN, call.span, site, bound.spans)
        node = self._with_live(node, op, bound, item, scope)
        if op.name in ("map", "filter", "top") and (bound.bodies or op.name == "top"):
            return self.control.over_list(node, op, bound, scope)
        if op.kind == "model":
            return self.fitter.fit(node, item, bound)
        if op.kind == "image" and op.name != "decode" and isinstance(item.type, Unknown):
            return node
        return self.typed(node, op)

    def typed(self, node: Node, op: Op) -> Node:
        """A node with the type its operator gives, or what stands for a wrong one."""
        item = node.inputs[0]
        try:
            kind = op.rule(item.type, node.params)
        except Mismatch as misfit:
            mismatch(
                self.report,
                node.span,
                item,
                f"`{op.name}` cannot take what {called(item)} gives",
                f"wants {misfit.wants}",
            )
            return Node("unknown", {}, (item,), UNKNOWN, node.span, node.site)
        if op.name == "decode" and isinstance(kind, Image):
            return replace(node, type=replace(kind, frame=next(self._frames)))
        if op.name == "crop" and isinstance(node.params["image"], Live):
            return self._cut_out(node, kind)
        if op.name == "boxes":
            return self._located(node, kind)
        if op.function is not None:
            params = {**node.params, "function": op.function}
            return replace(node, op=graph.PYTHON, params=params, type=kind)
        return replace(node, type=kind)

    def _with_live(self, node: Node, op: Op, bound: Bound, item: Node, scope: Scope) -> Node:
        """A node that also gets the values which each request brings for its parameters."""
        for name, expr in bound.live.items():
            value = self.operand(expr, item, scope)
            self._check_live(op, op.param(name), expr, value)
            node.params[name] = Live(len(node.inputs))  # type: ignore[index]
            node = replace(node, inputs=(*node.inputs, value))
        return node

    def _check_live(self, op: Op, param: Param | None, expr: tree.Expr, value: Node) -> None:
        wanted = _WANTED.get(param.kind) if param else None
        kind = value.type
        if param is None or isinstance(kind, Unknown) or (wanted and kind in wanted):
            return
        if param.kind == "value" and (op.name != "crop" or isinstance(kind, Image)):
            return
        words = {"value": "an image", "int": "a whole number", "number": "a number"}
        said = words.get(param.kind, param.kind)
        message = f"`{param.name}` of `{op.name}` is {said}, and `{expr.span.text}` gives {kind}"
        self.report(Diagnostic("wrong-kind", message, Label(expr.span)))

    def _cut_out(self, node: Node, kind: Type) -> Node:
        """`.box -> crop(img)`: part of an image, which lies in the frame of the box."""
        box, image = node.inputs
        found = image.type if isinstance(image.type, Image) else Image()
        here = without_null(box.type)
        frame = here.frame if isinstance(here, Scalar) else None
        if frame is not None and found.frame is not None and frame != found.frame:
            name = node.param_spans["image"].text
            self.report(
                Diagnostic(
                    "frame-mismatch",
                    f"these boxes lie in another picture than `{name}`",
                    Label(node.param_spans["image"]),
                    (Label(box.span, "found in another picture"),),
                    note="crop from the picture that the detector was given",
                )
            )
        params = {n: v for n, v in node.params.items() if n in ("upright",)}
        kind = replace(found, height=None, width=None)
        return replace(node, op=graph.CUT_OUT, params=params, type=kind)

    def _located(self, node: Node, kind: Type) -> Node:
        """`boxes`, with the picture that the model was given, to answer in its coordinates."""
        source, chain = shape_source(node.inputs[0])
        params = {**node.params, "chain": chain}
        if source is None:
            return replace(node, params=params, type=kind)
        images = [n.type for n in chain or () if isinstance(n.type, Image)]
        images += [source.type] if isinstance(source.type, Image) else []
        frame = next((i.frame for i in images if i.frame is not None), None)
        inputs = (*node.inputs, source)
        return replace(node, params=params, inputs=inputs, type=in_frame(kind, frame))


def _no_place(declared: Declared, call: tree.Call, arg: tree.Arg) -> Diagnostic:
    known = [given.name for given in declared.flow.inputs]
    if arg.name is None:
        message = f"`{call.path}` has no place for this argument"
        note = f"parameters are {', '.join(known)}" if known else f"`{call.path}` takes none"
        return Diagnostic("too-many-arguments", message, Label(arg.span), note=note)
    span = Span(arg.span.source, arg.span.start, arg.span.start + len(arg.name))
    message = f"`{call.path}` has no parameter `{arg.name}`"
    help_text = did_you_mean(arg.name, known)
    return Diagnostic("unknown-parameter", message, Label(span), help=help_text)
