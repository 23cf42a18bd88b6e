"""Text to tree: lark reads `grammar/flow.lark`; its trees and its complaints become ours.

Layer 1. All syntax errors of a file are found in one run: where one declaration cannot be read,
reading goes on at the next declaration keyword.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
import re
from itertools import pairwise
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from flowlang.diagnostics import CompileError, Diagnostic, Label, Source, Span
from flowlang.syntax import complaint, tree
from flowlang.syntax.read import Reader
from flowlang.syntax.scan import Outline, outline

if TYPE_CHECKING:
    from lark import Lark

MAX_SOURCE_BYTES = 256 << 10
MAX_DEPTH = 64
MAX_ERRORS = 100  # syntax errors after which reading stops
UNTOLD = frozenset({""})  # names were lost, and which ones cannot be told


def grammar_text() -> str:
    """The grammar, from the wheel or from the checkout."""
    # Not importlib.resources: it brings in zipfile, tempfile and more, at every start.
    package = FilePath(__file__).parents[1]
    packaged = package / "grammar" / "flow.lark"
    found = packaged if packaged.is_file() else package.parent / "grammar" / "flow.lark"
    return found.read_text("utf-8")


def _cache_file(grammar: str) -> str | None:
    """Where lark keeps its parse tables, or None where nothing can be written."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the XDG specification has relative paths ignored
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # a user without a home: whoever has written here is not known
        return None
    folder = FilePath(root) / "flowlang"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    return str(folder / f"tables-{hashlib.sha256(grammar.encode()).hexdigest()[:16]}.lark")


@functools.cache
def _lark() -> Lark:
    from lark import Lark

    grammar = grammar_text()
    return Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        propagate_positions=True,
        cache=_cache_file(grammar) or False,
    )


def read_source(path: str | os.PathLike[str], name: str | None = None) -> Source:
    """Read a flow file as UTF-8; a byte-order mark is skipped.

    Raises CompileError if the file is too large or no text, OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_SOURCE_BYTES + 1)
    return decode_source(raw, name or os.fspath(path))


def opened_source(text: str, name: str) -> Source:
    """The Source of a text that an editor has open, or CompileError where it is no program text."""
    return decode_source(text.encode("utf-8", "replace"), name)


def decode_source(raw: bytes, name: str) -> Source:
    """Bytes to Source, or CompileError where they are no program text."""
    if len(raw) > MAX_SOURCE_BYTES:
        raise _too_large(Source(name, raw[:80].decode("utf-8", "replace")))
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        text = raw[: error.start].decode()
        raise _no_text(Source(name, text + "\N{REPLACEMENT CHARACTER}"), len(text)) from None
    at = text.find("\0")
    if at >= 0:
        raise _no_text(Source(name, text[: at + 1]), at)
    return Source(name, text)


def _too_large(source: Source) -> CompileError:
    problem = Diagnostic(
        "too-large",
        f"this is larger than a flow may be ({MAX_SOURCE_BYTES >> 10} KiB)",
        Label(Span(source, 0, 1)),
        note="a flow names its models and word lists as files; it does not hold them",
    )
    return CompileError([problem])


def _no_text(source: Source, offset: int) -> CompileError:
    problem = Diagnostic(
        "not-text",
        "this is not text in UTF-8, so it is no flow",
        Label(Span(source, offset, offset + 1), "the first byte that is no text"),
    )
    return CompileError([problem])


def parse(source: Source) -> tree.Program:
    """Source to tree. Raises CompileError with every syntax error of the file."""
    program, diagnostics, _ = parse_leniently(source)
    if diagnostics:
        raise CompileError(diagnostics)
    return program


def parse_leniently(
    source: Source,
) -> tuple[tree.Program, list[Diagnostic], frozenset[str]]:
    """What could be read of a source, its syntax errors, and the names it failed to declare."""
    if len(source.text) > MAX_SOURCE_BYTES:
        raise _too_large(source)
    found = outline(source)
    if found.depth > MAX_DEPTH:
        return _program(source, [], found), [_too_deep(source, found)], UNTOLD
    reader = Reader(source, found)
    try:
        program = reader.program(_lark().parse(source.text), found)
    except complaint.lark_errors() as error:
        return _parse_by_declaration(source, found, error)
    return program, reader.diagnostics, frozenset()


def _too_deep(source: Source, found: Outline) -> Diagnostic:
    return Diagnostic(
        "too-deep",
        f"this is nested more than {MAX_DEPTH} deep",
        Label(Span(source, found.deepest, found.deepest + 1)),
        help="name the inner part: flow inner = ...",
    )


def _parse_by_declaration(
    source: Source, found: Outline, whole: Exception
) -> tuple[tree.Program, list[Diagnostic], frozenset[str]]:
    """Read each declaration on its own; the unreadable ones give a diagnostic each."""
    from lark.utils import TextSlice

    headless = {each.start: each for each in found.headless}
    if not (found.declarations or headless):
        return _program(source, [], found), [complaint.explain(source, whole, found)], UNTOLD
    starts = sorted({0, *found.declarations, *headless, len(source.text)})
    items: list[tree.Item] = []
    diagnostics: list[Diagnostic] = []
    lost: set[str] = set()
    reader = Reader(source, found)
    for start, end in pairwise(starts):
        if start == 0 and start not in headless and reader.is_head(end):
            continue
        if start in headless:
            diagnostics.append(complaint.headless(source, headless[start], end))
            lost.add(headless[start].name)
            continue
        try:
            part = reader.program(_lark().parse(TextSlice(source.text, start, end)), found)
        except complaint.lark_errors() as error:
            diagnostics.append(complaint.explain(source, error, found, start, end))
            lost.add(_declared_name(source.text[start:end]))
        else:
            items.extend(part.items)
            if part.pipeline is not None:
                diagnostics.append(complaint.stray_pipeline(part.pipeline.span))
        if len(diagnostics) + len(reader.diagnostics) >= MAX_ERRORS:
            break
    diagnostics += reader.diagnostics
    if not diagnostics:
        diagnostics.append(complaint.explain(source, whole, found))
    return _program(source, items, found), diagnostics, frozenset(lost) | UNTOLD


def _declared_name(text: str) -> str:
    """The name a declaration would have declared, as far as it can be told."""
    pattern = r'(?:export\s+)?(?:use\s*(?:"[^"\n]*)?"?\s*as|\w+)\s+(\w+)'
    name = re.match(pattern, text)
    if name is None and (path := re.match(r'use\s*("[^"\n]*")', text)):
        return complaint.name_of_file(path.group(1))
    return name.group(1) if name else ""


def _program(source: Source, items: list[tree.Item], found: Outline) -> tree.Program:
    span = Span(source, 0, len(source.text))
    return tree.Program(None, tuple(items), None, span, found.comments)
