"""Messages between two processes of one machine: a socket tells of them, shared memory holds them.

Layer 4. Each side has a ring in the memory that both map. A message is copied in once and out once;
the socket carries 24 bytes for it, and those of all messages of one turn of the event loop go in
one frame, so that many messages cost one wake-up. Knows nothing of what the messages say.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

SENT_BYTES = 64 << 20  # of the ring that the connecting side writes: a thousand pictures
ANSWERED_BYTES = 16 << 20  # of the other one

TOLD_EACH = 64  # messages
TOLD_BYTES = 8 << 20  # of them
WAITING_BYTES = 32 << 20  # on the way beside the ring: with more than that a channel is full
PAUSE_S = 1.0  # where there is no file descriptor for a connection

_HEAD = struct.Struct("<III")  # bytes behind it, messages read of the other's ring, records
_RECORD = struct.Struct("<IIBBHfd")  # a Record's fields, and whether it lies in the ring
_HELLO = b"flowlang ring 1"

log = logging.getLogger("flowlang.serve")


class Record(NamedTuple):
    """What is told of a message. The users' own are `number`, `kind`, `part`, `within_s`
    and `sent_s`, which has the precision of a clock.
    """

    number: int
    size: int
    kind: int
    is_in_ring: int
    part: int
    within_s: float
    sent_s: float


class Ring:
    """Messages in a piece of memory, first in, first out. One side writes it, the other reads.

    Both reckon where the next message lies from the sizes of those before it.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._head = 0  # in bytes since the beginning, as are all places but the slices
        self._tail = 0
        self._ends: deque[int] = deque()  # of the messages written and not released

    def _place(self, size: int) -> tuple[int, int]:
        """Where a message begins: in bytes since the beginning, and in the memory."""
        length = len(self._memory)
        offset = self._head % length
        if offset + size > length:  # no message is cut in two
            return self._head + length - offset, 0
        return self._head, offset

    def write(self, message: Any) -> bool:
        """Copy a message in. False where there is no room for it now."""
        size = len(message)
        begin, offset = self._place(size)
        if not self._ends:
            self._tail = begin
        if begin + size - self._tail > len(self._memory):
            return False
        self._memory[offset : offset + size] = message
        self._head = begin + size
        self._ends.append(self._head)
        return True

    def release(self, count: int) -> None:
        """The other side has read this many more messages."""
        for _ in range(count):
            self._tail = self._ends.popleft()

    def read(self, size: int) -> bytes:
        """Copy the next message out."""
        begin, offset = self._place(size)
        self._head = begin + size
        return bytes(self._memory[offset : offset + size])

    @property
    def passed(self) -> int:
        """How many bytes lie behind the place of the next message."""
        return self._head


class Peer(Protocol):
    """Whoever stands at one end of a channel."""

    channel: Channel

    def receive(self, record: Record, message: bytes) -> None:
        """A message has come. Must not raise: those behind it would be lost."""

    def lost(self) -> None:
        """The other side is gone."""


class Channel(asyncio.Protocol):
    """One end of a connection. All methods belong to one event loop."""

    def __init__(self, writes: Ring, reads: Ring, peer: Peer) -> None:
        peer.channel = self
        self._writes = writes
        self._reads = reads
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._records: list[bytes] = []
        self._inline: list[Any] = []
        self._inline_bytes = 0
        self._is_flushing = False
        self._read = 0  # messages of the other's ring, since it was told last
        self._told_at = 0  # how far it had been read then
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        # Who keeps the channel keeps no memory: a peer does, until the garbage collector comes.
        self._writes = self._reads = Ring(memoryview(bytearray(1)))
        self._peer.lost()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_full(self) -> bool:
        """Whether the other side is so far behind that it should be sent no more.

        What is sent all the same is kept: who sends asks before.
        """
        on_the_way = self._inline_bytes
        if self._transport is not None:
            on_the_way += self._transport.get_write_buffer_size()
        return on_the_way > WAITING_BYTES

    def send(
        self,
        number: int,
        kind: int,
        message: Any,
        part: int = 0,
        within_s: float = 0.0,
        sent_s: float = 0.0,
    ) -> None:
        """Send bytes, or what is like them, at the end of this turn of the event loop."""
        self._flush_soon()
        is_in_ring = self._writes.write(message)
        if not is_in_ring:
            self._inline.append(message)
            self._inline_bytes += len(message)
        record = _RECORD.pack(number, len(message), kind, is_in_ring, part, within_s, sent_s)
        self._records.append(record)

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        records = len(self._records)
        head = _HEAD.pack(records * _RECORD.size + self._inline_bytes, self._read, records)
        frame = b"".join((head, *self._records, *self._inline))
        self._records.clear()
        self._inline.clear()
        self._read = self._inline_bytes = 0
        self._told_at, self._is_flushing = self._reads.passed, False
        if self.is_open:
            self._transport.write(frame)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        buffer, at = self._buffer, 0
        while len(buffer) >= at + _HEAD.size:
            size, released, count = _HEAD.unpack_from(buffer, at)
            begin = at + _HEAD.size
            if len(buffer) < begin + size:
                break
            at = begin + size
            self._writes.release(released)
            self._take(memoryview(buffer)[begin:at].tobytes(), count)
        del buffer[:at]

    def _take(self, body: bytes, count: int) -> None:
        """The messages of one frame: records, and behind them those that are in no ring."""
        records = count * _RECORD.size
        inline = records
        for fields in _RECORD.iter_unpack(body[:records]):
            record = Record(*fields)
            if record.is_in_ring:
                self._read += 1
                message = self._reads.read(record.size)
            else:
                message = body[inline : inline + record.size]
                inline += record.size
            self._peer.receive(record, message)
        # Where nothing is to be said, the ring would fill up.
        if self._read >= TOLD_EACH or self._reads.passed - self._told_at > TOLD_BYTES:
            self._flush_soon()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _rings(memory: int) -> tuple[Ring, Ring]:
    """The rings in a memory: what the connecting side writes, and what the other does."""
    whole = memoryview(mmap.mmap(memory, SENT_BYTES + ANSWERED_BYTES))
    return Ring(whole[:SENT_BYTES]), Ring(whole[SENT_BYTES:])


async def connect(path: str, peer: Peer) -> None:
    """Connect a peer to whoever listens at a path. Raises OSError."""
    memory = os.memfd_create("flowlang")
    try:
        os.ftruncate(memory, SENT_BYTES + ANSWERED_BYTES)
        sent, answered = _rings(memory)
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(path)
            socket.send_fds(link, [_HELLO], [memory])
            link.setblocking(False)
        except OSError:
            link.close()
            raise
    finally:
        os.close(memory)
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(lambda: Channel(sent, answered, peer), sock=link)


class Listener:
    """Takes connections at a path; `meet` gives the peer for each."""

    def __init__(self, path: str, meet: Callable[[], Peer]) -> None:
        self._meet = meet
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        os.chmod(path, 0o600)
        self._socket.listen()
        self._socket.setblocking(False)
        self._greeting: set[socket.socket] = set()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            link, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):  # who knocked is gone
            return
        except OSError as error:  # the loop would call this again and again, at full speed
            log.warning("flowlang: a connection cannot be taken: %s", error.strerror)
            self._loop.remove_reader(self._socket)
            self._pause = self._loop.call_later(PAUSE_S, self._listen)
            return
        link.setblocking(False)
        self._greeting.add(link)
        self._loop.add_reader(link, self._greet, link)

    def _greet(self, link: socket.socket) -> None:
        """The first message of a connection, which brings the memory."""
        self._loop.remove_reader(link)
        self._greeting.discard(link)
        memories: list[int] = []
        try:
            hello, memories, _, _ = socket.recv_fds(link, len(_HELLO), 1)
            if hello != _HELLO or len(memories) != 1:
                raise OSError("no flowlang at the other end")
            sent, answered = _rings(memories[0])
        except (OSError, ValueError):
            link.close()
            return
        finally:
            for memory in memories:
                os.close(memory)
        connecting = self._loop.create_task(
            self._loop.connect_accepted_socket(lambda: Channel(answered, sent, self._meet()), link)
        )
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for link in self._greeting:
            self._loop.remove_reader(link)
            link.close()
