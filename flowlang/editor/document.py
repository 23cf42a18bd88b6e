"""An open file: its text, what was read of it, and what checking it found.

Layer 4. The text is read at each change, which is quick; checking it is asked for when there is
time, and may finish when the text has moved on: what it found is kept by the parts of the file, and
those that have not changed since still know their places.
"""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from flowlang.diagnostics import CompileError, Diagnostic, Span, in_order
from flowlang.editor.lines import Lines
from flowlang.plan.declare import NOTHING_OPEN, Choices
from flowlang.plan.inspect import (
    Draft,
    Findings,
    Part,
    Reader,
    arriving,
    changed,
    inspect,
)
from flowlang.plan.module import Module, PythonFile
from flowlang.plan.ops import OPS, Op
from flowlang.plan.types import Type
from flowlang.syntax import tree

Named: TypeAlias = tree.Use | tree.Param | tree.TypeDef | tree.Flow
LONG = 4000  # characters of a part that are read while a key press waits; more takes too long
NOTHING = Findings((), {}, None)


class Document:
    """A flow file as an editor has it. `path` need not exist; files are looked for beside it.

    `texts` are those of all files that the editor has open, by their real paths: the files that
    this one uses are read from there first.
    """

    def __init__(
        self,
        path: str,
        text: str,
        encoding: str = "utf-16",
        texts: Mapping[str, str] = NOTHING_OPEN,
    ) -> None:
        self.path = path
        self.texts = texts
        self.encoding = encoding
        self.findings = NOTHING
        self.check_s = 0.0  # how long the last check took
        self._reader = Reader(path)
        self.change(text)
        self._checked = self.draft

    @property
    def folder(self) -> Path:
        return Path(self.path).parent

    @property
    def text(self) -> str:
        return self.draft.source.text

    def change(self, text: str) -> None:
        """Take a new text."""
        self.lines = Lines(text, self.encoding)
        self.draft = self._reader.read(text)

    def check(self) -> tuple[Draft, Findings]:
        """Check the text as it is now; for a thread that has time."""
        draft, start_s = self.draft, time.monotonic()
        findings = inspect(draft, choices(), self.texts)
        if self.findings is not NOTHING:  # the first one also loads what checking needs
            self.check_s = time.monotonic() - start_s
        return draft, findings

    def accept(self, draft: Draft, findings: Findings) -> None:
        """Keep what a check found."""
        self._checked, self.findings = draft, findings

    def known(self) -> list[Diagnostic]:
        """What is known to be wrong before the text is checked: what cannot be read, and what was
        found in the parts that have stayed as they were."""
        read = [d for part in self.draft.parts for d in part.diagnostics]
        kept = [d for d in self.findings.diagnostics if self.draft.place(d.span) is not None]
        return in_order([*read, *kept])

    def part(self, offset: int) -> tuple[Part, int]:
        """The part at an offset, and the offset in it."""
        index = self.draft.index(offset)
        part = self.draft.parts[index]
        return part, min(offset - self.draft.starts[index], len(part.source.text))

    def arriving(self, offset: int, probe: tuple[str, int, int]) -> tuple[Type, ...]:
        """What arrives at an offset, told by a text for its part and the place to look at there."""
        text, start, end = probe
        index = self.draft.index(offset)
        if len(text) > LONG:
            return self._remembered(index, text[:start])
        try:
            part = changed(self.draft.parts[index], text)
            return arriving(self.draft, index, part, (start, end), choices(), self.texts)
        except CompileError:
            return ()

    def _remembered(self, index: int, head: str) -> tuple[Type, ...]:
        """What the last check saw pass where a part that starts with `head` is typed in."""
        if index >= len(self._checked.parts):
            return ()
        source = self._checked.parts[index].source
        end = len(head.rstrip().removesuffix("->").rstrip())
        return self.findings.ending(source, end) if source.text[:end] == head[:end] else ()

    def place(self, span: Span) -> tuple[int, int] | None:
        """Start and end of a span in the text as it is now; None for one elsewhere, or gone."""
        return self.draft.place(span)

    # What the file declares

    def declarations(self, but: Part | None = None) -> Iterator[tuple[tree.Item, int]]:
        """Every declaration that could be read, and the offset that its spans count from.

        The part that is being typed in can be left out, which then need not be read.
        """
        for part, start in zip(self.draft.parts, self.draft.starts, strict=True):
            for item in part.program.items if part is not but else ():
                yield item, start

    def declared(self, name: str, but: Part | None = None) -> tuple[Named, int] | None:
        """The declaration of a name, and the offset that its spans count from."""
        for item, start in self.declarations(but):
            if not isinstance(item, tree.Schedule) and item.name == name:
                return item, start
        return None

    def used(self, path: str) -> Module | PythonFile | None:
        """The file that a name stands for, or `a.b` the one that `a` calls b, once checked."""
        found: Module | PythonFile | None = self.findings.module
        for name in path.split("."):
            found = found.uses.get(name) if isinstance(found, Module) else None
        return found

    def uses(self, path: str) -> bool:
        """Whether a file was read, by its real path, when this one was checked."""
        module = self.findings.module
        return module is not None and path in _files(module)

    def text_of(self, path: Path) -> str:
        """What a file holds: as the editor has it, if it is open. Raises OSError."""
        text = self.texts.get(os.path.realpath(path))
        if text is not None:
            return text
        return path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")

    def operator(self, name: str) -> Op | None:
        """The operator of a name, one of the language or of a Python file."""
        alias, _, rest = name.rpartition(".")
        used = self.used(alias) if alias else None
        return used.operators.get(rest) if isinstance(used, PythonFile) else OPS.get(name)

    def flow(self, name: str, but: Part | None = None) -> tree.Flow | None:
        """The flow of a name, of this file or of one that it uses."""
        alias, _, rest = name.rpartition(".")
        used = self.used(alias) if alias else None
        if isinstance(used, Module):
            return used.flows.get(rest)
        declared = self.declared(name, but)
        item = declared[0] if declared else None
        return item if isinstance(item, tree.Flow) else None


def _files(module: Module) -> set[str]:
    """The real paths of all that a module uses."""
    found: set[str] = set()
    stack: list[Module | PythonFile] = [module]
    while stack:
        used = stack.pop()
        path = os.path.realpath(used.source.name if isinstance(used, Module) else used.path)
        if path not in found:
            found.add(path)
            stack += used.uses.values() if isinstance(used, Module) else ()
    return found


def choices() -> Choices:
    """What is chosen outside a file that is only looked at: nothing but the environment."""
    return Choices({}, os.environ)
