"""Forms and query strings: the item of a request and its parameters out of either.

Layer 4, and the only file importing python_multipart. A form (multipart/form-data, RFC 7578) brings
the item in a part of any name, or several in parts with files' names, or one record in a part for
each field; and parameters in parts of theirs. A query string brings parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from flowlang.diagnostics import BadRequest
from flowlang.plan.graph import Parameter
from flowlang.plan.types import Record, Scalar, Type, without_null
from flowlang.serve.answer import check_json, reader_of, takes_bytes

FORM = b"multipart/form-data"
MAX_PARTS = 256
_TEXTS = (Scalar("str"), Scalar("path"))

# It warns of forms that are none: those are their clients' mistakes, and told as such here.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form: the field's name, the file's where there is one, and what it holds."""

    name: str
    file_name: str | None
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """What a form brings: parameters, and either items or the fields of the one item."""

    parameters: dict[str, Any]
    items: list[Part]
    record: dict[str, Any]


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
    """Reads the parameters of one flow out of query strings and forms, and there its item too.

    `item` is the type of that, where it matters.
    """

    def __init__(self, parameters: Sequence[Parameter], item: Type | None = None) -> None:
        self._types = {p.name: p.type for p in parameters}
        self._item = item
        self._fields = form_fields(item, self._types)

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
        given = {name: text.encode() for name, text in texts.items()}
        check_json([text for name, text in given.items() if _is_json(self._types[name])])
        return {name: _read(name, self._types[name], text) for name, text in given.items()}

    def of_form(self, parts: Sequence[Part]) -> Form:
        """What a form brings, items as JSON that has been checked. Raises BadRequest and Refusal.

        Where a form has parts of several names besides its parameters, each shows that it is an
        item: it has a file's name or is called so. Others are parameters with misspelt names.
        """
        check_json([part.content for part in parts if self._is_json(part.name)])
        found = Form({}, [], {})
        for part in parts:
            if part.name in self._types:
                _add(found.parameters, part, self._types)
            elif part.name in self._fields:
                _add(found.record, part, self._fields)
            else:
                found.items.append(part)
        if found.record:
            self._check_fields(found)
        else:
            self._check_items(found.items)
        return found

    def _is_json(self, name: str) -> bool:
        """Whether a part of this name is JSON: what all of them hold together is bounded."""
        kind = self._types.get(name) or self._fields.get(name)
        if kind is not None:
            return _is_json(kind)
        return self._item is not None and not takes_bytes(self._item)

    def _check_fields(self, form: Form) -> None:
        if form.items:
            known = ", ".join(f"`{n}`" for n in self._fields)
            other = form.items[0].name
            raise BadRequest(f"the item is a record of {known}, and has no field `{other}`")

    def _check_items(self, items: Sequence[Part]) -> None:
        has_files = any(i.file_name is not None for i in items)
        if not has_files and (not self._types or len({i.name for i in items}) < 2):
            return
        item = item_name([*self._types, *self._fields])
        for part in items:
            if part.file_name is None and part.name != item:
                reason = f"an item is a part with a file's name, or named `{item}`"
                raise BadRequest(f"{self._unknown(part.name)}; {reason}")

    def _unknown(self, name: str) -> str:
        known = ", ".join(f"`{n}`" for n in self._types) or "none"
        return f"this flow has no parameter `{name}`; it has {known}"


def _add(found: dict[str, Any], part: Part, types: Mapping[str, Type]) -> None:
    if part.name in found:
        raise BadRequest(f"`{part.name}` is given twice")
    found[part.name] = _read(part.name, types[part.name], part.content)


def _is_json(kind: Type) -> bool:
    kind = without_null(kind)
    return kind not in _TEXTS and not takes_bytes(kind)


def _read(name: str, kind: Type, content: bytes) -> Any:
    """A value of a type. What does not fit is told when the request is let in."""
    kind = without_null(kind)
    if kind in _TEXTS:
        return content.decode("utf-8", "replace")
    reader = reader_of(kind)
    try:
        return content if reader is None else reader(content)
    except BadRequest:
        shown = content[:40].decode("utf-8", "replace")
        raise BadRequest(f"`{name}` is {kind}, not `{shown}`") from None


def form_fields(item: Type | None, parameters: Collection[str]) -> dict[str, Type]:
    """The fields of an item that parts of a form may be: a parameter of that name comes before."""
    kind = None if item is None else without_null(item)
    fields = kind.fields if isinstance(kind, Record) else ()
    return {name: part for name, part in fields if name not in parameters}


def item_name(others: Collection[str]) -> str:
    """What a part with an item is called, where it has to be called something."""
    name = "item"
    while name in others:  # then it would be that parameter, or that field
        name += "_"
    return name


def only_item(items: Sequence[Part], parameters: Mapping[str, Any]) -> bytes:
    """The one item of a form. Raises BadRequest where there is none."""
    if not items:
        given = f" besides {', '.join(parameters)}" if parameters else ""
        raise BadRequest(f"the form has no part with the item{given}")
    return items[0].content
