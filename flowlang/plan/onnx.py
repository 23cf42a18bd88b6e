"""What a model file says of itself: its inputs, outputs and opset.

Layer 2. Weights are never loaded: the file is walked by the protobuf wire format (protobuf.dev,
"Encoding"), initializers are stepped over, and only what is left is read as a message of onnx,
without the rest of that package.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from flowlang.plan.types import Record, Shape, Tensor, Type

# Field numbers of onnx.proto
MODEL_GRAPH, MODEL_FUNCTION = 7, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
TENSOR_NAME, TENSOR_EXTERNAL = 8, 13
ENTRY_KEY, ENTRY_VALUE = 1, 2
MODEL_SMALL = (1, 8, 14)  # ir_version, opset_import, metadata_props
# Which fields of a message may hold tensors, and what they are.
HOLDERS: Mapping[str, Mapping[int, str]] = {
    "graph": {GRAPH_NODE: "node", GRAPH_INITIALIZER: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
LOCATION = b"location"

# What some exporters write for the name of a dimension that is free, and has none.
NAMELESS = frozenset(("", "?", "*", "-1", "None"))

# onnx.TensorProto.DataType
DTYPE = {
    1: "f32", 2: "u8", 3: "i8", 4: "u16", 5: "i16", 6: "i32", 7: "i64", 9: "bool", 10: "f16",
    11: "f64",
}  # fmt: skip


ENCRYPTED = ".encrypted"
Opener: TypeAlias = Callable[[Path], bytes]
Data: TypeAlias = mmap.mmap | bytes


class NotAModel(Exception):
    """The file is not an ONNX model that can be read."""


@dataclass(frozen=True, slots=True)
class Port:
    """A model's input or output; `shape` includes the batch dimension where there is one.

    `symbols` are the names of its dimensions, None for those without: ONNX has it that dimensions
    of one name are of one length.
    """

    name: str
    dtype: str
    shape: Shape | None
    symbols: tuple[str | None, ...] = ()

    @property
    def item(self) -> Tensor:
        """The type of one item of the batch."""
        return Tensor(self.dtype, self.shape[1:] if self.shape else None)


@dataclass(frozen=True, slots=True)
class Tie:
    """Sides of a model's inputs that have one length in each item: ports by name, and their axes.

    Axes are those of an item, which has no batch dimension.
    """

    symbol: str
    sides: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model file's header."""

    path: Path
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opener: Opener | None = field(default=None, compare=False)  # of an encrypted file
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False)
    weights: tuple[Path, ...] = ()  # the files beside it that hold some of them

    def content(self) -> bytes | None:
        """What an encrypted file holds; None for a plain one, which is read where it lies."""
        return self.opener(self.path) if self.opener is not None else None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def class_names(self) -> list[str] | None:
        """The classes by number, where the exporter wrote them down.

        Ultralytics does, as metadata `names`: a Python dict from numbers to names.
        """
        try:
            given = ast.literal_eval(self.metadata.get("names", ""))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        names = dict(enumerate(given)) if isinstance(given, (list, tuple)) else given
        if not isinstance(names, dict) or not names or not all(type(k) is int for k in names):
            return None
        most = max(names)
        if min(names) < 0 or most > 100_000:
            return None
        return [str(names.get(number, number)) for number in range(most + 1)]

    @property
    def fixed_batch(self) -> int | None:
        """The batch dimension all inputs are fixed to, or None where it is free."""
        sizes = {p.shape[0] for p in self.inputs if p.shape}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def ties(self) -> tuple[Tie, ...]:
        """What the names of dimensions say of the lengths of an item."""
        sides: dict[str, list[tuple[str, int]]] = {}
        for port in self.inputs:
            for axis, symbol in enumerate(port.symbols[1:]):
                if symbol is not None:
                    sides.setdefault(symbol, []).append((port.name, axis))
        return tuple(Tie(s, tuple(each)) for s, each in sides.items() if len(each) > 1)

    @property
    def output(self) -> Type:
        """The type one item gives: a tensor, or a record of them by name."""
        if len(self.outputs) == 1:
            return self.outputs[0].item
        return Record(tuple((p.name, p.item) for p in self.outputs))


def read_model(path: str | os.PathLike[str], opener: Opener | None = None) -> Model:
    """Read a model's header. Raises OSError, or NotAModel where the file is no ONNX model.

    An encrypted model (`*.encrypted`) is read through `opener`, which may raise FlowError.
    """
    if os.fspath(path).endswith(ENCRYPTED):
        if opener is None:
            raise NotAModel("it is encrypted, and there is no key to open it with")
        header = _header(opener(Path(path)))
        return _model(Path(path), header, opener)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise NotAModel("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            header = _header(mapped)
    return _model(Path(path), header, None)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _varint(data: Data, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise NotAModel("it is no protobuf message")


def _fields(data: Data, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start of the field, start of its payload, end) of each field of a message."""
    while at < stop:
        start = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            _, end = _varint(data, at)
        elif wire == 1:
            end = at + 8
        elif wire == 2:
            length, at = _varint(data, at)
            end = at + length
        elif wire == 5:
            end = at + 4
        else:
            raise NotAModel("it is no protobuf message")
        if end > stop:
            raise NotAModel("it is cut short, or it is no protobuf message")
        yield key >> 3, start, at, end
        at = end


@dataclass(slots=True)
class _Header:
    """A ModelProto without weights and nodes, the names of its initializers, and the files that
    some of them are in.
    """

    message: bytes = b""
    initializers: set[str] = field(default_factory=set)
    locations: set[str] = field(default_factory=set)


def _header(data: Data) -> _Header:
    out = bytearray()
    header = _Header()
    has_graph = False
    try:
        for number, start, payload, end in _fields(data, 0, len(data)):
            if number in MODEL_SMALL:
                out += data[start:end]
            elif number == MODEL_GRAPH:
                has_graph = True
                graph = _graph(data, payload, end, header)
                out += bytes([MODEL_GRAPH << 3 | 2]) + _as_varint(len(graph)) + graph
            elif number == MODEL_FUNCTION:
                _locate(data, payload, end, "function", header)
    except IndexError:
        raise NotAModel("it is cut short, or it is no protobuf message") from None
    except RecursionError:
        raise NotAModel("its graphs are in one another too often") from None
    if not has_graph:
        raise NotAModel("it holds no graph")
    header.message = bytes(out)
    return header


def _graph(data: Data, at: int, stop: int, header: _Header) -> bytes:
    """A GraphProto's inputs and outputs; what its initializers say is added to the header."""
    out = bytearray()
    for number, start, payload, end in _fields(data, at, stop):
        if number == GRAPH_INITIALIZER:
            for inner, _, text, last in _fields(data, payload, end):
                if inner == TENSOR_NAME:
                    header.initializers.add(data[text:last].decode("utf-8", "replace"))
                elif inner == TENSOR_EXTERNAL:
                    _add_location(data, text, last, header)
        elif number == GRAPH_NODE:
            _locate(data, payload, end, "node", header)
        elif number in (GRAPH_INPUT, GRAPH_OUTPUT):
            out += data[start:end]
    return bytes(out)


def _locate(data: Data, at: int, stop: int, kind: str, header: _Header) -> None:
    """Add to the header what files the tensors of a message are in, and of those in it.

    Few models have any but among their initializers, so most messages are looked at no further.
    """
    if data.find(LOCATION, at, stop) < 0:
        return
    for number, _, payload, end in _fields(data, at, stop):
        if kind == "tensor":
            if number == TENSOR_EXTERNAL:
                _add_location(data, payload, end, header)
        elif number in HOLDERS[kind]:
            _locate(data, payload, end, HOLDERS[kind][number], header)


def _add_location(data: Data, at: int, stop: int, header: _Header) -> None:
    """The file that an entry of a tensor's external data names, if it is the entry that does."""
    entry = {number: data[start:end] for number, _, start, end in _fields(data, at, stop)}
    if entry.get(ENTRY_KEY) == LOCATION:
        header.locations.add(entry.get(ENTRY_VALUE, b"").decode("utf-8", "replace"))


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@functools.cache
def _messages() -> ModuleType:
    """onnx's generated protobuf messages.

    They are loaded as a module of their own: `import onnx` brings numpy and the whole of onnx's
    tooling (0.2 s), and a header needs none of it.
    """
    found = importlib.util.find_spec("onnx")
    if found is None or found.origin is None:
        raise NotAModel("the package `onnx`, which reads models, is not installed")
    file = Path(found.origin).parent / "onnx_ml_pb2.py"
    spec = importlib.util.spec_from_file_location("flowlang.plan._onnx_messages", file)
    if spec is None or spec.loader is None:
        raise NotAModel("the installed package `onnx` has no message definitions")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _model(path: Path, header: _Header, opener: Opener | None) -> Model:
    from google.protobuf.message import DecodeError

    model = _messages().ModelProto()
    try:
        model.ParseFromString(header.message)
    except DecodeError:
        raise NotAModel("it is no ONNX model") from None

    def port(value: Any) -> Port:
        kind = value.type.tensor_type
        if kind.elem_type not in DTYPE:
            raise NotAModel(f"`{value.name}` is no tensor of a type flowlang knows")
        shape = (
            # Some exporters write -1 or 0 for a dimension of any length.
            tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
            if kind.HasField("shape")
            else None
        )
        names = (d.dim_param for d in kind.shape.dim)
        symbols = tuple(None if name in NAMELESS else name for name in names)
        return Port(value.name, DTYPE[kind.elem_type], shape, symbols)

    # Before IR version 4 a graph lists its weights among its inputs.
    inputs = tuple(port(v) for v in model.graph.input if v.name not in header.initializers)
    outputs = tuple(port(v) for v in model.graph.output)
    if not inputs or not outputs:
        raise NotAModel("it has no inputs or no outputs")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    weights = tuple(path.parent / location for location in sorted(header.locations))
    return Model(path, inputs, outputs, opener, metadata, weights)
