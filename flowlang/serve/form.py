"""Forms and query strings: the item of a request and its parameters out of either.

Layer 4, and the only file importing python_multipart. A form (multipart/form-data, RFC 7578) brings
the item in a part of any name, or several in parts with files' names, and parameters in parts of
theirs; a query string brings parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from flowlang.diagnostics import BadRequest
from flowlang.plan.graph import Parameter
from flowlang.plan.types import Scalar, Type, without_null
from flowlang.serve.answer import reader_of

FORM = b"multipart/form-data"
MAX_PARTS = 256

# It warns of forms that are none: those are their clients' mistakes, and told as such here.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form: the field's name, the file's where there is one, and what it holds."""

    name: str
    file_name: str | None
    content: bytes


def is_form(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.lower().startswith(FORM)


def parts_of(content_type: bytes, body: bytes) -> list[Part]:
    """The parts of a form, in order. Raises BadRequest where it is none, or has too many."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequest("the form's Content-Type has no boundary")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"this is no form of the boundary it names: {error}") from None
    if not reader.is_whole:
        raise BadRequest("the form ends before its last boundary")
    return reader.parts


class _Reader:
    """Gathers parts from a parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.is_whole = False
        self._field, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._content: list[bytes] = []

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
            "on_part_end": self._finish,
            "on_header_field": self._add_field,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise BadRequest(f"a form has at most {MAX_PARTS} parts")
        self._headers, self._content = {}, []

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field, self._value = b"", b""

    def _end(self) -> None:
        self.is_whole = True

    def _finish(self) -> None:
        from python_multipart.multipart import parse_options_header

        options = parse_options_header(self._headers.get(b"content-disposition", b""))[1]
        file_name = options.get(b"filename")
        self.parts.append(
            Part(
                options.get(b"name", b"").decode("utf-8", "replace"),
                file_name.decode("utf-8", "replace") if file_name is not None else None,
                b"".join(self._content),
            )
        )


class ParameterReader:
    """Reads the parameters of one flow out of query strings and forms."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._types = {p.name: p.type for p in parameters}

    def of_query(self, query: bytes) -> dict[str, Any]:
        """The parameters of a query string. Raises BadRequest."""
        texts: dict[str, str] = {}
        for name, text in parse_qsl(query.decode("utf-8", "replace"), keep_blank_values=True):
            if name in texts:
                raise BadRequest(f"`{name}` is given twice")
            texts[name] = text
        return self.of_texts(texts)

    def of_texts(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """The parameters as texts, read as their types say. Raises BadRequest."""
        unknown = texts.keys() - self._types.keys()
        if unknown:
            raise BadRequest(self._unknown(min(unknown)))
        return {name: self._read(name, text.encode()) for name, text in texts.items()}

    def of_form(self, parts: Sequence[Part]) -> tuple[dict[str, Any], list[Part]]:
        """The parameters of a form, and the parts that are its items. Raises BadRequest.

        Where a form has parts of several names besides its parameters, each shows that it is an
        item: it has a file's name or is called so. Others are parameters with misspelt names.
        """
        found: dict[str, Any] = {}
        items: list[Part] = []
        for part in parts:
            if part.name not in self._types:
                items.append(part)
            elif part.name in found:
                raise BadRequest(f"`{part.name}` is given twice")
            else:
                found[part.name] = self._read(part.name, part.content)
        has_files = any(i.file_name is not None for i in items)
        if has_files or (self._types and len({i.name for i in items}) > 1):
            self._check_items(items)
        return found, items

    def _check_items(self, items: Sequence[Part]) -> None:
        item = item_name(self._types)
        for part in items:
            if part.file_name is None and part.name != item:
                reason = f"an item is a part with a file's name, or named `{item}`"
                raise BadRequest(f"{self._unknown(part.name)}; {reason}")

    def _unknown(self, name: str) -> str:
        known = ", ".join(f"`{n}`" for n in self._types) or "none"
        return f"this flow has no parameter `{name}`; it has {known}"

    def _read(self, name: str, content: bytes) -> Any:
        """A value of a parameter's type. What does not fit is told when the request is let in."""
        kind: Type = without_null(self._types[name])
        if kind in (Scalar("str"), Scalar("path")):
            return content.decode("utf-8", "replace")
        reader = reader_of(kind)
        try:
            return content if reader is None else reader(content)
        except BadRequest:
            shown = content[:40].decode("utf-8", "replace")
            raise BadRequest(f"`{name}` is {kind}, not `{shown}`") from None


def item_name(parameters: Collection[str]) -> str:
    """What a part with an item is called, where it has to be called something."""
    name = "item"
    while name in parameters:  # then it would be that parameter
        name += "_"
    return name


def only_item(items: Sequence[Part], parameters: Mapping[str, Any]) -> bytes:
    """The one item of a form. Raises BadRequest where there is none."""
    if not items:
        given = f" besides {', '.join(parameters)}" if parameters else ""
        raise BadRequest(f"the form has no part with the item{given}")
    return items[0].content
