"""Offsets in a text to positions as editors count them, and back.

Layer 4. Lines end as the Language Server Protocol says, in `\\n`, `\\r\\n` or `\\r`. A character
counts as it does for the protocol's client: in code units of UTF-16, UTF-8 or UTF-32.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right

_LINE_END = re.compile(r"\r\n|\n|\r")
_ENCODINGS = {"utf-8": ("utf-8", 1), "utf-16": ("utf-16-le", 2)}  # and the bytes of a unit


class Lines:
    """The lines of one text. `encoding` is `utf-16`, `utf-8` or `utf-32`."""

    def __init__(self, text: str, encoding: str = "utf-16") -> None:
        self.text = text
        self.encoding = encoding
        self._starts = [0]
        self._ends: list[int] = []
        if "\r" not in text:
            # One pass over a few thousand lines at each key press: this is the quick way.
            self._starts += itertools.accumulate(len(line) + 1 for line in text.split("\n"))
            self._ends = [start - 1 for start in self._starts[1:]]
            self._starts.pop()
            return
        for found in _LINE_END.finditer(text):
            self._ends.append(found.start())
            self._starts.append(found.end())
        self._ends.append(len(text))

    def position(self, offset: int) -> tuple[int, int]:
        """Line and character, both from 0, of an offset; inside a line end, the end of its line."""
        offset = min(max(offset, 0), len(self.text))
        line = bisect_right(self._starts, offset) - 1
        start = self._starts[line]
        return line, self._units(self.text[start : min(offset, self._ends[line])])

    def offset(self, line: int, character: int) -> int:
        """The offset of a position; one beyond its line is at the line's end, as the protocol says.

        A position inside a character (between two code units) is at the character's start.
        """
        if line >= len(self._starts):
            return len(self.text)
        start, end = self._starts[line], self._ends[line]
        text = self.text[start:end]
        if text.isascii() or self.encoding == "utf-32":
            return start + min(character, len(text))
        for at, char in enumerate(text):
            character -= self._units(char)
            if character < 0:
                return start + at
        return end

    def _units(self, text: str) -> int:
        if text.isascii() or self.encoding not in _ENCODINGS:
            return len(text)
        codec, size = _ENCODINGS[self.encoding]
        return len(text.encode(codec, "surrogatepass")) // size
