"""Where a message of Thrift's binary protocol ends, found without reading what it holds.

Layer 4. Nothing but steps over the bytes (thrift.apache.org, "Thrift Binary protocol encoding"), so
that what a client claims is checked before any library sees it: a length beyond the end, a list of
two thousand million elements, structs within structs without end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

STRICT = 0x8001  # the first two bytes of a message; without them it would begin with a length
MAX_DEPTH = 16
MAX_PARTS = 1000  # fields and elements, each of which takes its time
_STOP, _STRING, _STRUCT, _MAP, _SET, _LIST = 0, 11, 12, 13, 14, 15
_SIZES = {2: 1, 3: 1, 4: 8, 6: 2, 8: 4, 10: 8, 16: 16}  # of the types of one size
_NUMBER = struct.Struct(">i")
_TYPED = struct.Struct(">bi")
_PAIR = struct.Struct(">bbi")


class Malformed(Exception):
    """The bytes are no message, or not one that is taken here: the connection is of no use."""


class _Incomplete(Exception):
    """The message goes on; `size` is what it has at least."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


@dataclass(frozen=True, slots=True)
class Extent:
    """A message in a buffer: it lies from `start` to `end`, and is there if `is_complete`.

    Otherwise `end` is the least that is needed to tell more.
    """

    start: int
    end: int
    is_complete: bool
    is_framed: bool


def find_message(buffer: bytes | bytearray, max_bytes: int) -> Extent:
    """The message at the start of a buffer, framed or not. Raises Malformed."""
    if len(buffer) < 4:
        return Extent(0, 4, is_complete=False, is_framed=False)
    if buffer[0] & 0x80:
        try:
            return Extent(0, _Walk(buffer, 0, max_bytes).message(), True, is_framed=False)
        except _Incomplete as error:
            return Extent(0, error.size, is_complete=False, is_framed=False)
    end = 4 + int.from_bytes(buffer[:4], "big")
    if end > max_bytes:
        raise Malformed(f"a message is larger than {max_bytes:,} bytes, or none of this protocol")
    if len(buffer) < end:
        return Extent(4, end, is_complete=False, is_framed=True)
    try:
        found = _Walk(memoryview(buffer)[:end], 4, max_bytes).message()
    except _Incomplete:
        raise Malformed("a message reaches beyond its frame") from None
    if found != end:
        raise Malformed("a frame goes on behind its message")
    return Extent(4, end, is_complete=True, is_framed=True)


class _Walk:
    """Steps over the parts of a message."""

    def __init__(self, buffer: bytes | bytearray | memoryview, at: int, max_bytes: int) -> None:
        self._buffer = buffer
        self._at = at
        self._max_bytes = max_bytes
        self._parts = 0

    def message(self) -> int:
        """The end of the message."""
        head = self._number()
        if (head >> 16) & 0xFFFF != STRICT:
            raise Malformed("this is no message of Thrift's binary protocol, version 1")
        self._value(_STRING, 0)
        self._number()
        self._value(_STRUCT, 0)
        return self._at

    def _step(self, size: int) -> int:
        """Step over so many bytes, which must be there. Returns where they begin."""
        start = self._at
        if size < 0 or start + size > self._max_bytes:
            raise Malformed(f"a message is larger than {self._max_bytes:,} bytes")
        if start + size > len(self._buffer):
            raise _Incomplete(start + size)
        self._at = start + size
        return start

    def _number(self) -> int:
        found: int = _NUMBER.unpack_from(self._buffer, self._step(4))[0]
        return found

    def _count_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise Malformed(f"a message has more than {MAX_PARTS} parts")

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self._step(_SIZES[kind])
        elif kind == _STRING:
            self._step(self._number())
        elif depth == MAX_DEPTH:
            raise Malformed(f"a message is more than {MAX_DEPTH} deep")
        elif kind == _STRUCT:
            self._fields(depth + 1)
        elif kind == _MAP:
            key, value, count = _PAIR.unpack_from(self._buffer, self._step(_PAIR.size))
            self._elements((key, value), count, depth + 1)
        elif kind in (_LIST, _SET):
            element, count = _TYPED.unpack_from(self._buffer, self._step(_TYPED.size))
            self._elements((element,), count, depth + 1)
        else:
            raise Malformed(f"there is no type {kind} in a message")

    def _fields(self, depth: int) -> None:
        while kind := self._buffer[self._step(1)]:
            self._count_part()
            self._step(2)
            self._value(kind, depth)

    def _elements(self, kinds: tuple[int, ...], count: int, depth: int) -> None:
        if count < 0:
            raise Malformed("a container has a negative size")
        for _ in range(count):
            self._count_part()
            for kind in kinds:
                self._value(kind, depth)
