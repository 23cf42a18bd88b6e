"""Which files beside a Python file it imports, read from its text without running it.

Layer 2. It is for those who watch over files: `flowlang.runtime.modules` is what imports them.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator

MAX_FILES = 1000


def imported_files(path: str, parsed: ast.Module) -> list[str]:
    """The files of a file's folder that it imports, and those that they import, in turn.

    An import counts wherever it stands, also in a function.
    """
    folder = os.path.dirname(path)
    found: dict[str, None] = {}
    reading = [(path, parsed)]
    while reading and len(found) < MAX_FILES:
        at, tree = reading.pop()
        for file in _imported(folder, at, tree):
            if file not in found and file != path:
                found[file] = None
                if (inner := _parsed(file)) is not None:
                    reading.append((file, inner))
    return list(found)


def _parsed(file: str) -> ast.Module | None:
    try:
        with open(file, "rb") as opened:
            return ast.parse(opened.read())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _imported(folder: str, at: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _files(folder, name.name)
        elif isinstance(node, ast.ImportFrom):
            start = folder
            if node.level:
                start = os.path.dirname(at)
                for _ in range(node.level - 1):
                    start = os.path.dirname(start)
            module = node.module or ""
            yield from _files(start, module)
            for name in node.names:  # each may be a module itself
                yield from _files(start, f"{module}.{name.name}".lstrip("."))


def _files(start: str, name: str) -> Iterator[str]:
    """The files that importing `a.b.c` runs: the packages on the way, and the module."""
    at = start
    for part in filter(None, name.split(".")):
        at = os.path.join(at, part)
        for file in (os.path.join(at, "__init__.py"), f"{at}.py"):
            if os.path.isfile(file):
                yield file
                break
