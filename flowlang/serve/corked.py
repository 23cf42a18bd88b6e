"""A transport that writes a response's head and its body at once.

Layer 4.
"""

from __future__ import annotations

import asyncio
from typing import Any

MAX_CORKED_BYTES = 64 << 10  # of a body that is written with its head


class Corked:
    """A transport that keeps a response's head back until its body is there, to write both at once.

    uvicorn writes the two apart: two system calls and two packets for an answer of a few bytes,
    which is a tenth of what a small answer costs, and wakes its client twice.
    """

    __slots__ = ("_head", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing  # asked for every response

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            if len(data) <= MAX_CORKED_BYTES:
                data = head + data
            else:  # to copy it would cost more than a packet
                self._transport.write(head)
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Write a head that no body follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
