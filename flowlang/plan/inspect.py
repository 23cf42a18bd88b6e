"""A flow file while it is written: read in parts, checked, and asked what passes where.

Layer 2. Each declaration is a part, read on its own when it is asked about, and kept for as long as
its text stays. Spans of a part are places in the part's own source; `Draft` knows where in the file
that is. Checking may be slow, and nothing here is run.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from flowlang.diagnostics import CompileError, Diagnostic, Source, Span
from flowlang.plan.check import NO_CHOICES, inspect_source
from flowlang.plan.declare import NOTHING_OPEN, Choices
from flowlang.plan.module import Module
from flowlang.plan.types import Type
from flowlang.syntax import tree
from flowlang.syntax.parse import MAX_SOURCE_BYTES, parse_leniently
from flowlang.syntax.scan import declaring_lines

_WORD = re.compile(r"[A-Za-z_]\w*")
MAX_MENTIONED = 64  # flows that are unrolled to answer what arrives at one place


class PartSource(Source):
    """A part's text, which starts on line `first` (from 0) of its file and tells places so."""

    __slots__ = ("first",)

    def __init__(self, name: str, text: str, first: int) -> None:
        super().__init__(name, text)
        self.first = first

    def move(self, first: int) -> None:
        """The part now starts on another line."""
        if first != self.first:
            self.first, self._starts = first, None

    @property
    def line_starts(self) -> list[int]:
        """As if all lines before the part were empty."""
        if self._starts is None:
            self._starts = [0] * self.first + Source(self.name, self.text).line_starts
        return self._starts


Readable: TypeAlias = tuple[tree.Program, list[Diagnostic], frozenset[str]]


class Part:
    """A declaration with the comments above it; the first one with the head of the file.

    It is read when it is first asked about: a long one that is being typed in may change often
    before that. Raises CompileError then where it is too large.
    """

    def __init__(self, source: PartSource) -> None:
        self.source = source

    @functools.cached_property
    def _read(self) -> Readable:
        return parse_leniently(self.source)

    @property
    def program(self) -> tree.Program:
        return self._read[0]

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self._read[1]

    @property
    def lost(self) -> frozenset[str]:
        return self._read[2]

    @functools.cached_property
    def words(self) -> frozenset[str]:
        return frozenset(_WORD.findall(self.source.text))

    @property
    def names(self) -> set[str]:
        """What it declares, or would declare if it could be read."""
        declared = {i.name for i in self.program.items if not isinstance(i, tree.Schedule)}
        return declared | {name for name in self.lost if name}


@dataclass(frozen=True, slots=True)
class Draft:
    """One state of a file: its parts, and at which offset of the text each starts."""

    source: Source
    parts: tuple[Part, ...]
    starts: tuple[int, ...]
    _at: Mapping[Source, int] = field(default_factory=dict, repr=False)

    def index(self, offset: int) -> int:
        """Which part an offset lies in."""
        return max(0, bisect_right(self.starts, offset) - 1)

    def place(self, span: Span) -> tuple[int, int] | None:
        """Start and end of a span in the file's text; None for one in another file."""
        start = 0 if span.source is self.source else self._at.get(span.source)
        return None if start is None else (start + span.start, start + span.end)

    def items(self) -> list[tree.Item]:
        return [item for part in self.parts for item in part.program.items]


class Reader:
    """Takes the states of one file apart; what was read of a declaration stays as its text does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._kept: dict[tuple[str, int], Part] = {}

    def read(self, text: str) -> Draft:
        """The draft of a text; what was read of it before is kept."""
        source = Source(self.name, text)
        if len(text) > MAX_SOURCE_BYTES:
            return _too_large(source)
        starts = _starts(text)
        seen: Counter[str] = Counter()
        kept: dict[tuple[str, int], Part] = {}
        line = 0
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            piece = text[start:end]
            key = (piece, seen[piece])  # declared twice, it stands at two places
            seen[piece] += 1
            part = self._kept.get(key) or Part(PartSource(self.name, piece, line))
            part.source.move(line)
            kept[key] = part
            line += piece.count("\n")
        self._kept = kept
        parts = tuple(kept.values())
        at: dict[Source, int] = {
            part.source: start for part, start in zip(parts, starts, strict=True)
        }
        return Draft(source, parts, tuple(starts), at)


def _too_large(source: Source) -> Draft:
    """A draft of which no more is known than why it cannot be one."""
    part = Part(PartSource(source.name, "", 0))
    try:
        parse_leniently(source)
    except CompileError as error:
        program = tree.Program(None, (), None, Span(part.source, 0, 0))
        part._read = program, list(error.diagnostics), frozenset({""})
    return Draft(source, (part,), (0,), {})


def changed(part: Part, text: str) -> Part:
    """The same part with another text."""
    return Part(PartSource(part.source.name, text, part.source.first))


def _starts(text: str) -> list[int]:
    """Where the parts start: at declarations, but with the comments right above them.

    The first part reaches to the second declaration, so that a bare pipeline stands alone.
    """
    starts = [0]
    for start in list(declaring_lines(text))[1:]:
        while start > starts[-1]:
            before = text.rfind("\n", 0, start - 1) + 1
            if not text[before:start].lstrip().startswith("#"):
                break
            start = before
        if start > starts[-1]:
            starts.append(start)
    return starts


@dataclass(frozen=True, slots=True)
class Seen:
    """What an expression gives where it is applied; one of a flow, once for each mention."""

    start: int
    end: int
    type: Type


@dataclass(frozen=True, slots=True)
class Findings:
    """What checking a draft found; `seen` is kept by the source of the part it lies in."""

    diagnostics: tuple[Diagnostic, ...]
    seen: Mapping[Source, tuple[Seen, ...]]
    module: Module | None

    def at(self, source: Source, offset: int) -> tuple[Span, tuple[Type, ...]] | None:
        """The smallest expression around a place, and every type it gives."""
        around = [s for s in self.seen.get(source, ()) if s.start <= offset < s.end]
        if not around:
            return None
        least = min(around, key=lambda s: s.end - s.start)
        return Span(source, least.start, least.end), self.types(source, least.start, least.end)

    def types(self, source: Source, start: int, end: int) -> tuple[Type, ...]:
        """Every type that the expression at exactly this place gives."""
        found = (s.type for s in self.seen.get(source, ()) if (s.start, s.end) == (start, end))
        return tuple(dict.fromkeys(found))

    def ending(self, source: Source, end: int) -> tuple[Type, ...]:
        """Every type of the smallest expression that ends at a place."""
        ending = [s for s in self.seen.get(source, ()) if s.end == end]
        if not ending:
            return ()
        return self.types(source, max(s.start for s in ending), end)


def inspect(
    draft: Draft, choices: Choices = NO_CHOICES, texts: Mapping[str, str] = NOTHING_OPEN
) -> Findings:
    """Every diagnostic of a file and what its expressions give; `texts` are those of open files."""
    first = draft.parts[0].program
    span = Span(draft.source, 0, len(draft.source.text))
    program = tree.Program(first.edition, tuple(draft.items()), first.pipeline, span)
    read = [d for part in draft.parts for d in part.diagnostics]
    lost = frozenset[str]().union(*(part.lost for part in draft.parts))
    return _check(draft.source, (program, read, lost), choices, texts)


def arriving(
    draft: Draft,
    index: int,
    part: Part,
    place: tuple[int, int],
    choices: Choices = NO_CHOICES,
    texts: Mapping[str, str] = NOTHING_OPEN,
) -> tuple[Type, ...]:
    """What the expression at a place gives in a part that stands for the one at `index`.

    Only what that part mentions is checked besides; where that is too much, nothing is known.
    """
    others = _mentioned(draft, index, part)
    if others is None:
        return ()
    own = [
        replace(item, is_exported=True) if isinstance(item, tree.Flow) else item
        for item in part.program.items
    ]
    items = [item for other in others for item in other.program.items]
    span = Span(draft.source, 0, len(draft.source.text))
    program = tree.Program(None, (*items, *own), part.program.pipeline, span)
    missing = (other.lost for at, other in enumerate(draft.parts) if at != index)
    lost = part.lost.union(*missing) - part.names
    return _check(draft.source, (program, [], lost), choices, texts).types(part.source, *place)


def _mentioned(draft: Draft, index: int, part: Part) -> list[Part] | None:
    """The parts that one needs: what it mentions and what that mentions; None if too many."""
    by_name: dict[str, Part] = {}
    for at, other in enumerate(draft.parts):
        if at != index:
            by_name.update(dict.fromkeys(other.names, other))
    found: dict[Part, None] = {}
    stack = [part]
    while stack:
        for word in stack.pop().words & by_name.keys():
            other = by_name[word]
            if other not in found:
                found[other] = None
                stack.append(other)
        if len(found) > MAX_MENTIONED:
            return None
    return [other for other in draft.parts if other in found]


def _by_source(seen: Iterable[tuple[Span, Type]]) -> dict[Source, tuple[Seen, ...]]:
    found: dict[Source, dict[Seen, None]] = {}
    for span, kind in seen:
        found.setdefault(span.source, {})[Seen(span.start, span.end, kind)] = None
    return {source: tuple(rows) for source, rows in found.items()}


def _check(
    source: Source, program: Readable, choices: Choices, texts: Mapping[str, str]
) -> Findings:
    """What the checker says of a source whose text has been read."""

    def read(wanted: Source) -> Readable:
        return program if wanted is source else _read_used(wanted.name, wanted.text)

    found = inspect_source(source, choices, read, texts)
    return Findings(tuple(found.diagnostics), _by_source(found.seen), found.module)


@functools.lru_cache(maxsize=32)
def _read_used(name: str, text: str) -> Readable:
    """A file that the draft uses, read again only where its text has changed."""
    return parse_leniently(Source(name, text))
