"""Word lists: text files of names or characters, one a line, that a flow names.

Layer 2.
"""

from __future__ import annotations

from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without their line ends. Raises OSError, or ValueError for no text.

    Only line feeds end a line: a recogniser's characters include the other separators of Unicode.
    """
    text = path.read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("a NUL")  # as in UTF-16 without its mark
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines
