"""Models and what arrives at them: files read once, types held against inputs, misfits explained.

Layer 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowlang.diagnostics import Diagnostic, FlowError, Label, Span
from flowlang.plan import graph
from flowlang.plan.arguments import Bound, with_sides
from flowlang.plan.expression import EMPTY
from flowlang.plan.graph import Node
from flowlang.plan.model import Misfit, Packing, fit, gives, input_type, layout_of
from flowlang.plan.onnx import Model, NotAModel, Opener, Port, read_model
from flowlang.plan.ops import OPS, Op
from flowlang.plan.rules import Mismatch
from flowlang.plan.schedule import Given
from flowlang.plan.ties import differing, placed
from flowlang.plan.types import Image, ListOf, Optional, Record, Shape, Tensor, Type, Unknown
from flowlang.syntax.wording import one_line

Report = Callable[[Diagnostic], None]


def mismatch(report: Report, span: Span, item: Node, message: str, label: str, **more: Any) -> None:
    """Report that what `item` gives does not fit at `span`, and show where it comes from."""
    slug = more.pop("slug", "type-mismatch")
    source = Label(item.span, gives(item.type))
    report(Diagnostic(slug, message, Label(span, label), (source,), **more))


def from_part(node: Node, op: Op) -> dict[str, Any]:
    """The help of one whose operator takes a part of what was given, or that with more known.

    A part is a field of a record, or an element; more is known of what is null no longer, or has
    its colour.
    """
    kind, call = node.inputs[0].type, node.span.text
    parts: list[tuple[Type, str]] = []
    if isinstance(kind, Optional) and (otherwise := EMPTY.get(kind.item)):
        is_first = node.inputs[0].op == graph.INPUT
        source = node.span if is_first else node.inputs[0].span  # where the default goes
        stage = "pass" if is_first else one_line(source)
        mended = f"{stage} ?? {otherwise}" + (f" -> {call}" if is_first else "")
        with contextlib.suppress(Mismatch):
            op.rule(kind.item, node.params)
            return {"help": mended, "fix": source}
    elif isinstance(kind, Image) and kind.colour is None:
        parts = [(replace(kind, colour=c), f"{c} -> {call}") for c in ("rgb", "gray")]
    elif isinstance(kind, Record):
        parts = [(part, f".{name} -> {call}") for name, part in kind.fields]
        wanted = [name for name, _ in op.takes.fields] if isinstance(op.takes, Record) else []
        if wanted and len(node.inputs) == 1:  # what else the call names may be left behind
            some = Record(tuple((n, t) for n, t in kind.fields if n in wanted))
            picked = ", ".join(f"{n}: .{n}" for n in wanted)
            parts.append((some, f"{{ {picked} }} -> {call}"))
    elif isinstance(kind, ListOf):
        parts = [(kind.item, f"map({call})")]
        if op.name == "best" and isinstance(kind.item, Record) and kind.item.get("score"):
            return {"help": "top(1, by=.score)", "fix": node.span}
    for part, mended in parts:
        with contextlib.suppress(Mismatch):
            op.rule(part, node.params)
            return {"help": mended, "fix": node.span}
    return {}


def tell_shares(report: Report, node: Node) -> None:
    """A hint where `mean` and `std` are of levels from 0 to 1, as torchvision's are."""
    given = {n: node.params[n] for n in ("mean", "std") if node.params.get(n) is not None}
    if not given.get("std") or not all(0 < share < 1 for share in given["std"]):
        return
    told = (f"{n}=[{', '.join(f'{255 * v:g}' for v in values)}]" for n, values in given.items())
    message = "levels are 0..255 here, and a `std` below 1 is one of levels from 0 to 1"
    place = Label(node.param_spans["std"])
    help_text = ", ".join(told)
    report(Diagnostic("unscaled-input", message, place, help=help_text, severity="hint"))


class ModelFitter:
    """The models of a program, each file read once."""

    def __init__(self, report: Report, opener: Opener | None) -> None:
        self.report = report
        self.opener = opener
        self.models: dict[Path, Model | None] = {}

    @property
    def files(self) -> Iterator[str]:
        """All files that were read, or would be to run the models."""
        for path, model in self.models.items():
            yield str(path)
            yield from map(str, model.weights if model is not None else ())

    def model_of(self, bound: Bound) -> Model | None:
        path = bound.params.get("model")
        if path is None or not bound.is_whole:
            return None
        if path not in self.models:
            self.models[path] = self._read(path, bound.spans["model"])
        return self.models[path]

    def _read(self, path: Path, span: Span) -> Model | None:
        try:
            return read_model(path, self.opener)
        except NotAModel as error:
            message = f"`{path.name}` is no ONNX model: {error}"
        except OSError as error:
            message = f"`{path.name}` cannot be read: {error.strerror}"
        except FlowError as error:
            message = f"`{path.name}` cannot be opened: {error}"
        self.report(Diagnostic("not-a-model", message, Label(span)))
        return None

    def fit(self, node: Node, item: Node, bound: Bound) -> Node:
        """A model's node with its model and type, what arrives held against its inputs."""
        model = self.model_of(bound)
        if model is None:
            return node
        node = replace(node, type=model.output, model=model)
        if len(model.inputs) == 1:
            self._check_fit(node, item, model, None)
        elif isinstance(item.type, Record):
            given = dict(item.type.fields)
            for port in model.inputs:
                if port.name in given:
                    self._check_fit(node, replace(item, type=given[port.name]), model, port.name)
            missing = [f"`{p.name}`" for p in model.inputs if p.name not in given]
            if missing:
                fields = "a field" if len(missing) == 1 else "the fields"
                mismatch(
                    self.report,
                    node.span,
                    item,
                    f"`{model.name}` takes a record with {fields} {' and '.join(missing)}",
                    f"wants {input_type(model)}",
                )
        elif not isinstance(item.type, Unknown):
            mismatch(
                self.report,
                node.span,
                item,
                f"`{model.name}` has {len(model.inputs)} inputs, so it takes a record",
                f"wants {input_type(model)}",
            )
        self._check_ties(node, item, model)
        self.check_batch(model, bound.settings.get("batch"))
        return node

    def _check_fit(self, node: Node, item: Node, model: Model, name: str | None) -> None:
        port = next(p for p in model.inputs if name in (None, p.name))
        found = fit(item.type, port, model)
        levels = [n for n in ("mean", "std") if node.params[n] is not None]
        if isinstance(found, Misfit):
            self._misfit(node, item, model, found)
        elif levels and not isinstance(item.type, Unknown):
            self._check_levels(node, item, model, port, levels)
            tell_shares(self.report, node)
        elif isinstance(found, Packing) and found.dtype != "u8" and _has_levels(item):
            message = f"`{model.name}` takes {found.dtype} and no `normalize` is present"
            call = one_line(node.span)
            self.report(
                Diagnostic(
                    "unscaled-input",
                    f"{message}; values arrive as 0..255",
                    Label(node.span),
                    help=f"normalize(imagenet) -> {call}",
                    severity="hint",
                )
            )

    def _check_ties(self, node: Node, item: Node, model: Model) -> None:
        """Sides of one name in the model are of one length, as far as theirs are known."""
        several = item.type.fields if isinstance(item.type, Record) else ()
        kinds = dict(several) if len(model.inputs) > 1 else {model.inputs[0].name: item.type}
        shapes = {p.name: _shape_at(kinds.get(p.name), p) for p in model.inputs}
        for tie in model.ties:
            lengths = [
                (length, placed(f"`{name}`", axis, len(shapes[name])))
                for name, axis in tie.sides
                if axis < len(shapes[name]) and (length := shapes[name][axis]) is not None
            ]
            if (wanted := differing(tie.symbol, lengths)) is not None:
                message, label = f"`{model.name}` takes {wanted}", f"wants {input_type(model)}"
                mismatch(self.report, node.span, item, message, label, slug="size-mismatch")

    def _check_levels(
        self, node: Node, item: Node, model: Model, port: Port, levels: list[str]
    ) -> None:
        """A model's `mean` and `std` normalize the one image that arrives, and do it once."""
        place = node.param_spans[levels[0]]
        kind = item.type
        slug, message, label = "type-mismatch", "", "`mean` and `std` normalize an image"
        if not isinstance(kind, Image) or len(model.inputs) > 1:
            message = f"`{model.name}` gets no image that could be normalized"
        elif kind.dtype == "f32":
            slug, label = "normalized-twice", "normalized here again"
            message = f"`{model.name}` would get levels normalized twice"
        elif port.dtype == "u8":
            slug, label = "dtype-mismatch", "normalized levels are floats"
            message = f"`{model.name}` takes levels as they are"
        elif kind.channels == 1 and any(len(node.params[n]) > 1 for n in levels):
            slug, label = "channel-mismatch", "three numbers for one channel"
            message = f"`{model.name}` takes a gray image"
        if message:
            note = "`mean` and `std` of a model normalize what arrives"
            mismatch(self.report, place, item, message, label, slug=slug, note=note)

    def _misfit(self, node: Node, item: Node, model: Model, found: Misfit) -> None:
        sizer = _sizer(item, *found.sides) if found.sides else None
        if sizer is not None and found.sides:
            given = sizer.param_spans
            mended = with_sides(OPS[sizer.op], sizer.params, given, *found.sides)
            self.report(
                Diagnostic(
                    found.slug,
                    found.message or "",
                    Label(given.get("size", sizer.span)),
                    (Label(node.span, found.wants),),
                    help=mended,
                    fix=sizer.span,
                )
            )
            return
        message = f"`{model.name}` cannot take what {called(item)} gives"
        call = one_line(node.span)
        mend = f"{found.mend} -> {call}" if found.mend else None
        place: Span | None = node.span
        if isinstance(item.type, ListOf) and _is_element(item.type.item, model):
            mend = f"map({call})"
        elif mend and found.slug == "type-mismatch" and item.op != graph.INPUT:
            if isinstance(item.type, Image) and item.type.dtype == "f32":
                # Levels are resized, and floats are not.
                is_here = item.op == "normalize"
                mend = f"{found.mend} -> {one_line(item.span)}" if is_here else None
                place = item.span
            else:
                mend, place = f"{one_line(item.span)} -> {mend}", None
        mismatch(
            self.report,
            node.span,
            item,
            found.message or message,
            found.wants,
            slug=found.slug,
            help=mend,
            fix=place if mend else None,
        )

    def check_batch(self, model: Model, given: Given | None) -> None:
        """A model whose batch dimension is fixed runs at that size only."""
        size = model.fixed_batch
        if given is None or size is None or set(given.value) == {size}:
            return
        self.report(
            Diagnostic(
                "fixed-batch",
                f"`{model.name}` was exported for batches of {size} only",
                Label(given.span, f"`{model.inputs[0].name}` has a fixed batch dimension"),
                help=f"batch={size}",
                note="export the model with a dynamic first dimension to batch it freely",
            )
        )


def _shape_at(kind: Type | None, port: Port) -> Shape:
    """The shape that an item has as a model's input; nothing where that is not known."""
    if isinstance(kind, Image):
        sides = (kind.height, kind.width)
        return (None, *sides) if layout_of(port) == "chw" else (*sides, None)
    return (kind.shape or ()) if isinstance(kind, Tensor) else ()


def _is_element(kind: Type, model: Model) -> bool:
    """Whether a model takes an element of a list, as it is."""
    port = model.inputs[0]
    return len(model.inputs) == 1 and not isinstance(fit(kind, port, model), Misfit)


def _sizer(node: Node, h: int, w: int) -> Node | None:
    """The operator that gave an image its size and could give it this one.

    It is looked for back through the operators that keep a size.
    """
    while node.op in OPS and OPS[node.op].keeps_size and node.inputs:
        node = node.inputs[0]
    if node.op == "resize" and node.params["fit"] != "shorter":
        return node
    before = node.inputs[0].type if node.op == "crop" else None
    if isinstance(before, Image) and h <= (before.height or h) and w <= (before.width or w):
        return node
    return None


def _has_levels(node: Node) -> bool:
    """Whether a node gives an image whose levels are 0..255."""
    return isinstance(node.type, Image) and node.type.dtype == "u8"


def called(node: Node) -> str:
    """A node as an error message names it."""
    if node.op == graph.INPUT:
        return str(node.params.get("called", "the flow's input"))
    if node.op == graph.RECORD:
        return "this record"
    if node.op == graph.PYTHON:
        return f"`{node.params[graph.FUNCTION].shown}`"
    if node.op in (graph.LITERAL, graph.BINARY, graph.UNARY, graph.ROUTE, graph.FALLBACK):
        text = one_line(node.span)
        return f"`{text}`" if len(text) <= 40 else f"`{text[:37]}...`"
    if node.op == graph.CUT_OUT:
        return "`crop`"
    if node.op == graph.FIELD:
        return f"`.{node.params['name']}`"
    if node.model is not None:
        return f"`{node.model.name}`"
    return f"`{node.op}`"


class Untold(Exception):
    """Which picture a model was given cannot be told."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a model saw: the picture it was given comes from `source` by way of `chain`.

    The source is the bytes that were decoded, or an image; the chain is the image operators between
    it and the model. Both are None where the model was given no image.
    """

    model: Node
    source: Node | None
    chain: tuple[Node, ...] | None


def sight_before(node: Node) -> Sight | None:
    """What the model saw whose answer a node works on; None where no model comes before it.

    Raises Untold where the model is in another graph, and where one of several was asked that saw
    pictures of different makes.
    """
    while node.model is None:
        if node.op in (graph.ROUTE, graph.FALLBACK):
            return _common_sight(node)
        if node.op == graph.INPUT and node.params.get("is_inner"):
            raise Untold
        if not node.inputs:
            return None
        node = _value_before(node)
    return Sight(node, *_picture_before(node.inputs[0]))


def _value_before(node: Node) -> Node:
    """What a node works on: of a field of a record just made, what it was made from."""
    record = node.inputs[0]
    if node.op == graph.FIELD and record.op == graph.RECORD:
        fields: dict[str, Node] = dict(zip(record.params["names"], record.inputs, strict=True))
        return fields.get(node.params["name"], record)
    return record


def _common_sight(control: Node) -> Sight:
    """What all models saw that may have been asked."""
    found = [sight_before(body.output) for body in control.bodies]
    sights = [s for s in found if s is not None]
    items = [body.item for body in control.bodies]
    makes = {_make(s) for s in sights}
    are_alike = len(sights) == len(items) and len(makes) == 1
    if not are_alike or any(s.source is not i for s, i in zip(sights, items, strict=True)):
        raise Untold
    source, chain = _picture_before(control.inputs[0])
    whole = (*chain, *(sights[0].chain or ())) if chain is not None else None
    return Sight(sights[0].model, source, whole)


def _make(sight: Sight) -> object:
    """What must be the same of two models for their answers to mean the same."""
    names = sight.model.model.class_names if sight.model.model is not None else None
    return (repr(names), tuple((n.op, repr(n.params)) for n in sight.chain or ()))


def _picture_before(at: Node) -> tuple[Node | None, tuple[Node, ...] | None]:
    """Where a picture came from, and what was done to it on the way."""
    chain: list[Node] = []
    while at.op == "pass" or (at.op in OPS and OPS[at.op].kind == "image"):
        chain += [at] if at.op != "pass" else []
        is_first, at = at.op == "decode", at.inputs[0]
        if is_first:
            break
    is_source = isinstance(at.type, Image) or (chain and chain[-1].op == "decode")
    return (at, tuple(reversed(chain))) if is_source else (None, None)
