"""What could be typed at a cursor: operators, flows, parameters, words, settings, fields, types.

Layer 4. The text around the cursor is usually broken: what can stand there is told by
`flowlang.editor.cursor`, and this is the list of things for each.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flowlang.editor.arguments import arguments, setting_values, settings, truth, values
from flowlang.editor.cursor import locate
from flowlang.editor.document import Document
from flowlang.editor.offers import (
    FIRST,
    Completion,
    Place,
    aliases,
    fields,
    flows_of,
    operands,
    params,
    stages,
)
from flowlang.plan.module import PythonFile
from flowlang.plan.types import COLOURS, DTYPES, NAMED, Record
from flowlang.syntax import tree
from flowlang.syntax.format import format_type

MAX_FILES = 1000
MAX_ITEMS = 150  # shown at once; an editor takes its time over more
_SUFFIXES = {"model": (".onnx", ".encrypted"), "file": (".txt", ".names"), "use": (".flow", ".py")}
_DECLARATIONS = {
    "flow": "name a pipeline",
    "export": "serve a flow",
    "param": "a value that the environment or the command line can change",
    "type": "name a type",
    "use": "bring in a .flow or a .py file",
    "schedule": "settings apart from the flows",
}


@dataclass(frozen=True, slots=True)
class Completions:
    """What could stand at a cursor, the likelier first. `start` is where the typed word starts.

    Where there is too much, only what looks like the typed word is kept: not `is_whole`.
    """

    items: tuple[Completion, ...]
    start: int
    is_whole: bool = True


def complete(document: Document, offset: int) -> Completions:
    """Everything that could stand at an offset; of a few hundred, what goes with what is typed."""
    part, inner = document.part(offset)
    cursor = locate(part.source.text, inner)
    found: dict[str, Completion] = {}
    for completion in _OF.get(cursor.wants, _nothing)(Place(document, cursor, offset)):
        found.setdefault(completion.label, completion)
    start = offset - (cursor.offset - cursor.start)
    items = sorted(found.values(), key=lambda c: c.rank)
    if len(items) <= MAX_ITEMS:
        return Completions(tuple(items), start)
    typed = document.text[start:offset].lower()
    like = tuple(c for c in items if _is_like(typed, c.label.lower()))
    return Completions(like[:MAX_ITEMS], start, False)


def _is_like(typed: str, label: str) -> bool:
    """Whether the typed letters come in a label, in order."""
    rest = iter(label)
    return all(letter in rest for letter in typed)


def _nothing(place: Place) -> Iterator[Completion]:
    yield from ()


def _entries(place: Place) -> Iterator[Completion]:
    for part in place.document.draft.parts:
        flows = flows_of(part) if part is not place.part else ()
        yield from (replace(c, insert=f"{c.label}($0)") for c in flows)


# Types


def _types(place: Place) -> Iterator[Completion]:
    for name, kind in NAMED.items():
        shown = replace(kind, name=None) if isinstance(kind, Record) else kind
        yield Completion(name, "type", str(shown))
    for name, inside in (("image", "rgb"), ("tensor", "f32, 3x224x224"), ("list", "label")):
        yield Completion(name, "type", f"{name}<{inside}>")
    for item in place.others():
        if isinstance(item, tree.TypeDef):
            detail = format_type(item.type)
            yield Completion(item.name, "type", detail, item.doc or "", rank=FIRST)
    yield from aliases(place)


def _type_arguments(place: Place) -> Iterator[Completion]:
    owner = place.cursor.frame.callee
    if owner == "tensor":
        yield from (Completion(word, "word", "dtype") for word in DTYPES)
    elif owner == "image":
        yield from (Completion(word, "word", "colour") for word in COLOURS)
        yield from (Completion(word, "word", "levels") for word in ("u8", "f32"))
    else:
        yield from _types(place)


def _type_members(place: Place) -> Iterator[Completion]:
    used = place.document.used(place.cursor.owner)
    if isinstance(used, PythonFile):
        for name, kind in used.types.items():
            yield Completion(name, "type", str(kind))


# Words of the language


def _declarations(place: Place) -> Iterator[Completion]:
    for word, doc in _DECLARATIONS.items():
        yield Completion(word, "keyword", doc, insert="export flow" if word == "export" else "")
    if not any(True for _ in place.others()):
        yield from stages(place)


def _following(place: Place) -> Iterator[Completion]:
    """Behind a complete expression."""
    frame = place.cursor.frame
    if frame.owed:
        yield Completion(frame.owed[-1], "keyword", rank=FIRST)
        yield from (Completion(word, "keyword") for word in ("and", "or"))
    if frame.kind == "body":
        yield from _statements(place)
    if frame.kind == "file" and _starts_line(place):
        yield from _declarations(place)


def _starts_line(place: Place) -> bool:
    return not place.cursor.text.rpartition("\n")[2].strip()


def _statements(place: Place) -> Iterator[Completion]:
    yield Completion("let", "keyword", "name a value on the way")
    yield Completion("return", "keyword", "the result of this flow")


def _patterns(place: Place) -> Iterator[Completion]:
    yield Completion("else", "keyword", "what is left", rank=FIRST)
    yield from operands(place)


def _keyword(word: str) -> Callable[[Place], Iterator[Completion]]:
    def complete_it(place: Place) -> Iterator[Completion]:
        yield Completion(word, "keyword", rank=FIRST)

    return complete_it


def _constants(place: Place) -> Iterator[Completion]:
    yield from params(place)
    yield from truth()
    if place.cursor.frame.kind == "file":
        yield Completion(
            "env", "operator", 'env("NAME", default)', "from the environment", "env($0)"
        )


# Inside strings


def _strings(place: Place) -> Iterator[Completion]:
    typed = place.cursor.typed
    opened = typed.rfind("{")
    if opened >= 0 and "}" not in typed[opened:]:
        start = place.offset - (len(typed) - opened - 1)
        for completion in params(place):
            yield replace(completion, start=start, rank=FIRST)
        return
    suffixes = _suffixes(place)
    if suffixes:
        folder, _, name = typed.rpartition("/")
        start = place.offset - len(name)
        for found, is_folder in _files(place.document.folder / folder):
            if is_folder or found.endswith(suffixes):
                label = f"{found}/" if is_folder else found
                yield Completion(label, "folder" if is_folder else "file", start=start)


def _suffixes(place: Place) -> tuple[str, ...]:
    """How the files end that could be named here; none where a string names no file."""
    frame = place.cursor.frame
    if frame.kind == "file" and frame.naming == "use":
        return _SUFFIXES["use"]
    op = place.document.operator(frame.callee) if frame.kind == "call" else None
    if op is None:
        return ()
    named = op.param(frame.argument) if frame.argument else None
    params = [named] if named else [p for p in op.params if not p.is_named]
    return next((_SUFFIXES[p.kind] for p in params if p.kind in _SUFFIXES), ())


def _files(folder: Path) -> Iterable[tuple[str, bool]]:
    """Names in a folder, and which of them are folders; of a huge one the first."""
    try:
        with os.scandir(folder) as entries:
            found = [(e.name, e.is_dir()) for e in itertools.islice(entries, MAX_FILES)]
    except (OSError, ValueError):
        return []
    return sorted(pair for pair in found if not pair[0].startswith("."))


_OF: dict[str, Callable[[Place], Iterator[Completion]]] = {
    "declaration": _declarations,
    "flow": _keyword("flow"),
    "stage": stages,
    "operand": operands,
    "subject": operands,
    "field-name": stages,
    "field": fields,
    "argument": arguments,
    "value": values,
    "setting": settings,
    "setting-value": setting_values,
    "entry": _entries,
    "type": _types,
    "type-argument": _type_arguments,
    "type-field": _type_members,
    "statement": _statements,
    "after": _following,
    "pattern": _patterns,
    "constant": _constants,
    "string": _strings,
}
