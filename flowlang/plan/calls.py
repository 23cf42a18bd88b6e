"""Calls: mentions of flows, and operators with their arguments, as nodes.

Layer 2. A flow's parameters are constants where the mention gives constants, and values of the
mentioning flow otherwise; an operator's are constants, or Live where a request brings them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan import graph
from flowlang.plan.arguments import Binder, Bound, did_you_mean
from flowlang.plan.expression import is_known, widened
from flowlang.plan.fitting import (
    ModelFitter,
    Untold,
    called,
    from_part,
    mismatch,
    sight_before,
    tell_shares,
)
from flowlang.plan.graph import Live, Node
from flowlang.plan.lines import read_lines
from flowlang.plan.model import gives
from flowlang.plan.module import Declared
from flowlang.plan.onnx import Opener
from flowlang.plan.ops import OPS, Op, Param
from flowlang.plan.rules import Mismatch
from flowlang.plan.schedule import SETTINGS
from flowlang.plan.scope import Scope
from flowlang.plan.types import (
    BOOL,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    Image,
    Record,
    Scalar,
    Tensor,
    Type,
    Unknown,
    as_said,
    fits,
    images_in_frame,
    in_frame,
    is_undecided,
    without_null,
)
from flowlang.plan.unknown import unknown_stage
from flowlang.plan.values import LITERALS, Refused, evaluate
from flowlang.syntax import tree
from flowlang.syntax.scan import RESERVED
from flowlang.syntax.wording import one_line

if TYPE_CHECKING:
    from flowlang.plan.elaborate import Elaborator

_WANTED = {"int": (INT,), "number": (INT, FLOAT), "str": (STR,), "flag": (BOOL,)}


class Calls:
    """What stands for an operator or a flow by its name, for an Elaborator."""

    def __init__(self, elaborator: Elaborator, opener: Opener | None) -> None:
        self._elaborator = elaborator
        self._report = elaborator.report
        self.fitter = ModelFitter(elaborator.report, opener)
        self._pictures: dict[tuple[int, tuple[str, ...]], Node] = {}
        self._bound: dict[tuple[Span, object], Bound] = {}
        self._binders: dict[str, Binder] = {}

    def call(self, call: tree.Call, item: Node, scope: Scope) -> Node:
        name, prefix = str(call.path), call.path.names[0]
        value = scope.value(prefix) if call.args is None else None
        if value is not None:
            for part in call.path.names[1:]:
                value = self._elaborator.field(value, part, call.path.span, scope)
            return value
        declared = scope.module.declared(call.path.names)
        if declared is not None:
            return self._mention(declared, call, item, scope)
        op = OPS.get(name) or scope.module.operator(call.path.names)
        if op is not None:
            return self._operator(call, op, item, scope)
        if call.args is None and name in scope.constants:
            return self._elaborator.literal(call, item, scope)
        is_told = scope.module.is_lost(call.path.names) or {name, prefix} & RESERVED
        if not is_told or prefix == "in":
            self._report(unknown_stage(call, item, scope))
        return self._elaborator.unknown(call.span, item, scope)

    def value_kind(self, call: tree.Call, scope: Scope) -> str | None:
        """`value` or `param`, where a call is the name of one; None where it is a stage."""
        name, module = str(call.path), scope.module
        if call.args is not None:
            return None
        if call.path.names[0] in scope.names():
            return "value"
        if name in OPS or module.declared(call.path.names) or module.operator(call.path.names):
            return None
        is_known = name in scope.constants and scope.constants[name].kind != "unknown"
        return "param" if is_known else None

    def _mention(self, declared: Declared, call: tree.Call, item: Node, scope: Scope) -> Node:
        """A mention of a flow: its declared input is checked, then its nodes follow."""
        flow = declared.flow
        if _is_given_item(declared, call):
            self._report(_no_place(declared, call, call.args[0]))  # type: ignore[index]
            return self._elaborator.unknown(call.span, item, scope)
        if flow.signature:
            wanted = as_said(declared.module.types.resolve(flow.signature[0]), item.type)
            if not fits(item.type, wanted):
                mismatch(
                    self._report,
                    call.span,
                    item,
                    f"`{call.path}` cannot take what {called(item)} gives",
                    f"wants {wanted}",
                )
                item = replace(item, type=wanted)
            item = widened(item, wanted)
        inner = Scope(declared, constants=declared.module.constants, mention=scope)
        self._pass_arguments(declared, call, item, scope, inner)
        return self._elaborator.flow(declared, item, inner)

    def known_arguments(self, declared: Declared, call: tree.Call, scope: Scope) -> Scope:
        """A mentioned flow's scope with those of its arguments that are known by themselves."""
        inner = Scope(declared, constants=declared.module.constants)
        names = [given.name for given in declared.flow.inputs]
        given = {arg.name: arg.value for arg in call.args or () if arg.name is not None}
        places = (arg.value for arg in call.args or () if arg.name is None)
        given |= zip((n for n in names if n not in given), places, strict=False)
        for wanted in declared.flow.inputs:
            expr = given.get(wanted.name)
            value = self._known(expr, scope) if expr is not None else None
            if expr is None and wanted.default is not None:
                value = self._known(wanted.default, inner)
            if value is not None:
                inner.put(wanted.name, value)
        return inner

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
                self._report(_no_place(declared, call, arg))
                continue
            if name in given:
                message = f"`{name}` of `{call.path}` is given twice"
                first = Label(given[name].span, "first here")
                self._report(Diagnostic("given-twice", message, Label(arg.span), (first,)))
                continue
            free.remove(name)
            given[name] = arg
        values: dict[str, Node] = {}
        for name, wanted in inputs.items():
            default = self.default(declared, wanted, item)
            if name in given:
                value = self._argument(declared, wanted, given[name].value, item, scope)
            elif default is not None:
                value = default
            else:
                message = f"`{call.path}` needs its `{name}`"
                note = f"`{name}` is {wanted.type.span.text}"
                self._report(Diagnostic("missing-parameter", message, Label(call.span), note=note))
                value = self._elaborator.unknown(call.span, item, scope)
            values[name] = value
        self._set(inner, values)

    def default(self, declared: Declared, wanted: tree.Input, item: Node) -> Node | None:
        """The default of a flow's parameter, or None where it has none."""
        if wanted.default is None:
            return None
        scope = Scope(declared, constants=declared.module.constants)
        value = self._argument(declared, wanted, wanted.default, item, scope)
        if value.op == "unknown" or is_known(value):
            return value
        message = f"the default of `{wanted.name}` must be known before anything runs"
        self._report(Diagnostic("not-a-constant", message, Label(wanted.default.span)))
        return self._elaborator.unknown(wanted.default.span, item, scope)

    def set_defaults(self, declared: Declared, item: Node, scope: Scope) -> None:
        """Give a flow that nobody mentions its defaults, to check it by itself.

        A parameter that has none is of its type, and of no value that anything could be told.
        """
        values: dict[str, Node] = {}
        for given in declared.flow.inputs:
            value = self.default(declared, given, item)
            if value is None:
                kind = declared.module.types.resolve(given.type)
                value = Node("unknown", {}, (), kind, given.span, scope.site(given.span))
            values[given.name] = value
        self._set(scope, values)

    @staticmethod
    def _set(inner: Scope, values: Mapping[str, Node]) -> None:
        """Parameters of a flow: those that are literals tell its mentions apart."""
        for name, value in values.items():
            inner.put(name, value)
        known = ((n, v) for n, v in values.items() if v.op == graph.LITERAL)
        inner.arguments = tuple((n, v.params["value"]) for n, v in known)

    def _argument(
        self, declared: Declared, wanted: tree.Input, expr: tree.Expr, item: Node, scope: Scope
    ) -> Node:
        """What a flow's parameter is given, wholly of its type."""
        value = self._known(expr, scope) or self._elaborator.operand(expr, item, scope)
        kind = as_said(declared.module.types.resolve(wanted.type), value.type)
        if value.op == "unknown":
            return value
        if fits(value.type, kind):
            return widened(value, kind)
        message = f"`{wanted.name}` of `{declared.flow.name}` is {kind}, not {value.type}"
        self._report(Diagnostic("wrong-kind", message, Label(expr.span)))
        return self._elaborator.unknown(expr.span, item, scope)

    def _known(self, expr: tree.Expr, scope: Scope) -> Node | None:
        """The value of an expression that is known before anything runs, or None."""
        if scope.is_live(expr):
            return None
        try:
            given = evaluate(expr, scope.constants)
        except Refused:
            return None
        return self._elaborator.constant(given, scope) if given.kind in LITERALS else None

    def bound_at(self, call: tree.Call) -> Bound | None:
        """The arguments of a call that has been met."""
        return next((b for (span, _), b in self._bound.items() if span == call.span), None)

    def bind(self, call: tree.Call, op: Op, scope: Scope) -> Bound:
        """The arguments of a call, bound once however often its flow is mentioned alike."""
        key = (call.span, scope.arguments)
        if key not in self._bound:
            module = scope.module
            if module.prefix not in self._binders:
                self._binders[module.prefix] = Binder(module.folder, self._report)
            self._bound[key] = self._binders[module.prefix].bind(call, op, scope)
        return self._bound[key]

    def bind_quietly(self, call: tree.Call, op: Op, scope: Scope) -> Bound:
        """The arguments of a call as far as they are known now; what is wrong is told later."""
        return Binder(scope.module.folder, lambda told: None).bind(call, op, scope)

    def _operator(self, call: tree.Call, op: Op, item: Node, scope: Scope) -> Node:
        if op.function is not None and op.function.problem is not None:
            self._report(op.function.problem)
            return self._elaborator.unknown(call.span, item, scope)
        if op.name == "crop" and self._lacks_image(call, item, scope):
            return self._elaborator.unknown(call.span, item, scope)
        bound = self.bind(call, op, scope)
        site = scope.site(call.span)
        if bound.settings:
            self._elaborator.settings.put(site, bound.settings)
        if not bound.is_whole:
            return self._elaborator.unknown(call.span, item, scope)
        node = Node(op.name, dict(bound.params), (item,), UNKNOWN, call.span, site, bound.spans)
        node = self._with_live(node, op, bound, item, scope)
        if op.name in ("map", "filter", "top") and (bound.bodies or op.name == "top"):
            return self._elaborator.control.over_list(node, op, bound, scope)
        if op.kind == "model":
            return self.fitter.fit(node, item, bound)
        if op.kind == "image" and op.name != "decode" and isinstance(item.type, Unknown):
            return node
        return self._framed(self.typed(node, op), scope)

    def _lacks_image(self, call: tree.Call, item: Node, scope: Scope) -> bool:
        """Whether a box is to be cut out of no image. Reports it, with one that it may lie in."""
        place, field = _place_in(item.type)
        args = [arg.value for arg in call.args or ()]
        is_swapped = field is not None and any(arg.span.text == f".{field}" for arg in args)
        if place is None or (not is_swapped and any(map(scope.is_live, args))):
            return False
        values = {name: scope.value(name) for name in sorted(scope.names())}
        images = {n: v.type for n, v in values.items() if v and isinstance(v.type, Image)}
        of_frame = (n for n, kind in images.items() if kind.frame == place.frame)
        name = next(iter([*of_frame, *images]), None)
        lost = next((a.span.text for a in args if isinstance(a, tree.Call) and not a.args), None)
        before = f".{field} -> " if field else ""
        note = f"let picture = in -> decode ... {before}crop(picture)"
        if lost is not None:
            note = f"there is no value `{lost}` here: let {lost} = in -> decode names one"
        self._report(
            Diagnostic(
                "missing-parameter",
                f"`crop` of a {place} needs the image that it lies in",
                Label(call.span),
                (Label(item.span, f"gives {item.type}"),),
                help=f"{before}crop({name})" if name else None,
                note=None if name else note,
                fix=call.span if name else None,
            )
        )
        return True

    def _framed(self, node: Node, scope: Scope) -> Node:
        """`decode`, with the picture it gives told from others: by where the file comes from."""
        if node.op != "decode" or not isinstance(node.type, Image):
            return node
        source, fields = scope.origin(node.inputs[0])
        frame = (id(source), fields)
        self._pictures[frame] = source  # an `id` counts for as long as there is the node
        return replace(node, type=replace(node.type, frame=frame))

    def typed(self, node: Node, op: Op) -> Node:
        """A node with the type its operator gives, or what stands for a wrong one."""
        item = node.inputs[0]
        try:
            kind = op.rule(item.type, node.params)
        except Mismatch as misfit:
            mismatch(
                self._report,
                node.span,
                item,
                f"`{op.name}` cannot take what {called(item)} gives",
                f"wants {misfit.wants}",
                **from_part(node, op),
            )
            return Node("unknown", {}, (item,), UNKNOWN, node.span, node.site)
        self._check_lines(node)
        if op.name == "normalize":
            tell_shares(self._report, node)
        if op.name == "crop" and isinstance(node.params["image"], Live):
            return self._cut_out(node, kind)
        if op.name == "boxes":
            return self._located(node, kind)
        if op.function is not None:
            params = {**node.params, graph.FUNCTION: op.function}
            inputs = (widened(item, op.function.takes), *node.inputs[1:])
            if is_undecided(item.type):
                self._tell_undecided(node, op)
            kind = images_in_frame(kind, object())  # what it has moved nobody knows
            return replace(node, op=graph.PYTHON, params=params, inputs=inputs, type=kind)
        return replace(node, type=kind)

    def _check_lines(self, node: Node) -> None:
        """A word list has a line for each class, where it is known how many there are."""
        name = "keys" if node.op == "ctc" else "names"
        path, kind = node.params.get(name), node.inputs[0].type
        classes = kind.shape[-1] if isinstance(kind, Tensor) and kind.shape else None
        if classes is None or node.op == "boxes" or not isinstance(path, Path):
            return
        lines = len(read_lines(path))
        wanted = classes - 1 if node.op == "ctc" else classes  # its class 0 is none
        if lines >= wanted:
            return
        self._report(
            Diagnostic(
                "too-few-lines",
                f"`{path.name}` names {lines} of {wanted} classes",
                Label(node.param_spans[name]),
                (Label(node.inputs[0].span, f"gives {kind}"),),
                severity="error" if node.op == "ctc" else "hint",
            )
        )

    def _tell_undecided(self, node: Node, op: Op) -> None:
        call = one_line(node.span)
        self._report(
            Diagnostic(
                "undecided-colour",
                f"`{op.name}` gets channels in an order nobody decided",
                Label(node.span),
                (Label(node.inputs[0].span, gives(node.inputs[0].type)),),
                help=f"rgb -> {call}" if isinstance(node.inputs[0].type, Image) else None,
                severity="hint",
            )
        )

    def _with_live(self, node: Node, op: Op, bound: Bound, item: Node, scope: Scope) -> Node:
        """A node that also gets the values which each request brings for its parameters."""
        for name, expr in bound.live.items():
            param = op.param(name)
            value = self._elaborator.operand(expr, item, scope)
            self._check_live(op, param, expr, value)
            if op.function is not None and param is not None and param.kind == "value":
                value = widened(value, param.type)
            node.params[name] = Live(len(node.inputs))  # type: ignore[index]
            node = replace(node, inputs=(*node.inputs, value))
        return node

    def _check_live(self, op: Op, param: Param | None, expr: tree.Expr, value: Node) -> None:
        wanted = _WANTED.get(param.kind) if param else None
        kind = value.type
        if param is None or isinstance(kind, Unknown) or (wanted and kind in wanted):
            return
        is_image = op.name == "crop" and isinstance(kind, Image)
        if param.kind == "value" and (is_image or (op.function and fits(kind, param.type))):
            return
        words = {"int": "a whole number", "number": "a number"}
        said = words.get(param.kind, param.kind)
        if param.kind == "value":
            said = str(param.type) if op.function else "an image"
        message = f"`{param.name}` of `{op.name}` is {said}, and `{expr.span.text}` gives {kind}"
        self._report(Diagnostic("wrong-kind", message, Label(expr.span)))

    def _cut_out(self, node: Node, kind: Type) -> Node:
        """`.box -> crop(img)`: part of an image, which lies in the frame of the box."""
        box, image = node.inputs
        found = image.type if isinstance(image.type, Image) else Image()
        here = without_null(box.type)
        frame = here.frame if isinstance(here, Scalar) else None
        if frame is not None and found.frame is not None and frame != found.frame:
            name = node.param_spans["image"].text
            self._report(
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
        try:
            sight = sight_before(node.inputs[0])
        except Untold:
            self._report(
                Diagnostic(
                    "frame-mismatch",
                    "which picture these boxes lie in cannot be told",
                    Label(node.span, "answers in coordinates of what the model saw"),
                    note="`boxes` stands behind its model, in the same way out of an `if` or `??`",
                )
            )
            sight = None
        source, chain = (sight.source, sight.chain) if sight is not None else (None, None)
        names = node.params["names"]
        if names is None and sight is not None and sight.model.model is not None:
            names = sight.model.model.class_names
            self._check_head(node, names)
        params = {**node.params, "chain": chain, "names": names}
        if source is None:
            return replace(node, params=params, type=kind)
        images = [n.type for n in chain or () if isinstance(n.type, Image)]
        images += [source.type] if isinstance(source.type, Image) else []
        frame = next((i.frame for i in images if i.frame is not None), None)
        inputs = (*node.inputs, source)
        return replace(node, params=params, inputs=inputs, type=in_frame(kind, frame))

    def _check_head(self, node: Node, names: list[str] | None) -> None:
        """Whether the classes that the exporter tells are those that a head like this one has.

        YOLOv5 gives an objectness before them and YOLOv8 does not: read as the other, every class
        is off by one, and nothing fails.
        """
        head, kind = node.params["head"], node.inputs[0].type
        own = {"yolov5": 5, "yolov8": 4}.get(head)
        if own is None or names is None or not isinstance(kind, Tensor) or not kind.shape:
            return
        other = 9 - own
        if len(names) + own in kind.shape or len(names) + other not in kind.shape:
            return
        meant = "yolov8" if head == "yolov5" else "yolov5"
        place, count = node.param_spans.get("head", node.span), len(names)
        mismatch(
            self._report,
            place,
            node.inputs[0],
            f"this is no {head}: of {count + other} numbers for a place, {count} are classes",
            f"has {own} before the classes",
            help=meant,
            fix=place,
        )


def _place_in(kind: Type) -> tuple[Scalar | None, str | None]:
    """The box or quad that a type is, or has in a field; and the name of that."""
    kind = without_null(kind)
    parts = kind.fields if isinstance(kind, Record) else ()
    if any(isinstance(part, Image) for _, part in parts):
        return None, None  # which may be what is meant
    for name, part in ((None, kind), *parts):
        if isinstance(part, Scalar) and part.name in ("box", "quad"):
            return part, name
    return None, None


def _is_given_item(declared: Declared, call: tree.Call) -> bool:
    """Whether a flow without parameters is called like a function, on what should flow into it."""
    args = call.args or ()
    is_item = len(args) == 1 and args[0].name is None
    return (
        is_item
        and not declared.flow.inputs
        and isinstance(args[0].value, (tree.Call, tree.Current, tree.Pipeline))
    )


def _no_place(declared: Declared, call: tree.Call, arg: tree.Arg) -> Diagnostic:
    known = [given.name for given in declared.flow.inputs]
    if arg.name is None:
        message = f"`{call.path}` has no place for this argument"
        note = f"parameters are {', '.join(known)}" if known else f"`{call.path}` takes none"
        mended = f"{arg.span.text} -> {call.path}" if _is_given_item(declared, call) else None
        fix = call.span if mended else None
        return Diagnostic(
            "too-many-arguments", message, Label(arg.span), help=mended, note=note, fix=fix
        )
    span = Span(arg.span.source, arg.span.start, arg.span.start + len(arg.name))
    message = f"`{call.path}` has no parameter `{arg.name}`"
    help_text = did_you_mean(arg.name, known)
    if help_text is None and arg.name in SETTINGS:
        help_text = f"in a schedule block: schedule {{ {call.path}({arg.span.text}) }}"
    return Diagnostic("unknown-parameter", message, Label(span), help=help_text)
