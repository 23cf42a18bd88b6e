"""A first, forgiving look at source text: comments, brackets, declaration keywords.

Layer 1. It never fails: where the grammar gives up, this finds the comments, the bracket that was
left open, and the next declaration from which reading can go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from flowlang.diagnostics import Source, Span
from flowlang.syntax.tree import Comment

RESERVED = frozenset(
    {
        *("flowlang", "use", "as", "param", "type", "export", "flow", "let", "return", "schedule"),
        *("match", "if", "then", "else", "not", "and", "or", "true", "false", "in"),
    }
)
DECLARATIONS = frozenset({"use", "param", "type", "export", "flow", "schedule"})
CLOSER = {"(": ")", "[": "]", "{": "}"}

_PIECE = re.compile(
    r"""(?P<comment>\#[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<word>\.?[A-Za-z_]\w*)
      | (?P<open>[(\[{])
      | (?P<close>[)\]}])""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Piece:
    kind: str
    text: str
    start: int


def pieces(text: str, start: int = 0) -> Iterator[Piece]:
    """Comments, strings, words and brackets of a text, in order."""
    for found in _PIECE.finditer(text, start):
        yield Piece(found.lastgroup or "", found.group(), found.start())


@dataclass(frozen=True, slots=True)
class Outline:
    """What the scan found. `depth` is the deepest nesting and `deepest` where it is."""

    comments: tuple[Comment, ...]
    declarations: tuple[int, ...]
    unclosed: tuple[Piece, ...]
    depth: int
    deepest: int


def outline(source: Source) -> Outline:
    """Scan a whole source. Prefix words that nest without a bracket count as depth too."""
    comments: list[Comment] = []
    declarations: list[int] = []
    open_brackets: list[Piece] = []
    depth = deepest = nested_words = 0
    previous = ""
    for piece in pieces(source.text):
        if piece.kind == "comment":
            comments.append(_comment(source, piece))
            continue
        if piece.kind == "open":
            open_brackets.append(piece)
        elif piece.kind == "close":
            if open_brackets and CLOSER[open_brackets[-1].text] == piece.text:
                open_brackets.pop()
        elif piece.text in DECLARATIONS and previous != "export":
            declarations.append(piece.start)
            nested_words = 0
        elif piece.text in ("if", "not"):
            nested_words += 1
        if len(open_brackets) + nested_words > depth:
            depth, deepest = len(open_brackets) + nested_words, piece.start
        previous = piece.text
    return Outline(tuple(comments), tuple(declarations), tuple(open_brackets), depth, deepest)


def _comment(source: Source, piece: Piece) -> Comment:
    line_start = source.text.rfind("\n", 0, piece.start) + 1
    span = Span(source, piece.start, piece.start + len(piece.text))
    before = source.text[line_start : piece.start]
    return Comment(piece.text.rstrip(), not before.strip(), span)


def stage_before(text: str, end: int) -> str:
    """The text of the call or name that ends just before `end`, blanks skipped."""
    end = len(text[:end].rstrip())
    start = end
    if text[start - 1 : start] == ")":
        level = 0
        while start > 0:
            start -= 1
            level += {")": 1, "(": -1}.get(text[start], 0)
            if level == 0:
                break
    while start > 0 and (text[start - 1].isalnum() or text[start - 1] in "_."):
        start -= 1
    return text[start:end]


def stage_after(text: str, start: int) -> str:
    """The text of the call or name that starts at `start`."""
    found = re.compile(r"[\w.]+").match(text, start)
    end = found.end() if found else start + 1
    if text[end : end + 1] == "(":
        level = 0
        for at in range(end, len(text)):
            level += {"(": 1, ")": -1}.get(text[at], 0)
            if level == 0:
                return text[start : at + 1]
    return text[start:end]
