"""What a program can name at a cursor: operators, flows, values, fields.

Layer 4. What arrives there comes from checking the text before the cursor, made whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flowlang.doc import flow_text, gives, takes
from flowlang.editor.cursor import Cursor
from flowlang.editor.document import Document
from flowlang.plan.expression import fields_of
from flowlang.plan.inspect import Part
from flowlang.plan.module import Module, PythonFile
from flowlang.plan.ops import OPS, Op
from flowlang.plan.types import ListOf, Scalar, Type, Unknown, without_null
from flowlang.syntax import tree
from flowlang.syntax.format import format_expr

FIRST, USUAL, LAST = 0, 1, 2  # how near the top of the list
_CHOICES = {
    "if": ("if ... then ... else ...", "one stage or another"),
    "match": ("match .field { ... }", "a stage for each value"),
}


@dataclass(frozen=True, slots=True)
class Completion:
    """One thing that could stand at the cursor.

    `kind` is a word for an icon; `insert` is what is typed, where that is not the label, and
    `$0` in it is where the cursor goes then. `start` is where the text starts that it replaces,
    where that is not the typed word.
    """

    label: str
    kind: str
    detail: str = ""
    doc: str = ""
    insert: str = ""
    rank: int = USUAL
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    document: Document
    cursor: Cursor
    offset: int

    @property
    def arriving(self) -> Type | None:
        """What arrives here, if that is known and one."""
        if self.cursor.wants in ("nothing", "string"):
            return None
        found = self.document.arriving(self.offset, self.cursor.probe())
        known = [kind for kind in found if not isinstance(kind, Unknown)]
        return known[0] if len(known) == 1 else None

    @property
    def part(self) -> Part:
        return self.document.part(self.offset)[0]

    def others(self) -> Iterator[tree.Item]:
        """The declarations of the file but for the one that is being typed in."""
        return (item for item, _ in self.document.declarations(but=self.part))

    def flow(self, name: str) -> tree.Flow | None:
        """The flow of a name, but for one that is being typed in."""
        return self.document.flow(name, but=self.part)


# Stages and values


def stages(place: Place) -> Iterator[Completion]:
    arriving = place.arriving
    for op in OPS.values():
        yield operator_offer(op, op.name, _fit(op, arriving))
    yield from _flows(place)
    yield from local_values(place)
    yield from aliases(place)
    for word, (shape, doc) in _CHOICES.items():
        yield Completion(word, "keyword", shape, doc, rank=LAST)
    if place.cursor.frame.is_after_arrow:
        yield Completion("as", "keyword", "as TYPE", "check the type of what arrives", rank=LAST)


def operands(place: Place) -> Iterator[Completion]:
    """Behind a sign: values come before stages."""
    yield from (replace(c, rank=FIRST) for c in local_values(place))
    yield from (replace(c, rank=FIRST) for c in params(place))
    yield from stages(place)


def operator_offer(op: Op, name: str, rank: int = USUAL) -> Completion:
    needs = any(p.is_required for p in op.params)
    insert = f"{name}($0)" if needs else ""
    detail = f"{takes(op)} -> {gives(op)}"
    return Completion(name, "operator", detail, op.doc, insert, rank)


def _fit(op: Op, arriving: Type | None) -> int:
    """Operators come first that take such a thing as arrives, and last that do not."""
    if arriving is None or isinstance(op.takes, Unknown):
        return USUAL
    given, wanted = without_null(arriving), op.takes
    alike = type(given) is type(wanted) and (not isinstance(given, Scalar) or given == wanted)
    if op.name == "crop" and isinstance(given, Scalar):
        alike = given.name in ("box", "quad")
    if op.name == "top" and isinstance(given, ListOf):
        alike = True
    return FIRST if alike else LAST


def _flows(place: Place) -> Iterator[Completion]:
    for part in place.document.draft.parts:
        yield from flows_of(part) if part is not place.part else ()


@functools.lru_cache(maxsize=4096)
def flows_of(part: Part) -> tuple[Completion, ...]:
    """The flows of a part, which stay as long as its text does."""
    flows = (item for item in part.program.items if isinstance(item, tree.Flow))
    return tuple(flow_offer(flow, flow.name) for flow in flows)


def flow_offer(flow: tree.Flow, name: str) -> Completion:
    insert = f"{name}($0)" if any(i.default is None for i in flow.inputs) else ""
    return Completion(name, "flow", flow_text(flow), flow.doc or "", insert)


def local_values(place: Place) -> Iterator[Completion]:
    for name in place.cursor.names:
        yield Completion(name, "value", "let or input of this flow", rank=FIRST)
    if place.cursor.is_in_body:
        yield Completion("in", "keyword", "the item of this flow")


def params(place: Place) -> Iterator[Completion]:
    for item in place.others():
        if isinstance(item, tree.Param):
            detail = f"param {item.name} = {format_expr(item.default)}"
            yield Completion(item.name, "param", detail, item.doc or "", rank=LAST)


def aliases(place: Place) -> Iterator[Completion]:
    for item in place.others():
        if isinstance(item, tree.Use):
            yield Completion(item.name, "module", item.path.value, item.doc or "")


def fields(place: Place) -> Iterator[Completion]:
    owner = place.cursor.owner
    used = place.document.used(owner) if owner not in place.cursor.names else None
    if isinstance(used, PythonFile):
        for name, op in used.operators.items():
            yield replace(operator_offer(op, f"{owner}.{name}"), label=name, insert="")
    elif isinstance(used, Module):
        for name, flow in used.flows.items():
            yield flow_offer(flow, name)
    else:
        arriving = place.arriving
        for name, kind in fields_of(without_null(arriving)) if arriving else ():
            yield Completion(name, "field", str(kind))
