"""Where things are declared, and what a file declares.

Layer 4. Places in this document are offsets in its text; those in other files are lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowlang.diagnostics import Span
from flowlang.doc import flow_text
from flowlang.editor.document import Document
from flowlang.editor.nodes import Argument, Declaration, File, Member, Spot, Value
from flowlang.plan.inspect import Part
from flowlang.plan.module import PythonFile
from flowlang.syntax import tree
from flowlang.syntax.format import format_type

_HEAD = re.compile(r"^\s*(?:export\s+)?(flow|param|type|use|schedule)\b\s*(\w*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Place:
    """A stretch of this document, or where `path` is given, of another file."""

    start: int
    end: int
    path: Path | None = None


def definition(document: Document, offset: int) -> Place | None:
    """Where the thing at an offset is declared."""
    spot = Spot.of(document, offset)
    base = offset - spot.offset
    match spot.target():
        case Declaration(tree.Use(path), _):
            return _file(document.folder / path.value)
        case Declaration(item, start):
            return Place(start + item.name_span.start, start + item.name_span.end)
        case Value(_, span):
            return Place(base + span.start, base + span.end)
        case File(path, _):
            return _file(path)
        case Member() as member:
            return _member(document, member)
        case Argument(tree.Flow() as flow, tree.Input() as given):
            return _input(document, flow, given)
    return None


def _file(path: Path) -> Place | None:
    return Place(0, 0, path) if path.is_file() else None


def _member(document: Document, member: Member) -> Place | None:
    """A flow in its file, or a Python function or class in its own."""
    if isinstance(member.used, PythonFile):
        try:
            text = document.text_of(member.used.path)
        except OSError:
            return None
        name = re.escape(member.name)
        found = re.search(rf"^(?:async\s+)?(?:def|class)\s+({name})\b", text, re.MULTILINE)
        span = found.span(1) if found else (0, 0)
        return Place(*span, member.used.path)
    if isinstance(member.what, tree.Flow):
        return _elsewhere(member.what.name_span)
    return _file(Path(member.used.source.name))


def _elsewhere(span: Span) -> Place:
    return Place(span.start, span.end, Path(span.source.name))


def _input(document: Document, flow: tree.Flow, given: tree.Input) -> Place | None:
    span = Span(given.span.source, given.span.start, given.span.start + len(given.name))
    place = document.place(span)
    if place is not None:
        return Place(*place)
    return _elsewhere(span) if os.path.isfile(span.source.name) else None


@dataclass(frozen=True, slots=True)
class Symbol:
    """A declaration: its extent, the extent of its name, and what it holds."""

    name: str
    kind: str
    detail: str
    start: int
    end: int
    name_start: int
    name_end: int
    children: list[Symbol] = field(default_factory=list)


def symbols(document: Document) -> list[Symbol]:
    """What a file declares, in order; what cannot be read, by its first words."""
    draft = document.draft
    found: list[Symbol] = []
    for part, start in zip(draft.parts, draft.starts, strict=True):
        read = [_symbol(item, start) for item in part.program.items]
        lost = [s for s in _lost(part, start) if s.name not in {r.name for r in read}]
        found += sorted([*read, *lost], key=lambda s: s.start)
        if part.program.pipeline is not None:
            span = part.program.pipeline.span
            ends = (start + span.start, start + span.end)
            found.append(Symbol("main", "flow", "flow main", *ends, ends[0], ends[0]))
    return found


def _symbol(item: tree.Item, start: int) -> Symbol:
    span = item.span
    ends = (start + span.start, start + span.end)
    if isinstance(item, tree.Schedule):
        return Symbol(item.name or "schedule", "schedule", "schedule", *ends, ends[0], ends[0] + 8)
    name = (start + item.name_span.start, start + item.name_span.end)
    match item:
        case tree.Flow():
            return Symbol(item.name, "flow", flow_text(item), *ends, *name, _inner(item, start))
        case tree.Param(type=kind):
            return Symbol(item.name, "param", format_type(kind) if kind else "", *ends, *name)
        case tree.TypeDef():
            return Symbol(item.name, "type", "", *ends, *name)
        case tree.Use(path):
            return Symbol(item.name, "module", path.value, *ends, *name)


def _inner(flow: tree.Flow, start: int) -> list[Symbol]:
    """The inputs and lets of a flow."""
    found = []
    for given in flow.inputs:
        at, end = start + given.span.start, start + given.span.end
        name_end = at + len(given.name)
        found.append(Symbol(given.name, "value", format_type(given.type), at, end, at, name_end))
    for let in flow.body.lets if isinstance(flow.body, tree.Body) else ():
        ends = (start + let.span.start, start + let.span.end)
        name = (start + let.name_span.start, start + let.name_span.end)
        found.append(Symbol(let.name, "value", "let", *ends, *name))
    return found


def _lost(part: Part, start: int) -> Iterator[Symbol]:
    """Declarations that could not be read."""
    if not part.lost:
        return
    for found in _HEAD.finditer(part.source.text):
        kind, name = found.groups()
        if name and kind != "use":
            ends = (start + found.start(1), start + len(part.source.text.rstrip()))
            yield Symbol(name, kind, "", *ends, start + found.start(2), start + found.end(2))
