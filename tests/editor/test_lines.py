"""Offsets and positions: every character has its place, in whatever units the editor counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlang.editor.lines import Lines

MIXED = 'a\N{CJK UNIFIED IDEOGRAPH-4E16}\U0001f642"x'  # 1, 3 and 4 bytes; 1, 1 and 2 units
TEXTS = st.text(st.sampled_from("ab\n\r\t\u2028\x0c\u4e16\U0001f642\u0301"), max_size=40)


@pytest.mark.parametrize(
    ("encoding", "places"),
    [
        ("utf-8", [0, 1, 4, 8, 9, 10]),
        ("utf-16", [0, 1, 2, 4, 5, 6]),
        ("utf-32", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_characters_count_as_the_editor_counts(encoding: str, places: list[int]) -> None:
    """A character is as many units as its encoding has."""
    lines = Lines(f"first\n{MIXED}", encoding)
    assert [lines.position(6 + i) for i in range(6)] == [(1, place) for place in places]
    assert [lines.offset(1, place) for place in places] == [6 + i for i in range(6)]


def test_a_position_inside_a_character_is_at_its_start() -> None:
    """Half a surrogate pair is no place for a cursor."""
    assert Lines("\U0001f642b").offset(0, 1) == 0
    assert Lines("\U0001f642b").offset(0, 2) == 1


def test_lines_end_as_the_protocol_says() -> None:
    """Not at form feeds or line separators, which Python would split at."""
    lines = Lines("a\u2028b\x0cc\r\nd\re\nf")
    assert [lines.position(i)[0] for i in (0, 4, 7, 9, 11)] == [0, 0, 1, 2, 3]


def test_places_beyond_the_text_are_at_its_end() -> None:
    """A position past a line is at its end, one past the file at the file's."""
    lines = Lines("ab\ncd\n")
    assert (lines.offset(0, 99), lines.offset(1, 99), lines.offset(99, 0)) == (2, 5, 6)
    assert (lines.position(-3), lines.position(99)) == ((0, 0), (2, 0))
    assert Lines("").position(0) == (0, 0)


@given(TEXTS, st.sampled_from(["utf-8", "utf-16", "utf-32"]))
def test_every_offset_comes_back(text: str, encoding: str) -> None:
    """An offset's position leads back to it, except between the two characters of one line end."""
    lines = Lines(text, encoding)
    for offset in range(len(text) + 1):
        line, character = lines.position(offset)
        inside = text[max(offset - 1, 0) : offset + 1] == "\r\n"
        assert lines.offset(line, character) == (offset - 1 if inside else offset)


@given(TEXTS)
def test_lines_without_returns_are_found_the_quick_way(text: str) -> None:
    """The quick way through a text gives the lines that the general one gives."""
    plain = text.replace("\r", "")
    marked = Lines(plain + "\r")
    for offset in range(len(plain)):
        assert Lines(plain).position(offset) == marked.position(offset)
