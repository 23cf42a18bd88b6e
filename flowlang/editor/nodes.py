"""What of a program's tree lies at a place, and what a name there stands for.

Layer 4. Places are offsets in the text of one part of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias

from flowlang.diagnostics import Source, Span
from flowlang.editor.document import Document
from flowlang.plan.inspect import Part
from flowlang.plan.module import Module, PythonFile
from flowlang.plan.ops import OPS, Op, Param
from flowlang.plan.schedule import SETTINGS, Setting
from flowlang.plan.types import Type
from flowlang.plan.values import Refused, interpolate
from flowlang.syntax import tree

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Flag:
    """A word or flag among an operator's arguments."""

    op: Op
    param: Param
    word: str


@dataclass(frozen=True, slots=True)
class Value:
    """A let or an input, and the place of its name in its part."""

    node: tree.Let | tree.Input
    span: Span


@dataclass(frozen=True, slots=True)
class Member:
    """Something of another file: a flow, a Python operator, or a type of either."""

    alias: str
    used: Module | PythonFile
    name: str
    what: tree.Flow | Op | Type | None


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter of an operator, or a setting, or an input of a flow."""

    owner: Op | tree.Flow
    what: Param | Setting | tree.Input


@dataclass(frozen=True, slots=True)
class File:
    """A file that is named in a string."""

    path: Path
    is_model: bool


@dataclass(frozen=True, slots=True)
class Declaration:
    """A declaration of this file, and the offset its spans count from."""

    item: tree.Use | tree.Param | tree.TypeDef | tree.Flow
    start: int


Target: TypeAlias = Op | Flag | Value | Member | Argument | Setting | File | Declaration


def chain(part: Part, offset: int) -> list[Any]:
    """The nodes around a place, from a declaration in to the smallest."""
    program = part.program
    roots = [*program.items, *([program.pipeline] if program.pipeline is not None else [])]
    found: list[Any] = []
    nodes: list[Any] = roots
    while nodes:
        inside = [n for n in nodes if n.span.start <= offset <= n.span.end]
        if not inside:
            break
        # Where two touch at the place, the one that starts there is meant.
        node = max(inside, key=lambda n: n.span.start)
        found.append(node)
        nodes = list(_children(node))
    return found


def _children(node: Any) -> Iterator[Any]:
    for each in fields(node):
        value = getattr(node, each.name)
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part) and not isinstance(part, Span):
                yield part


def word_at(text: str, offset: int) -> tuple[str, int, int] | None:
    """The name that a place touches, with its start and end."""
    for found in _WORD.finditer(text, max(0, text.rfind("\n", 0, offset))):
        if found.start() > offset:
            return None
        if found.end() >= offset:
            return found.group(), found.start(), found.end()
    return None


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in a document: the part it is in, and the nodes around it."""

    document: Document
    part: Part
    offset: int
    nodes: list[Any]

    @classmethod
    def of(cls, document: Document, offset: int) -> Spot:
        part, inner = document.part(offset)
        return cls(document, part, inner, chain(part, inner))

    @property
    def source(self) -> Source:
        return self.part.source

    def around(self, *kinds: type) -> Any:
        """The smallest node around the place that is of one of these kinds."""
        return next((n for n in reversed(self.nodes) if isinstance(n, kinds)), None)

    def target(self) -> Target | None:
        """What the name, word or file at the place stands for."""
        node = self.nodes[-1] if self.nodes else None
        if isinstance(node, tree.String):
            return self._file(node)
        if isinstance(node, tree.Path):
            return self._path(node)
        if isinstance(node, tree.Arg):
            return self._argument(node)
        if isinstance(node, tree.RecordField) and node.value is None and node.name:
            return self._name(node.name)
        word = word_at(self.source.text, self.offset)
        if word is None:
            return None
        return self._declared(*word) if self.nodes else self._unread(word[0])

    def _declared(self, word: str, start: int, end: int) -> Target | None:
        """A name in the place where it is declared."""
        for node in reversed(self.nodes):
            if isinstance(node, tree.Input) and start == node.span.start:
                return Value(node, Span(self.source, start, end))
            name_span = getattr(node, "name_span", None)
            if name_span is not None and name_span.start == start:
                return Value(node, name_span) if isinstance(node, tree.Let) else self._top(word)
        return None

    def _unread(self, word: str) -> Target | None:
        """A word in a declaration that could not be read."""
        return OPS.get(word) or self._top(word) or SETTINGS.get(word)

    def _top(self, name: str) -> Declaration | None:
        found = self.document.declared(name)
        return Declaration(*found) if found else None

    def _value(self, name: str) -> Value | None:
        """The let or input that a name is inside its flow; of two lets the first."""
        flow = self.around(tree.Flow)
        if flow is None:
            return None
        lets = flow.body.lets if isinstance(flow.body, tree.Body) else ()
        for let in lets:
            if let.name == name:
                return Value(let, let.name_span)
        for given in flow.inputs:
            if given.name == name:
                start = given.span.start
                return Value(given, Span(self.source, start, start + len(name)))
        return None

    def _name(self, name: str) -> Target | None:
        return self._value(name) or self._top(name) or OPS.get(name)

    def _path(self, path: tree.Path) -> Target | None:
        owner = self.nodes[-2] if len(self.nodes) > 1 else None
        names = path.names
        if len(names) > 1 and self._value(names[0]) is None:
            return self._member(path)
        if isinstance(owner, tree.Call) and owner.args is None and len(names) == 1:
            word = self._word(names[0])
            if word is not None:
                return word
        return self._name(names[0])

    def _word(self, word: str) -> Flag | None:
        """A word of the operator among whose arguments it stands."""
        if len(self.nodes) < 4 or not isinstance(self.nodes[-3], tree.Arg):
            return None
        call = self.nodes[-4]
        op = self.document.operator(str(call.path)) if isinstance(call, tree.Call) else None
        param = op.param_of_word(word) if op else None
        return Flag(op, param, word) if op and param and not self._is_param(word) else None

    def _is_param(self, name: str) -> bool:
        found = self._top(name)
        return found is not None and isinstance(found.item, tree.Param)

    def _member(self, path: tree.Path) -> Target | None:
        words = list(_WORD.finditer(self.source.text, path.span.start, path.span.end))
        index = next((i for i, w in enumerate(words) if self.offset <= w.end()), len(words) - 1)
        alias, name = ".".join(path.names[:index]), path.names[index]
        used = self.document.used(alias)
        if index == 0 or used is None:
            return self._top(path.names[0])
        if isinstance(used, Module) and name in used.uses:
            return Member(alias, used.uses[name], name, None)
        if isinstance(used, PythonFile):
            return Member(alias, used, name, used.operators.get(name) or used.types.get(name))
        return Member(alias, used, name, used.flows.get(name))

    def _argument(self, arg: tree.Arg) -> Target | None:
        """The name of an argument, `batch` of `batch=1..4`."""
        owner = self.nodes[-2] if len(self.nodes) > 1 else None
        if arg.name is None or self.offset > arg.span.start + len(arg.name):
            return None
        if isinstance(owner, tree.Entry):
            return SETTINGS.get(arg.name)
        if not isinstance(owner, tree.Call):
            return None
        op = self.document.operator(str(owner.path))
        if op is not None:
            what = op.param(arg.name) or SETTINGS.get(arg.name)
            return Argument(op, what) if what else None
        flow = self.document.flow(str(owner.path))
        given = next((i for i in flow.inputs if i.name == arg.name), None) if flow else None
        return Argument(flow, given) if flow and given else None

    def _file(self, node: tree.String) -> Target | None:
        """The param in braces at the place, or the file that the string names."""
        for found in re.finditer(r"\{(\w+)\}", self.source.text[: node.span.end]):
            if node.span.start <= found.start() <= self.offset <= found.end():
                return self._top(found.group(1))
        module = self.document.findings.module
        try:
            text = interpolate(node.value, module.constants if module else {}, node.span)
        except Refused:
            return None
        if not text or not text.isprintable():
            return None
        return File(self.document.folder / text, text.endswith((".onnx", ".encrypted")))

    def types(self, span: Span) -> tuple[Type, ...]:
        """Every type that an expression of this part gives."""
        return self.document.findings.types(self.source, span.start, span.end)
