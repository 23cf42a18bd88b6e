"""Message classes out of a .proto file, read when they are needed.

Layer 4. Code that protoc generates runs with protobuf of its own major version and the next; a
descriptor built here runs with any, and the .proto file is all there is to read and to change. What
this reads is the part of proto3 that our files use: messages and enums, however nested, fields of
every kind, oneof, map, and services.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import InternalError

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto

    Messages: TypeAlias = Mapping[str, Any]  # classes by their names below the package

# FieldDescriptorProto.Type and Label of descriptor.proto
_TYPES = {
    "double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "fixed64": 6, "fixed32": 7,
    "bool": 8, "string": 9, "bytes": 12, "uint32": 13, "sfixed32": 15, "sfixed64": 16,
    "sint32": 17, "sint64": 18,
}  # fmt: skip
_MESSAGE, _ENUM = 11, 14
_OPTIONAL, _REPEATED = 1, 3
_TOKEN = re.compile(r'//[^\n]*|\s+|([A-Za-z_][\w.]*|\d+|"[^"]*"|[{}()<>=;,])')


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a service: the names of its messages, and which of the two are streams."""

    name: str
    request: str
    response: str
    is_request_stream: bool
    is_response_stream: bool


@dataclass(frozen=True, slots=True)
class Protocol:
    """What a file declares. `service` is its only service's full name."""

    messages: Messages
    service: str
    methods: tuple[Method, ...]


def read_protocol(name: str) -> Protocol:
    """The messages and the service of one of our .proto files."""
    from google.protobuf import descriptor_pool, message_factory

    text = resources.files(__package__).joinpath(name).read_text("utf-8")
    reader = _Reader(name, text)
    reader.read()
    # A pool of its own: generated stubs of the same protocol may be in the process besides.
    pool = descriptor_pool.DescriptorPool()
    file = pool.AddSerializedFile(reader.file.SerializeToString()) or pool.FindFileByName(name)
    messages = {
        message: message_factory.GetMessageClass(descriptor)
        for message, descriptor in file.message_types_by_name.items()
    }
    return Protocol(messages, f"{reader.file.package}.{reader.service}", tuple(reader.methods))


class _Reader:
    """Turns the text of a .proto file into its descriptor."""

    def __init__(self, name: str, text: str) -> None:
        from google.protobuf.descriptor_pb2 import FileDescriptorProto

        self.file = FileDescriptorProto(name=name, syntax="proto3")
        self.service = ""
        self.methods: list[Method] = []
        self._tokens = _tokens(name, text)
        self._token = next(self._tokens)

    def read(self) -> None:
        while self._token:
            word = self._take()
            if word == "syntax":
                self._expect("=", '"proto3"', ";")
            elif word == "package":
                self.file.package = self._take()
                self._expect(";")
            elif word == "service":
                self._read_service()
            elif word == "enum":
                self._read_enum(self.file.enum_type.add())
            elif word == "message":
                self._read_message(self.file.message_type.add())
            else:
                raise self._unexpected(word)
        names = dict(_names(self.file.message_type, self.file.enum_type, ""))
        for message in self.file.message_type:
            self._resolve(message, message.name, names)

    # Tokens

    def _take(self) -> str:
        token, self._token = self._token, next(self._tokens, "")
        return token

    def _expect(self, *tokens: str) -> None:
        for token in tokens:
            if (found := self._take()) != token:
                raise self._unexpected(found)

    def _skip(self, token: str) -> bool:
        """Step over a token if it is next. Returns whether it was."""
        is_next = self._token == token
        if is_next:
            self._take()
        return is_next

    def _unexpected(self, token: str) -> InternalError:
        return InternalError(f"{self.file.name}: unexpected `{token}`")

    # Declarations

    def _read_service(self) -> None:
        self.service = self._take()
        self._expect("{")
        while not self._skip("}"):
            self._expect("rpc")
            name = self._take()
            request, is_request_stream = self._read_side()
            self._expect("returns")
            response, is_response_stream = self._read_side()
            self._expect(";")
            self.methods.append(
                Method(name, request, response, is_request_stream, is_response_stream)
            )

    def _read_side(self) -> tuple[str, bool]:
        self._expect("(")
        is_stream = self._skip("stream")
        name = self._take()
        self._expect(")")
        return name, is_stream

    def _read_enum(self, enum: EnumDescriptorProto) -> None:
        enum.name = self._take()
        self._expect("{")
        while not self._skip("}"):
            name = self._take()
            self._expect("=")
            enum.value.add(name=name, number=int(self._take()))
            self._expect(";")

    def _read_message(self, message: DescriptorProto) -> None:
        message.name = self._take()
        self._expect("{")
        while not self._skip("}"):
            if self._skip("message"):
                self._read_message(message.nested_type.add())
            elif self._skip("enum"):
                self._read_enum(message.enum_type.add())
            elif self._skip("oneof"):
                message.oneof_decl.add(name=self._take())
                self._expect("{")
                while not self._skip("}"):
                    self._read_field(message, oneof=len(message.oneof_decl) - 1)
            else:
                self._read_field(message)

    def _read_field(self, message: DescriptorProto, oneof: int | None = None) -> None:
        label = _REPEATED if self._skip("repeated") else _OPTIONAL
        kind = self._take()
        sides: tuple[str, str] | None = None
        if kind == "map":
            self._expect("<")
            key = self._take()
            self._expect(",")
            sides, label = (key, self._take()), _REPEATED
            self._expect(">")
        name = self._take()
        self._expect("=")
        number = int(self._take())
        self._expect(";")
        if sides:
            kind = "".join(part.capitalize() for part in name.split("_")) + "Entry"
            entry = message.nested_type.add(name=kind)
            entry.options.map_entry = True
            for at, (side, of) in enumerate(zip(("key", "value"), sides, strict=True), 1):
                entry.field.add(name=side, number=at, label=_OPTIONAL, type_name=of)
        field = message.field.add(name=name, number=number, label=label, type_name=kind)
        if oneof is not None:
            field.oneof_index = oneof

    def _resolve(self, message: DescriptorProto, path: str, names: Mapping[str, int]) -> None:
        """Give every field its type; what is nearest by scope is meant by a name."""
        for field in message.field:
            kind = field.type_name
            if kind in _TYPES:
                field.ClearField("type_name")
                field.type = _TYPES[kind]
                continue
            scopes = path.split(".")
            found = next(
                (
                    full
                    for length in range(len(scopes), -1, -1)
                    if (full := ".".join([*scopes[:length], kind])) in names
                ),
                None,
            )
            if found is None:
                raise self._unexpected(kind)
            field.type = names[found]
            field.type_name = f".{self.file.package}.{found}"
        for nested in message.nested_type:
            self._resolve(nested, f"{path}.{nested.name}", names)


def _tokens(name: str, text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InternalError(f"{name}: unexpected `{text[at]}`")
        at = match.end()
        if match[1]:
            yield match[1]


def _names(messages: Any, enums: Any, scope: str) -> Iterator[tuple[str, int]]:
    """Every message and enum below a scope by its full name, and which of the two it is."""
    yield from ((f"{scope}{enum.name}", _ENUM) for enum in enums)
    for message in messages:
        yield f"{scope}{message.name}", _MESSAGE
        yield from _names(message.nested_type, message.enum_type, f"{scope}{message.name}.")
