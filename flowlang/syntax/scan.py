"""A first, forgiving look at source text: comments, brackets, declaration keywords.

Layer 1. It never fails: where the grammar gives up, this finds the comments, the bracket that was
left open, and the next declaration from which reading can go on.
"""

from __future__ import annotations

import difflib
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
      | (?P<close>[)\]}])
      | (?P<mark>->|=>|[=!<>]=|[-+*/,:<>|])""",
    re.VERBOSE,
)
# What makes a tree deeper without a bracket, and what such an expression ends at.
_OPERATORS = frozenset({"not", *"+-*/>", "==", "!=", "<=", ">="})
_ENDS = frozenset({",", "->", "=>", "let", "return"})
_LEADING = DECLARATIONS | {"->", ":", "as"}  # what a name behind a line's end goes on from
_HEADER = re.compile(
    r"""export\s+flow\b
      | (flow|param|type)\s+\w+\s*[=:({]
      | use\s*"
      | schedule\s*(\w+\s*)?\{""",
    re.VERBOSE,
)
_LINE = re.compile(
    r"^[ \t]*((?:export\b(?:\s|\#[^\n]*)*)?flow|export|use|param|type|schedule)\b", re.MULTILINE
)
# What stands at the start of a declaration and nowhere else, but for the word it starts with.
_HEADLESS = re.compile(
    r"""(?P<word>[A-Za-z_]\w*)[ \t]+(?P<name>[A-Za-z_]\w*)\s*(?P<mark>[=:](?![=>])|[({])
      | (?P<nameless>[A-Za-z_]\w*)\s*(?P<equals>[=:](?![=>]))
      | (?P<other>[A-Za-z_]\w*)[ \t]*
        (?:\{|flow\s+[A-Za-z_]|"[^"\n]*"(?:\s*as\s+(?P<file>\w+))?)""",
    re.VERBOSE,
)
_FOREIGN = {
    **dict.fromkeys(("import", "include"), "use"),
    **dict.fromkeys(("def", "fn", "func", "function"), "flow"),
    **dict.fromkeys(("const", "var", "val"), "param"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    kind: str
    text: str
    start: int


def pieces(text: str) -> Iterator[Piece]:
    """Comments, strings, words, brackets and a few marks of a text, in order."""
    for found in _PIECE.finditer(text):
        yield Piece(found.lastgroup or "", found.group(), found.start())


@dataclass(frozen=True, slots=True)
class Headless:
    """A declaration that starts with another word than the language has, or with its name.

    `word` is what it starts with (nothing where that is its name) and `meant` what it should be, as
    far as that can be told; `end` is behind the mark after its name.
    """

    start: int
    end: int
    word: str
    meant: str | None
    name: str


@dataclass(frozen=True, slots=True)
class Outline:
    """What the scan found. `depth` is the deepest nesting and `deepest` where it is.

    `headless` counts only in a text that cannot be read: a right one may go on like this behind a
    line's end.
    """

    comments: tuple[Comment, ...]
    declarations: tuple[int, ...]
    headless: tuple[Headless, ...]
    unclosed: tuple[Piece, ...]
    depth: int
    deepest: int


@dataclass(slots=True)
class _Level:
    """What is known of an open bracket: how deep it is so far, and its expression in hand."""

    height: int = 0
    ifs: int = 0
    joints: int = 0  # `and`, `or` and `|`, between which many operands make few levels
    operand: int = 0  # operators in the one in hand
    operators: int = 0  # in the operand that has most
    inner: int = 0
    angles: int = 0  # of types: `<` that no `>` has closed

    def join(self) -> None:
        """An operand of `and` or `or` ends."""
        self.operators = max(self.operators, self.operand)
        self.joints += 1
        self.operand = 0

    def settle(self) -> int:
        """The expression in hand ends: how deep the bracket is now."""
        most = self.ifs + 2 * self.joints.bit_length() + max(self.operators, self.operand)
        self.height = max(self.height, most + self.angles + self.inner)
        self.ifs = self.joints = self.operand = self.operators = self.inner = 0
        return self.height


class _Depth:
    """How deep the parser's tree can be at most: brackets, operators and types in one another."""

    def __init__(self) -> None:
        self.brackets: list[Piece] = []
        self.most = self.most_at = 0
        self._levels = [_Level()]

    def open(self, piece: Piece) -> None:
        self.brackets.append(piece)
        self._levels.append(_Level())

    def close(self, piece: Piece) -> None:
        if self.brackets and CLOSER[self.brackets[-1].text] == piece.text:
            self._fold(self.brackets.pop())

    def word(self, piece: Piece) -> None:
        level = self._levels[-1]
        if piece.text in _ENDS:
            self._note(level.settle(), piece)
        elif piece.text in ("and", "or", "|"):
            level.join()
        elif piece.text == "if":
            level.ifs += 1
        elif piece.text in _OPERATORS:
            level.operand += 1
        if piece.text == "<":
            level.angles += 1
            level.height = max(level.height, level.angles)
        elif piece.text == ">" and level.angles:
            level.angles -= 1

    def restart(self, piece: Piece) -> None:
        """A declaration starts, so whatever expression was in hand has ended."""
        self._note(self._levels[-1].settle(), piece)
        self._levels[-1].angles = 0

    def end(self) -> None:
        """The file ends: what is still open is measured too."""
        for piece in reversed(self.brackets):
            self._fold(piece)
        self._note(self._levels[-1].settle(), None)

    def _fold(self, opening: Piece) -> None:
        height = self._levels.pop().settle() + 1
        self._levels[-1].inner = max(self._levels[-1].inner, height)
        self._note(height, opening)

    def _note(self, height: int, piece: Piece | None) -> None:
        if height > self.most:
            self.most, self.most_at = height, piece.start if piece else self.most_at


def outline(source: Source) -> Outline:
    """Scan a whole source."""
    comments: list[Comment] = []
    declarations: list[int] = []
    headless: list[Headless] = []
    depth = _Depth()
    previous = ""
    for piece in pieces(source.text):
        if piece.kind == "comment":
            comments.append(_comment(source, piece))
            continue
        if piece.kind == "open":
            depth.open(piece)
        elif piece.kind == "close":
            depth.close(piece)
        elif piece.text in DECLARATIONS:
            if previous != "export" and declares(source.text, piece.start, not depth.brackets):
                declarations.append(piece.start)
                depth.restart(piece)
        elif piece.kind != "string":
            depth.word(piece)
            is_outside = piece.kind == "word" and not depth.brackets
            if is_outside and previous not in _LEADING and starts_line(source.text, piece.start):
                headless += _headless(source.text, piece.start)
        previous = piece.text
    unclosed = tuple(depth.brackets)
    depth.end()
    return Outline(
        tuple(comments), tuple(declarations), tuple(headless), unclosed, depth.most, depth.most_at
    )


def declares(text: str, at: int, is_outside: bool) -> bool:
    """Whether the declaration keyword at a place starts one: outside brackets, or by its looks."""
    is_first = starts_line(text, at)
    if is_outside and is_first:
        return True
    return (is_outside or is_first) and _HEADER.match(text, at) is not None


def declaring_lines(text: str) -> Iterator[int]:
    """Where the lines start that start with a declaration.

    Much quicker than an outline: most are told by their looks, so that brackets need no counting.
    """
    opened = seen = 0
    for found in _LINE.finditer(text):
        at = found.start(1)
        if _HEADER.match(text, at) is None:
            kinds = [piece.kind for piece in pieces(text[seen:at])]
            opened, seen = max(0, opened + kinds.count("open") - kinds.count("close")), at
            if opened:
                continue
        opened, seen = 0, at
        yield found.start()


def starts_line(text: str, at: int) -> bool:
    """Whether only blanks stand before a place on its line."""
    return not text[text.rfind("\n", 0, at) + 1 : at].strip()


def _headless(text: str, at: int) -> Iterator[Headless]:
    """The declaration at a place, if its name and mark are there and its word is not."""
    found = _HEADLESS.match(text, at)
    if found is None or found.group().split()[0] in RESERVED:
        return
    word = found["word"] or found["other"] or ""
    name = found["name"] or found["nameless"] or found["file"] or ""
    meant = declaration_like(word) if word else None
    # What could as well be two stages needs a word that is one letter off.
    is_sure = found["mark"] in ("=", ":") or found["equals"] is not None or meant is not None
    if is_sure and name not in RESERVED and not re.fullmatch(r"x[0-9]+", name):
        yield Headless(at, found.end(), word, meant, name)


def declaration_like(word: str) -> str | None:
    """The word of a declaration that another one is meant for."""
    like = difflib.get_close_matches(word, sorted(DECLARATIONS), n=1, cutoff=0.7)
    return _FOREIGN.get(word) or (like[0] if like else None)


def _comment(source: Source, piece: Piece) -> Comment:
    line_start = source.text.rfind("\n", 0, piece.start) + 1
    span = Span(source, piece.start, piece.start + len(piece.text))
    before = source.text[line_start : piece.start]
    return Comment(piece.text.rstrip(), not before.strip(), span)


_WINDOW = 2000  # characters looked back at, so that a long file costs no more than a short one
_TOKEN = re.compile(r""""(?:\\.|[^"\\\n])*"|#[^\n]*|[\w.%]+|\S""")


def _tokens_before(text: str, end: int) -> list[re.Match[str]]:
    found = _TOKEN.finditer(text, max(0, end - _WINDOW), end)
    return [t for t in found if not t.group().startswith("#")]


def _opening(tokens: list[re.Match[str]], last: int) -> int | None:
    """Index of the bracket that is open before token `last`."""
    level = 0
    for index in range(last - 1, -1, -1):
        token = tokens[index].group()
        level += (token in ")]}") - (token in "([{")
        if level < 0:
            return index
    return None


def lacks_return(text: str, at: int) -> bool:
    """Whether a body ends behind a place without a `return`."""
    level = 0
    for found in _TOKEN.finditer(text, at, at + _WINDOW):
        token = found.group()
        level += (token in "([{") - (token in ")]}")
        if token == "return" or level < 0:
            return token == "}"
    return False


def is_let(text: str, at: Span) -> bool:
    """Whether a name is that of a `let` before it, in the same body."""
    body = text[max(0, text.rfind("return", 0, at.start), at.start - _WINDOW) : at.start]
    return re.search(rf"\blet\s+{re.escape(at.text)}\b", body) is not None


def stage_before(text: str, end: int) -> tuple[int, int] | None:
    """Where the call, string, name or bracket that ends just before `end` starts and ends."""
    tokens = _tokens_before(text, end)
    at = last = len(tokens) - 1
    if at > 0 and re.fullmatch(r"x[0-9]+", tokens[at].group()):
        at -= 1
    if at < 0 or tokens[at].group() in "([{,":
        return None
    if tokens[at].group() in ")]}":
        opening = _opening(tokens, at)
        if opening is None:
            return None
        at = opening
        before = tokens[at - 1] if at else None
        if before and before.end() == tokens[at].start() and before.group()[0].isidentifier():
            at -= 1
    return tokens[at].start(), tokens[last].end()


def stage_after(text: str, start: int) -> tuple[int, int]:
    """Where the call or name that starts at `start` ends."""
    level = 0
    end = start
    for found in _TOKEN.finditer(text, start, start + _WINDOW):
        token = found.group()
        is_first = found.start() == start
        if not is_first and not level and (token != "(" or found.start() != end):
            break
        level += (token in "([{") - (token in ")]}")
        end = found.end()
        if level < 0:
            break
    return start, end


def open_bracket(text: str, at: int) -> str | None:
    """The bracket that is open at a place, if one is near."""
    tokens = _tokens_before(text, at)
    opening = _opening(tokens, len(tokens))
    return None if opening is None else tokens[opening].group()


def is_in_call(text: str, at: int) -> bool:
    """Whether a place is among the arguments of a call."""
    tokens = _tokens_before(text, at)
    opening = _opening(tokens, len(tokens))
    if not opening or tokens[opening].group() != "(":
        return False
    before = tokens[opening - 1]
    is_name = before.group()[0].isidentifier() and before.group() not in RESERVED
    return is_name and before.end() == tokens[opening].start()
