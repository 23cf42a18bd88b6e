"""What is said of the thing under the cursor: its type, its signature, its documentation.

Layer 4. The text is Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowlang.diagnostics import FlowError
from flowlang.doc import flow_text, operator_markdown, parameter_text, setting_text
from flowlang.editor.document import Document
from flowlang.editor.nodes import (
    Argument,
    Declaration,
    File,
    Flag,
    Member,
    Spot,
    Target,
    Value,
    word_at,
)
from flowlang.plan.onnx import NotAModel, read_model
from flowlang.plan.ops import Op, Param
from flowlang.plan.schedule import Setting
from flowlang.plan.types import Record, Type, Unknown
from flowlang.plan.values import shown
from flowlang.syntax import tree
from flowlang.syntax.format import format_expr, format_type

MAX_TYPES = 3  # of an expression that gives another one at each mention of its flow
MAX_FIELDS = 30


def hover(document: Document, offset: int) -> tuple[str, int, int] | None:
    """The Markdown of what is at an offset, with the start and end of the thing."""
    spot = Spot.of(document, offset)
    start = offset - spot.offset
    word = word_at(spot.source.text, spot.offset)
    target = spot.target()
    said = [p for p in (_target(spot, target), _type(spot, target)) if p]
    if not said:
        return None
    if isinstance(target, File):
        node = spot.nodes[-1]
        return "\n\n".join(said), start + node.span.start, start + node.span.end
    place = (word[1], word[2]) if word else (spot.offset, spot.offset)
    if word is None and spot.source.text[max(0, spot.offset - 1) : spot.offset + 2].count("->"):
        at = spot.source.text.index("->", max(0, spot.offset - 1))
        place = (at, at + 2)
    return "\n\n".join(said), start + place[0], start + place[1]


# What a name stands for


def _target(spot: Spot, target: Target | None) -> str:
    match target:
        case Op():
            return operator_markdown(target)
        case Flag(op, param, word):
            return f"`{word}`: {param.name} of `{op.name}`\n\n{param.doc}"
        case Argument(owner, what):
            return _argument(owner, what)
        case Setting():
            return setting_text(target)
        case Member(alias, _, name, what):
            return _member(f"{alias}.{name}", what)
        case File():
            return _file(target)
        case Declaration(item):
            return _declaration(spot, item)
        case Value(tree.Input() as given):
            default = f" = {format_expr(given.default)}" if given.default else ""
            return _code(f"{given.name}: {format_type(given.type)}{default}")
    return ""


def _argument(owner: Op | tree.Flow, what: Param | Setting | tree.Input) -> str:
    if isinstance(what, Param):
        return f"`{what.name}` of `{owner.name}`\n\n{parameter_text(what)}"
    if isinstance(what, Setting):
        return f"`{what.name}`, a setting\n\n{setting_text(what)}"
    return f"`{what.name}` of `{owner.name}`\n\n{_code(format_type(what.type))}"


def _member(name: str, what: tree.Flow | Op | Type | None) -> str:
    if isinstance(what, Op):
        return operator_markdown(what)
    if isinstance(what, tree.Flow):
        return _documented(flow_text(what), what.doc)
    return _code(f"{name} = {_whole(what)}") if what is not None else ""


def _declaration(spot: Spot, item: tree.Use | tree.Param | tree.TypeDef | tree.Flow) -> str:
    module = spot.document.findings.module
    match item:
        case tree.Flow():
            return _documented(flow_text(item), item.doc)
        case tree.Param(name, kind, default):
            typed = f": {format_type(kind)}" if kind else ""
            text = f"param {name}{typed} = {format_expr(default)}"
            value = module.params.get(name) if module else None
            if value is not None and value.origin != "file":
                text += f"\n# {shown(value.value)}, from {value.origin}"
            return _documented(text, item.doc)
        case tree.TypeDef(name, kind):
            return _documented(f"type {name} = {format_type(kind)}", item.doc)
        case tree.Use(path, name):
            return _documented(f'use "{path.value}" as {name}', item.doc)


def _file(file: File) -> str:
    if not file.is_model:
        return ""
    try:
        model = read_model(file.path)
    except (OSError, NotAModel, FlowError):
        return ""
    takes = [f"{p.name}: {p.item}" for p in model.inputs]
    gives = [f"{p.name}: {p.item}" for p in model.outputs]
    lines = [f"# {model.name}", *(f"in   {t}" for t in takes), *(f"out  {g}" for g in gives)]
    if model.fixed_batch is not None:
        lines.append(f"batches of {model.fixed_batch} only")
    return _code("\n".join(lines))


def _documented(code: str, doc: str | None) -> str:
    return f"{_code(code)}\n\n{doc}" if doc else _code(code)


def _code(text: str) -> str:
    return f"```flow\n{text}\n```"


# What passes here


def _type(spot: Spot, target: Target | None) -> str:
    """The type of the expression at the place, or of what passes along an arrow."""
    kinds = _kinds(spot, target)
    known = [k for k in kinds if not isinstance(k, Unknown)]
    if not known:
        return ""
    more = [f"and {len(known) - MAX_TYPES} more"] if len(known) > MAX_TYPES else []
    lines = [*(_whole(k) for k in known[:MAX_TYPES]), *more]
    return "gives\n" + _code("\n".join(lines))


def _kinds(spot: Spot, target: Target | None) -> Iterable[Type]:
    node = spot.nodes[-1] if spot.nodes else None
    if isinstance(target, (Argument, Flag, File)) or node is None:
        return ()
    if isinstance(target, Value) and isinstance(target.node, tree.Let):
        return spot.types(target.span)
    if isinstance(target, Declaration):
        return _flow_kinds(spot, target)
    if isinstance(node, tree.RecordField):
        return spot.types(node.value.span if node.value else node.span)
    expr = spot.around(tree.Call, tree.Current, tree.Repeat)
    if isinstance(node, (tree.Path, tree.Current)) and expr is not None:
        return spot.types(expr.span)
    arrow = spot.source.text.rfind("->", 0, spot.offset + 2)
    if arrow >= 0 and arrow >= spot.offset - 2 and isinstance(node, tree.Pipeline):
        before = [s for s in node.steps if s.span.end <= arrow]
        return spot.types(before[-1].span) if before else ()
    return ()


def _flow_kinds(spot: Spot, target: Declaration) -> Iterable[Type]:
    """What a flow gives: here, where it is mentioned, or anywhere, where it is declared."""
    call = spot.around(tree.Call)
    if call is not None and isinstance(spot.nodes[-1], tree.Path):
        return spot.types(call.span)
    if not isinstance(target.item, tree.Flow):
        return ()
    body = target.item.body
    result = body.result if isinstance(body, tree.Body) else body
    span = result.span
    return spot.document.findings.types(span.source, span.start, span.end)


def _whole(kind: Type | None) -> str:
    """A type with the fields of a record that has a name."""
    if isinstance(kind, Record) and kind.name:
        fields = [f"  {n}: {t}," for n, t in kind.fields[:MAX_FIELDS]]
        more = ["  ..."] if len(kind.fields) > MAX_FIELDS else []
        return "\n".join([f"{kind.name} = {{", *fields, *more, "}"])
    return str(kind)
