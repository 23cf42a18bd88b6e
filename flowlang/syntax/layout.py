"""Documents that know where they may break, and the text that fits them into a width.

Layer 1, beside the formatter: after Wadler, "A prettier printer". It knows no syntax but `#`
comments, which always end their line. Takes time linear in the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

WIDTH = 88
INDENT = 2


@dataclass(frozen=True, slots=True)
class Line:
    """A line end where the group around it is broken, else `flat`; None is a line end always."""

    flat: str | None


@dataclass(frozen=True, slots=True)
class Nest:
    """Lines in here are indented by one step more."""

    doc: Doc


@dataclass(frozen=True, slots=True)
class Group:
    """All on one line where it fits and holds no comment, else every line of it is broken."""

    doc: Doc


@dataclass(frozen=True, slots=True)
class Remark:
    """Comments, the first one after the code before it where `is_trailing`; others own a line.

    `comments` are (text, is there a blank line before it). What follows starts a line.
    """

    comments: tuple[tuple[str, bool], ...]
    is_trailing: bool


@dataclass(frozen=True, slots=True)
class WhenBroken:
    """Text that only a broken group shows."""

    text: str


@dataclass(frozen=True, slots=True)
class BlankLine:
    """One empty line before whatever starts the next line."""


Doc: TypeAlias = "str | Line | Nest | Group | Remark | WhenBroken | BlankLine | tuple[Doc, ...]"

SPACE = Line(" ")
SOFT = Line("")
HARD = Line(None)
BLANK = BlankLine()
NOTHING = ""


def flat(doc: Doc) -> str | None:
    """The document on one line, or None where a comment or a hard line forbids it."""
    parts: list[str] = []
    todo: list[Doc] = [doc]
    while todo:
        here = todo.pop()
        if isinstance(here, str):
            parts.append(here)
        elif isinstance(here, tuple):
            todo.extend(reversed(here))
        elif isinstance(here, (Nest, Group)):
            todo.append(here.doc)
        elif isinstance(here, Remark) or (isinstance(here, Line) and here.flat is None):
            return None
        elif isinstance(here, Line):
            parts.append(here.flat or "")
    return "".join(parts)


def render(doc: Doc) -> str:
    """The document as text of lines of at most `WIDTH` columns where its breaks allow it."""
    return _Printer(doc).text()


class _Printer:
    """Writes line ends late, so that comments can still end a line and no blanks trail."""

    def __init__(self, doc: Doc) -> None:
        self._todo: list[tuple[int, bool, Doc]] = [(0, False, doc)]
        self._lines: list[str] = []
        self._line = ""
        self._blank = ""  # blanks owed before the next text
        self._indent: int | None = None  # of a line end owed before the next text
        self._is_blank_owed = False

    def text(self) -> str:
        while self._todo:
            indent, is_flat, doc = self._todo.pop()
            if isinstance(doc, str):
                self._write(doc)
            elif isinstance(doc, tuple):
                self._todo.extend((indent, is_flat, part) for part in reversed(doc))
            elif isinstance(doc, Nest):
                self._todo.append((indent + INDENT, is_flat, doc.doc))
            elif isinstance(doc, Group):
                self._todo.append((indent, is_flat or self._fits(doc.doc), doc.doc))
            elif isinstance(doc, Line):
                self._end_line(indent, doc.flat if is_flat else None)
            elif isinstance(doc, Remark):
                self._remark(indent, doc)
            elif isinstance(doc, WhenBroken):
                self._write(NOTHING if is_flat else doc.text)
            else:
                self._is_blank_owed = True
        return "".join(f"{line}\n" for line in [*self._lines, self._line] if line or self._lines)

    def _write(self, text: str) -> None:
        if not text:
            return
        if self._indent is None:
            self._line += self._blank + text
        else:
            if self._line:
                self._lines.append(self._line)
                if self._is_blank_owed:
                    self._lines.append("")
            self._line = " " * self._indent + text
            self._indent = None
        self._is_blank_owed = False
        self._blank = ""

    def _end_line(self, indent: int, instead: str | None) -> None:
        if instead is None:
            self._indent = indent
        else:
            self._blank = instead

    def _remark(self, indent: int, remark: Remark) -> None:
        for at, (text, is_after_blank) in enumerate(remark.comments):
            if at == 0 and remark.is_trailing and self._line:
                self._line += f"  {text}"
            else:
                self._is_blank_owed = is_after_blank
                self._indent = indent
                self._write(text)
            self._indent = indent

    def _fits(self, doc: Doc) -> bool:
        """Whether a group can be flat: it, and what follows up to the next break, has room."""
        if self._indent is None:
            room = WIDTH - len(self._line) - len(self._blank)
        else:
            room = WIDTH - self._indent
        following = (part for _, _, part in reversed(self._todo))
        for width, may_end in _widths(doc, following):
            room -= width
            if may_end is not None or room < 0:
                return bool(may_end) and room >= 0
        return True


def _widths(group: Doc, following: Iterator[Doc]) -> Iterator[tuple[int, bool | None]]:
    """Widths of the texts to come; with True where a line may end there, False where it must.

    Iterators instead of lists keep a look ahead from touching more than it needs.
    """
    todo: list[tuple[bool, Iterator[Doc]]] = [(False, following), (True, iter((group,)))]
    while todo:
        is_flat, docs = todo[-1]
        doc = next(docs, None)
        if doc is None:
            todo.pop()
        elif isinstance(doc, str):
            yield len(doc), None
        elif isinstance(doc, tuple):
            todo.append((is_flat, iter(doc)))
        elif isinstance(doc, (Nest, Group)):
            todo.append((is_flat, iter((doc.doc,))))
        elif isinstance(doc, (Line, Remark)):
            if not is_flat:
                yield 0, True
            elif isinstance(doc, Remark) or doc.flat is None:
                yield 0, False
            else:
                yield len(doc.flat), None
        elif isinstance(doc, WhenBroken) and not is_flat:
            yield len(doc.text), None
