"""The comments and blank lines of one file, handed out in order as parts of a document.

Layer 1, the formatter's only look at source text. A comment goes to the first taker that asks for
comments up to a place behind it, so none is lost, doubled or moved past another.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

from flowlang.syntax.layout import BLANK, NOTHING, Doc, Remark
from flowlang.syntax.tree import Comment, Program

# Both run only over text the parser has accepted, where code follows every comment.
_EDITION = re.compile(r"(?:[ \t\r\n]|#[^\n]*\n)*(flowlang)(?:[ \t\r\n]|#[^\n]*\n)*[0-9]+")
_TO_CLOSER = re.compile(r"(?:[ \t\r\n,]|#[^\n]*\n)*\)")


class Remarks:
    """What is left of the comments of a file. Places are offsets into its text."""

    def __init__(self, comments: Sequence[Comment], text: str) -> None:
        self._comments = comments
        self._starts = [c.span.start for c in comments]
        self._text = text
        self._taken = 0

    @classmethod
    def of(cls, program: Program) -> Remarks:
        return cls(program.comments, program.span.source.text)

    @property
    def end(self) -> int:
        return len(self._text)

    def edition(self) -> tuple[int, int]:
        """Start of the word `flowlang` and end of the number after it."""
        found = _EDITION.match(self._text)
        return (found.start(1), found.end()) if found else (0, 0)

    def closer(self, last: int) -> int:
        """End of the `)` behind a last element that ends at `last`."""
        found = _TO_CLOSER.match(self._text, last)
        return found.end() if found else last

    def are_between(self, start: int, end: int) -> bool:
        """Whether there is a comment between two places."""
        return bisect_left(self._starts, start) < bisect_left(self._starts, end)

    def before(self, until: int, after: int | None = None) -> Doc:
        """The comments up to a place; `after` is the end of the code that the first may trail."""
        comments = self._take(until)
        if not comments:
            return NOTHING
        return Remark(
            tuple((c.text.rstrip(), False) for c in comments), self._is_trailing(comments, after)
        )

    def between(
        self, after: int | None, start: int | None, until: int, *, is_parted: bool = False
    ) -> tuple[Doc, bool]:
        """The comments and blank lines between two statements; and whether there are none.

        The first ends at `after` (None at an opening), the second starts at `start` (None at a
        closing) and has its first comment-free place at `until`. Where `is_parted`, there is
        a blank line. A comment behind the first statement on its line does not count.
        """
        comments = self._take(until)
        is_trailing = self._is_trailing(comments, after)
        starts = [c.span.start for c in comments] + ([] if start is None else [start])
        ends = [after, *(c.span.end for c in comments)]
        blanks = [self._is_blank(*ends_at) for ends_at in zip(ends, starts, strict=False)]
        if is_parted and not any(blanks):
            blanks[int(is_trailing)] = True
        is_blank = start is not None and blanks[-1]
        doc: Doc = BLANK if is_blank else NOTHING
        if comments:
            texts = [c.text.rstrip() for c in comments]
            doc = (Remark(tuple(zip(texts, blanks, strict=False)), is_trailing), doc)
        return doc, not is_blank and len(comments) == int(is_trailing)

    def _take(self, until: int) -> Sequence[Comment]:
        first = self._taken
        self._taken = max(first, bisect_left(self._starts, until))
        return self._comments[first : self._taken]

    def _is_trailing(self, comments: Sequence[Comment], after: int | None) -> bool:
        if not comments or comments[0].is_own_line:
            return False
        return after is None or "\n" not in self._text[after : comments[0].span.start]

    def _is_blank(self, end: int | None, start: int) -> bool:
        return end is not None and self._text.count("\n", end, start) > 1
