"""Places in source text, what is wrong there, and the exceptions flowlang raises.

Layer 0: imports nothing of ours. Every other layer reports through this module.

Exceptions::

    FlowError
    |- CompileError     a flow does not check; carries its diagnostics
    |- EngineError      a model or a device cannot be set up
    `- RequestError     one request was not answered with a result
       |- BadRequest        its input is not what the flow takes
       |- Overloaded        the queue at the entrance is full
       |- DeadlineExceeded  its deadline passed first
       |- Draining          the app is stopping and takes no more
       |- Cancelled         the caller gave it up
       `- StageFailed       a stage could not work on it
    InternalError       this is our bug, not yours (outside the tree)
"""

from __future__ import annotations

import json
import os
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TAB_WIDTH = 4


class Source:
    """One source file: its name as shown to people, and its text."""

    __slots__ = ("_starts", "name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self._starts: list[int] | None = None

    @property
    def line_starts(self) -> list[int]:
        """Offset of the first character of each line."""
        if self._starts is None:
            starts = [0]
            at = self.text.find("\n")
            while at >= 0:
                starts.append(at + 1)
                at = self.text.find("\n", at + 1)
            self._starts = starts
        return self._starts

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column, both counted from 1 and in characters, of an offset."""
        line = bisect_right(self.line_starts, offset) - 1
        return line + 1, offset - self.line_starts[line] + 1

    def line(self, number: int) -> str:
        """The text of a line (from 1), without its line end."""
        start = self.line_starts[number - 1]
        end = self.text.find("\n", start)
        return self.text[start : len(self.text) if end < 0 else end].rstrip("\r")

    def __repr__(self) -> str:
        return f"Source({self.name!r})"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of source text: offsets in characters, the end not included."""

    source: Source
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def to(self, other: Span) -> Span:
        """The stretch from here to the end of `other`."""
        return Span(self.source, self.start, max(self.end, other.end))

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Label:
    """Words to print beside a place."""

    span: Span
    text: str = ""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing wrong (or worth a hint) in a program.

    `slug` names the kind and has a page under `flowlang explain-error`; `severity` is `error`,
    `warning` or `hint`; `primary` is the smallest wrong place; `secondary` the places that
    caused it; `help` is text that can be pasted, `fix` the span it replaces where that is known.
    """

    slug: str
    message: str
    primary: Label
    secondary: tuple[Label, ...] = ()
    help: str | None = None
    note: str | None = None
    severity: str = "error"
    fix: Span | None = field(default=None, compare=False)

    @property
    def span(self) -> Span:
        return self.primary.span


def _width(text: str) -> int:
    """Columns a terminal gives to text (East Asian wide characters take two)."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _shown(text: str) -> str:
    """Text safe to print: tabs expanded, control characters replaced."""
    text = text.replace("\t", " " * TAB_WIDTH)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _said(text: str) -> str:
    """Words of a diagnostic, which may quote text of any length, safe to print."""
    return _shown(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}...")


MAX_LINE = 160  # a longer source line is cut around the place
MAX_TEXT = 400  # of a message
MAX_SHOWN = 50  # diagnostics in the text of one exception


def _excerpt(line: str, column: int) -> tuple[str, int]:
    """A line cut to a readable length around a column (from 0), and how much went at its left."""
    left = max(0, min(column - MAX_LINE // 3, len(line) - MAX_LINE))
    return line[left : left + MAX_LINE], left


def _under(line: str, start: int, end: int, mark: str) -> str:
    """Blanks up to a place in a line, then marks along it (at least one)."""
    indent = _width(_shown(line[:start]))
    return " " * indent + mark * max(1, _width(_shown(line[start:end])))


def render(diagnostic: Diagnostic) -> str:
    """A diagnostic as text: headline, place, source line, carets, help and note."""
    primary = diagnostic.primary
    source = primary.span.source
    out = [
        f"{diagnostic.severity}[{diagnostic.slug}]: {_said(diagnostic.message)}",
        f" --> {_shown(str(primary.span))}",
    ]
    by_line: dict[int, list[tuple[Label, str]]] = {}
    for label, mark in [(primary, "^"), *((s, "-") for s in diagnostic.secondary)]:
        if label.span.source is source:
            by_line.setdefault(label.span.line, []).append((label, mark))
    gutter = max(len(str(n)) for n in by_line)
    blank = " " * gutter + " | "
    for number in sorted(by_line):
        out.extend(_annotated(source, number, by_line[number], gutter, blank))
    others = [s for s in diagnostic.secondary if s.span.source is not source]
    out.extend(f"{blank}{_said(f'{label.span}: {label.text}')}" for label in others)
    foot = " " * gutter + " = "
    if diagnostic.help:
        out.append(f"{foot}help: {_said(diagnostic.help)}")
    if diagnostic.note:
        out.append(f"{foot}note: {_said(diagnostic.note)}")
    return "\n".join(s.rstrip() for s in out)


def _annotated(
    source: Source, number: int, labels: list[tuple[Label, str]], gutter: int, blank: str
) -> list[str]:
    """One source line and the marks under it, the rightmost label beside the marks."""
    line = source.line(number)
    first = source.line_starts[number - 1]
    labels = sorted(labels, key=lambda pair: pair[0].span.start)
    anchor = next((s for s, mark in labels if mark == "^"), labels[0][0])
    text, shift = _excerpt(line, anchor.span.start - first)
    places = []
    for label, mark in labels:
        start = min(max(label.span.start - first - shift, 0), len(text))
        end = min(max(label.span.end - first - shift, start), len(text))
        places.append((start, end, mark, _said(label.text)))
    marks = ""
    for start, end, mark, _ in places:
        row = _under(text, start, end, mark)
        marks = marks.ljust(len(row))
        marks = "".join(
            b if b != " " else a for a, b in zip(marks, row.ljust(len(marks)), strict=True)
        )
    marks = marks.rstrip()
    out = [f"{number:>{gutter}} | {_shown(text)}", f"{blank}{marks} {places[-1][3]}"]
    for start, _, _, words in reversed(places[:-1]):
        if words:
            out.append(f"{blank}{' ' * _width(_shown(text[:start]))}{words}")
    return out


def _place(span: Span) -> dict[str, object]:
    line, column = span.source.position(span.start)
    end_line, end_column = span.source.position(span.end)
    return {
        "file": span.source.name,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
    }


def as_json(diagnostic: Diagnostic) -> dict[str, object]:
    """A diagnostic as plain values for tools; lines and columns count from 1.

    `fix` is the place that the text of `help` replaces, where that is known.
    """
    return {
        "slug": diagnostic.slug,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        **_place(diagnostic.span),
        "label": diagnostic.primary.text,
        "related": [{**_place(s.span), "label": s.text} for s in diagnostic.secondary],
        "help": diagnostic.help,
        "fix": _place(diagnostic.fix) if diagnostic.fix is not None else None,
        "note": diagnostic.note,
    }


def to_json(diagnostics: Iterable[Diagnostic]) -> str:
    """Diagnostics as one JSON array."""
    return json.dumps([as_json(d) for d in diagnostics], indent=2)


def in_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Diagnostics without repeats, by file and place."""
    unique = dict.fromkeys(diagnostics)
    return sorted(unique, key=lambda d: (d.span.source.name, d.span.start, d.slug))


class FlowError(Exception):
    """Anything flowlang tells its user."""


class CompileError(FlowError):
    """A flow does not check. `diagnostics` holds every reason; its text shows the first ones."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = in_order(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        told = [render(d) for d in self.diagnostics[:MAX_SHOWN]]
        if more := len(self.diagnostics) - len(told):
            told.append(f"and {more} more")
        return "\n\n".join(told)


class EngineError(FlowError):
    """A model or a device cannot be set up."""


class RequestError(FlowError):
    """One request was not answered with a result.

    `code` is a stable word for clients; `http_status` the HTTP status code (RFC 9110);
    `stage` the stage's name and `place` its `file:line:column`, where one is to blame. `otherwise`
    is the message of one that is made without.
    """

    code = "request-failed"
    http_status = 500
    otherwise = "no result"

    def __init__(
        self, message: str | None = None, *, stage: str | None = None, place: str | None = None
    ) -> None:
        message = self.otherwise if message is None else message
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.place = place

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"{self.message}{where}"


class BadRequest(RequestError):
    """The input is not what the flow takes."""

    code = "bad-request"
    http_status = 400


class Overloaded(RequestError):
    """The queue at the flow's entrance is full."""

    code = "overloaded"
    http_status = 429


class DeadlineExceeded(RequestError):
    """The request's deadline passed before it was answered."""

    code = "deadline-exceeded"
    http_status = 504
    otherwise = "not answered by its deadline"


class Draining(RequestError):
    """The app is stopping and takes no more requests."""

    code = "draining"
    http_status = 503
    otherwise = "the app is stopping and takes no more requests"


class Cancelled(RequestError):
    """The caller gave the request up."""

    code = "cancelled"
    http_status = 499


class StageFailed(RequestError):
    """A stage could not work on the request: `decode failed: not a JPEG`."""

    code = "stage-failed"
    http_status = 500


class InternalError(Exception):
    """A fault of flowlang itself. Please report it with the text it carries."""
