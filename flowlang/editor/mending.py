"""Diagnostics to edits that mend them: the quick fixes of an editor.

Layer 4. A diagnostic that knows what its help replaces says so; of the others, those are taken
whose help is a name or an expression that has one place to go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flowlang.diagnostics import Diagnostic, Span
from flowlang.syntax.wording import one_line

_MEANT = re.compile(r"did you mean (?:`([^`]+)`|(\"[^\"]*\"))\?")
_WRONG = re.compile(r"(?:named|field) `([^`]+)`")
_MAX_TITLE = 60
_WHOLE = frozenset({"unknown-word", "unknown-type"})  # their help stands for all that is marked


@dataclass(frozen=True, slots=True)
class Mend:
    """An edit: what to put in place of a span. The sure ones are `is_preferred`."""

    title: str
    span: Span
    text: str
    is_preferred: bool


def mend(diagnostic: Diagnostic) -> Mend | None:
    """The edit that a diagnostic's help stands for, if there is one."""
    is_error = diagnostic.severity == "error"
    if diagnostic.fix is not None and diagnostic.help:
        return _mend(diagnostic.fix, diagnostic.help, is_error)
    meant = _MEANT.search(diagnostic.help or diagnostic.primary.text)
    if meant is not None:
        return _renamed(diagnostic, meant.group(1) or meant.group(2))
    if not diagnostic.help:
        return None
    return _before(diagnostic) or _value(diagnostic) or _whole(diagnostic)


def _mend(span: Span, text: str, is_preferred: bool) -> Mend:
    title = text if len(text) <= _MAX_TITLE else f"{text[:_MAX_TITLE]}..."
    return Mend(f"write `{title}`", span, text, is_preferred)


def _renamed(diagnostic: Diagnostic, meant: str) -> Mend | None:
    """A misspelt name, wherever in the marked text it stands."""
    span, text = diagnostic.span, diagnostic.span.text
    if meant.startswith('"'):
        return _file(span, meant.strip('"'))
    found = _WRONG.search(diagnostic.message)
    wrong = found.group(1) if found else text
    if meant.startswith("."):
        wrong = f".{wrong}"
    at = text.rfind(wrong)
    if at < 0 or (wrong != text and not meant.startswith(".")):
        at, wrong = 0, text
    place = Span(span.source, span.start + at, span.start + at + len(wrong))
    return _mend(place, meant, True)


def _file(span: Span, meant: str) -> Mend | None:
    """The last part of a path: what stands before it may be a param's value."""
    text = span.text
    if not (text.startswith('"') and text.endswith('"') and "\\" not in text):
        return None
    start = max(text.rfind("/"), 0) + 1
    place = Span(span.source, span.start + start, span.end - 1)
    return _mend(place, meant.rpartition("/")[2], True)


def _before(diagnostic: Diagnostic) -> Mend | None:
    """Stages missing before the marked one: the help ends with it."""
    span, text = diagnostic.span, diagnostic.help or ""
    if not text.endswith(f" -> {one_line(span)}"):
        return None
    for label in diagnostic.secondary:
        between = span.source.text[label.span.end : span.start]
        if text.startswith(f"{one_line(label.span)} -> ") and label.span.source is span.source:
            if between.strip() != "->":
                return None
            return _mend(label.span.to(span), text, diagnostic.severity == "error")
    return _mend(span, text, False)


def _value(diagnostic: Diagnostic) -> Mend | None:
    """`name=value`, where the marked text is the value."""
    span = diagnostic.span
    name, equals, value = (diagnostic.help or "").partition("=")
    before = span.source.text[: span.start].rstrip()
    is_named = before.endswith("=") and before[:-1].rstrip().endswith(name)
    if not (equals and is_named and name.isidentifier() and re.fullmatch(r"[\w.%]+", value)):
        return None
    return _mend(span, value, True)


def _whole(diagnostic: Diagnostic) -> Mend | None:
    if diagnostic.slug not in _WHOLE or not diagnostic.help:
        return None
    return _mend(diagnostic.span, diagnostic.help, False)
