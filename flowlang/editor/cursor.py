"""Where a cursor stands in a program that is being typed, and how the text before it may go on.

Layer 4. The grammar has no word for half a program, so this walks over the tokens up to the cursor
with a stack of what is open. It never fails, takes what is wrong before the cursor as it comes, and
knows no operator and no type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from flowlang.syntax.scan import CLOSER, DECLARATIONS, declares, starts_line

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<open>"[^\n]*)
      | (?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:us|ms|s|KiB|MiB|GiB|%)?)
      | (?P<field>\.[A-Za-z_][A-Za-z0-9_]*)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<mark>->|=>|\?\?|\.\.\.|\.\.|[=!<>]=|\S)""",
    re.VERBOSE,
)
_TYPED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")
_OWNER = re.compile(r"\.?[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*$")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BEGUN = re.compile(r"[a-z]+(?:\s+\w*)?")  # a declaration of which no more has been typed
_COPIES = re.compile(r"x[0-9]+")
_LET = re.compile(r"^[ \t]*(let[ \t]+([A-Za-z_][A-Za-z0-9_]*)|return\b)", re.MULTILINE)
LONG = 8000  # characters of a body, from which its lets are not all walked over
PROBE = "pass"  # stands for what is being typed: it gives what arrives

# What an open bracket's contents start with, and what follows a comma in them.
_FIRST = {
    "call": "argument",
    "setting": "setting",
    "inputs": "input",
    "record": "field-name",
    "fields": "new-field",
    "arms": "pattern",
    "list": "stage",
    "types": "type-argument",
    "entries": "entry",
    "body": "statement",
    "group": "stage",
}
_BRACKET = {
    **dict.fromkeys(("call", "setting", "inputs", "group"), "("),
    **dict.fromkeys(("record", "fields", "arms", "entries", "body"), "{"),
    "list": "[",
    "types": "<",
}


@dataclass(slots=True)
class Frame:
    """Something that is open: a declaration, or brackets of some kind.

    `wants` is what can come next, `callee` what the brackets belong to, `argument` the argument
    that is being given, `given` those that were; `owed` are the words its `if`s still need.
    """

    kind: str
    wants: str
    callee: str = ""
    argument: str = ""
    given: list[str] = field(default_factory=list)
    owed: list[str] = field(default_factory=list)
    path: tuple[str, int, int] = ("", 0, 0)
    is_header: bool = False
    is_match: bool = False
    is_after_arrow: bool = False
    is_past: bool = False  # in arms: behind `=>`; in a body: behind `return`
    naming: str = ""


@dataclass(frozen=True, slots=True)
class Cursor:
    """What is being typed, from `start` to `offset`, and what could stand there.

    `wants` is the kind of thing; `owner` the path before a dot; `names` are the lets and inputs of
    the flow; `typed` is what is in the string around it. `stack` are the open frames, outermost
    first, and `statements` the starts and names of the lets of the body around it.
    """

    offset: int
    start: int
    wants: str
    stack: tuple[Frame, ...]
    owner: str = ""
    names: tuple[str, ...] = ()
    text: str = ""
    typed: str = ""
    statements: tuple[tuple[int, str], ...] = ()

    @property
    def frame(self) -> Frame:
        return self.stack[-1]

    @property
    def is_in_body(self) -> bool:
        return any(frame.kind == "body" for frame in self.stack)

    def probe(self) -> tuple[str, int, int]:
        """The text before the cursor made whole, and the place in it that shows what arrives.

        Of a body, the lets are left out that what is typed does not need.
        """
        text = _needed(self.text, self.statements)
        if self.owner:
            head, start = text, len(text) - len(self.owner)
        else:
            head, start = f"{text} {PROBE}", len(text) + 1
        return head + _closed(self.stack), start, len(head)


def locate(text: str, offset: int) -> Cursor:
    """Where the cursor stands in the text of a declaration."""
    before = text[:offset]
    word = _TYPED.search(before)
    start = word.start() if word else offset
    if start and before[start - 1].isdigit():
        return Cursor(offset, start, "nothing", (Frame("file", "nothing"),))
    is_field = before[:start].endswith(".") and not before[:start].endswith("..")
    head = before[: start - 1] if is_field else before[:start]
    lets = _lets(head)
    walk = _Walk(head[: lets[0][0]] + head[lets[-1][0] :] if lets else head)
    walk.run()
    stack = tuple(walk.stack)
    names = (*walk.names, *(name for _, name in lets[:-1]))
    statements = tuple(lets or walk.statements)
    if walk.is_in_comment:
        return Cursor(offset, start, "nothing", stack)
    if walk.string is not None:
        typed = before[len(head) - len(walk.text) + walk.string + 1 :]
        return Cursor(offset, start, "string", stack, "", names, head, typed)
    if not is_field:
        return Cursor(offset, start, stack[-1].wants, stack, "", names, head, "", statements)
    owner = _OWNER.search(head)
    if head[-1:].isdigit() and not owner:
        return Cursor(offset, start, "nothing", stack)
    wants = "type-field" if stack[-1].wants == "after-type" else "field"
    path = owner.group() if owner else ""
    return Cursor(offset, start, wants, stack, path, names, head, "", statements)


def _needed(text: str, statements: tuple[tuple[int, str], ...]) -> str:
    """A text up to the cursor without the lets whose names its last statement does not need."""
    if len(statements) < 2:
        return text
    starts = [start for start, _ in statements]
    last = text[starts[-1] :]
    words, kept = set(_WORD.findall(last)), [last]
    for (start, name), end in zip(statements[-2::-1], starts[:0:-1], strict=True):
        if name in words:
            kept.append(text[start:end])
            words.update(_WORD.findall(kept[-1]))
    return text[: starts[0]] + "".join(reversed(kept))


def _lets(text: str) -> list[tuple[int, str]]:
    """Of a long body, where the lines start that start with a let (or return), and its name."""
    if len(text) < LONG:
        return []
    return [(found.start(1), found.group(2) or "") for found in _LET.finditer(text)]


class _Walk:
    """Goes over the tokens of a text and keeps what is open."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.stack = [Frame("file", "declaration")]
        self.names: list[str] = []
        self.statements: list[tuple[int, str]] = []
        self.is_in_comment = False
        self._pending = ""  # a let that is being given its value, and cannot be named in it
        self.string: int | None = None  # where a string starts that the text ends in

    @property
    def top(self) -> Frame:
        return self.stack[-1]

    def run(self) -> None:
        for found in _TOKEN.finditer(self.text):
            kind, token, at = found.lastgroup or "", found.group(), found.start()
            is_last = found.end() == len(self.text)
            if kind == "comment":
                self.is_in_comment = is_last
            elif kind == "open" and is_last:
                self.string = at
            elif kind == "name":
                self._name(token, at)
            elif kind == "field":
                self._field(token, at)
            elif kind == "mark":
                self._mark(token, at)
            else:
                self._literal(token)

    # Words

    def _name(self, word: str, at: int) -> None:
        if word in DECLARATIONS and self._declares(at):
            self._declaration(word)
        elif word in _KEYWORDS and self._keyword(word, at):
            pass
        elif self.top.wants in ("name", "input"):
            self._named(word)
        elif self.top.wants in ("type", "type-argument"):
            self.top.wants = "after-type"
        elif _COPIES.fullmatch(word) and self.top.wants == "after":
            pass
        elif word == "flowlang" and self.top.wants == "declaration":
            self.top.wants = "edition"
        else:
            self._operand(word, at)

    def _declares(self, at: int) -> bool:
        """Whether a declaration's keyword starts one, as far as it has been typed."""
        is_outside = len(self.stack) == 1
        is_part = self.top.kind == "file" and self.top.naming == "export"
        if is_part or (is_outside and self.top.wants == "after"):
            return True
        is_begun = starts_line(self.text, at) and _BEGUN.fullmatch(self.text, at) is not None
        return is_begun or declares(self.text, at, is_outside)

    def _declaration(self, word: str) -> None:
        wants = {"use": "file", "export": "flow", "schedule": "schedule-name"}.get(word, "name")
        self.stack = [Frame("file", wants, naming=word)]
        self.names, self._pending, self.statements = [], "", []

    def _keyword(self, word: str, at: int) -> bool:
        """Take a word of the language. False where it stands for itself, as a field's name."""
        top = self.top
        if word == "if":
            top.owed.append("then")
        elif word == "then" and top.owed:
            top.owed[-1] = "else"
        elif word == "else" and top.kind == "arms" and not top.is_past:
            top.wants = "after-pattern"
            return True
        elif word == "else" and top.owed:
            top.owed.pop()
        elif word == "match":
            top.is_match = True
            top.wants = "subject"
            return True
        elif word == "as":
            top.wants = "name" if top.naming == "use" else "type"
            return True
        elif word in ("let", "return"):
            self._statement(word, at)
            return True
        elif word not in ("and", "or", "not"):
            return False
        self._expects("stage")
        return True

    def _statement(self, word: str, at: int) -> None:
        """`let` and `return` close what was left open in the body before them."""
        body = next((i for i, f in enumerate(self.stack) if f.kind == "body"), None)
        if body is not None:
            del self.stack[body + 1 :]
        top = self.top
        if self._pending:
            self.names.append(self._pending)
            self._pending = ""
        self.statements.append((at, ""))
        top.owed.clear()
        top.naming, top.is_past = word, word == "return"
        top.wants = "name" if word == "let" else "stage"

    def _named(self, word: str) -> None:
        top = self.top
        if top.kind == "inputs":
            self.names.append(word)
        elif top.naming == "let":
            self._pending = word
            self.statements[-1] = (self.statements[-1][0], word)
        top.wants = {"inputs": "colon", "body": "equals"}.get(top.kind, "header")
        top.is_header = top.kind == "file"

    def _operand(self, word: str, at: int) -> None:
        top = self.top
        top.path = (word, at, at + len(word))
        if top.kind != "entries" and not (top.kind == "file" and top.naming == "schedule"):
            top.wants = "after-name" if top.wants == "field-name" else "after"

    def _field(self, token: str, at: int) -> None:
        top = self.top
        name, start, end = top.path
        if top.wants == "after-type" or (top.wants in ("after", "entry") and end == at):
            top.path = (name + token, start, at + len(token))
            return
        top.path = (token, at, at + len(token))
        top.wants = "after-subject" if top.wants == "subject" else "after"

    def _literal(self, token: str) -> None:
        top = self.top
        if top.naming == "use":
            top.wants = "after"
        elif top.wants == "edition":
            top.wants = "declaration"
        elif top.wants not in ("type-argument", "type"):
            top.wants = "after"
        else:
            top.wants = "after-type"
        top.path = ("", 0, 0)

    # Marks

    def _mark(self, mark: str, at: int) -> None:
        if mark in "([{" or (mark == "<" and self.top.wants == "after-type"):
            self._open(mark, at)
        elif mark in ")]}" or (mark == ">" and self.top.kind == "types"):
            self._close(mark)
        elif mark == ",":
            top = self.top
            top.argument, top.is_past = "", False
            top.owed.clear()
            top.wants = _FIRST.get(top.kind, "after")
        elif mark == ":":
            self._colon()
        elif mark == "=":
            self._equals()
        elif mark == "->":
            is_type = self.top.is_header
            self._expects("type" if is_type else "stage")
            self.top.is_after_arrow = not is_type
        elif mark == "=>":
            self.top.is_past = True
            self._expects("stage")
        elif mark == "|" and self.top.kind == "arms" and not self.top.is_past:
            self.top.wants = "pattern"
        elif mark == "?" and self.top.wants in ("after-type", "type-argument"):
            self.top.wants = "after-type"
        elif mark in ("...", ".."):
            self.top.wants = "after"
        elif mark != ".":
            self._expects("operand")

    def _expects(self, wants: str) -> None:
        self.top.wants = wants
        self.top.path = ("", 0, 0)
        self.top.is_after_arrow = False

    def _colon(self) -> None:
        top = self.top
        is_type = top.is_header or top.kind in ("inputs", "fields")
        self._expects("type" if is_type else "stage")

    def _equals(self) -> None:
        top = self.top
        if top.kind in ("call", "setting"):
            top.argument = top.path[0]
            top.given.append(top.argument)
            self._expects("value" if top.kind == "call" else "setting-value")
        elif top.kind == "inputs":
            self._expects("constant")
        else:
            top.is_header = False
            self._expects({"type": "type", "param": "constant"}.get(top.naming, "stage"))

    def _open(self, mark: str, at: int) -> None:
        top = self.top
        kind = self._kind(mark, at)
        callee = top.path[0] if kind in ("call", "setting", "types") else ""
        if kind == "types":
            named = re.search(r"([A-Za-z_][A-Za-z0-9_.]*)\s*$", self.text[:at])
            callee = named.group(1) if named else ""
        top.is_match = top.is_match and kind != "arms"
        self.stack.append(Frame(kind, _FIRST[kind], callee))

    def _kind(self, mark: str, at: int) -> str:
        top = self.top
        if mark == "(":
            if top.is_header:
                return "inputs"
            if top.path[0] and top.path[2] == at:
                return "setting" if top.kind == "entries" else "call"
            return "group"
        if mark in "[<":
            return "list" if mark == "[" else "types"
        if top.wants in ("type", "type-argument"):
            return "fields"
        if top.is_match:
            return "arms"
        if top.is_header:
            return "body"
        return "entries" if top.naming == "schedule" else "record"

    def _close(self, mark: str) -> None:
        """Close what this bracket closes, and all that was left open in it."""
        for depth in range(len(self.stack) - 1, 0, -1):
            kind = self.stack[depth].kind
            if (CLOSER.get(_BRACKET[kind]) or ">") == mark:
                del self.stack[depth:]
                self._closed(kind)
                return

    def _closed(self, kind: str) -> None:
        top = self.top
        top.path = ("", 0, 0)
        top.wants = "after"
        if kind in ("types", "fields"):
            top.wants = "after-type"
        elif kind == "inputs":
            top.wants = "header"
        elif kind == "setting":
            top.wants = "entry"
        elif kind == "body":
            self.names = []
            top.is_header = False


_KEYWORDS = frozenset({"if", "then", "else", "match", "as", "let", "return", "and", "or", "not"})
_BRANCHES = {"then": " then pass else pass", "else": " else pass"}


def _closed(stack: tuple[Frame, ...]) -> str:
    """What closes the open frames, so that the grammar can read what was typed so far."""
    out: list[str] = []
    for frame in reversed(stack):
        if frame.is_match:
            out.append(" { else => pass }")
        out += [_BRANCHES[owed] for owed in reversed(frame.owed)]
        if frame.kind == "arms":
            out.append(", else => pass }" if frame.is_past else " => pass, else => pass }")
        elif frame.kind == "body":
            out.append(" }" if frame.is_past else " return pass }")
        elif frame.kind in _BRACKET:
            out.append(CLOSER.get(_BRACKET[frame.kind], ">"))
    return "".join(out)
