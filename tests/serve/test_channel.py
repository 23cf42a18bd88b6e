"""Messages between processes: a ring and a channel, against what was sent."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlang.serve import channel
from flowlang.serve.channel import Channel, Listener, Record, Ring, connect


@given(
    st.integers(16, 300),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 4)), max_size=80),
)
def test_a_ring_gives_what_was_put_in(length: int, steps: list[tuple[int, int]]) -> None:
    """In order and whole, whatever the sizes; an empty ring refuses only what is longer than it."""
    memory = memoryview(bytearray(length))
    writes, reads = Ring(memory), Ring(memory)
    inside: deque[bytes] = deque()
    unread: deque[bytes] = deque()
    for number, (size, released) in enumerate(steps):
        message = random.Random(number).randbytes(size)
        if writes.write(message):
            inside.append(message)
            unread.append(message)
        else:
            assert inside or size > length
        for _ in range(min(released, len(unread))):
            wanted = unread.popleft()
            assert reads.read(len(wanted)) == wanted
            inside.popleft()
            writes.release(1)
    for wanted in unread:
        assert reads.read(len(wanted)) == wanted


def test_an_empty_ring_has_room_for_all_of_itself() -> None:
    """The longest message is as long as the ring, and one byte more is refused."""
    ring = Ring(memoryview(bytearray(10)))
    assert not ring.write(bytes(11))
    assert ring.write(bytes(10))
    assert not ring.write(b"x")
    ring.release(1)
    assert ring.write(b"x")


SENT_S = 12_345_678.000_1  # of a machine that has run for months, to the tenth of a millisecond


class Teller:
    """A peer that answers each message with its number and itself turned round."""

    channel: Channel

    def __init__(self) -> None:
        self.heard: list[tuple[Record, bytes]] = []
        self.is_lost = asyncio.Event()
        self.answers = True

    def receive(self, record: Record, message: bytes) -> None:
        self.heard.append((record, message))
        if self.answers:
            self.channel.send(record.number, record.kind, message[::-1])

    def lost(self) -> None:
        self.is_lost.set()


async def _pair(folder: Path) -> tuple[Listener, Teller, Teller]:
    """A listener, the peer that answers, and the one that asks."""
    path = str(folder / "engine")
    answering, asking = Teller(), Teller()
    asking.answers = False
    listener = Listener(path, lambda: answering)
    await connect(path, asking)
    return listener, answering, asking


async def _part(listener: Listener, answering: Teller, asking: Teller) -> None:
    asking.channel.close()
    await _until(lambda: answering.is_lost.is_set() and asking.is_lost.is_set())
    listener.close()


async def _until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def test_messages_of_all_sizes_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those for which the ring is too small, and many more than it holds at once."""
    monkeypatch.setattr(channel, "SENT_BYTES", 100_000)
    monkeypatch.setattr(channel, "ANSWERED_BYTES", 20_000)

    async def go() -> None:
        listener, answering, asking = await _pair(tmp_path)
        sizes = [0, 1, 99_999, 100_001, 20_001, 250_000, *(i * 37 % 5_000 for i in range(600))]
        messages = [random.Random(size).randbytes(size) for size in sizes]
        for number, message in enumerate(messages):
            asking.channel.send(
                number, number % 7, message, part=number % 11, within_s=0.5, sent_s=SENT_S
            )
            if number % 50 == 0:
                await asyncio.sleep(0.01)
        await _until(lambda: len(asking.heard) == len(messages))
        for number, (record, answer) in enumerate(asking.heard):
            assert (record.number, record.kind, record.size) == (number, number % 7, sizes[number])
            assert answer == messages[number][::-1]
        assert [r.part for r, _ in answering.heard] == [n % 11 for n in range(len(messages))]
        assert {(r.within_s, r.sent_s) for r, _ in answering.heard} == {(0.5, SENT_S)}
        assert not all(r.is_in_ring for r, _ in answering.heard)
        assert sum(r.is_in_ring for r, _ in answering.heard) > 100
        await _part(listener, answering, asking)

    asyncio.run(go())


def test_a_side_that_only_listens_frees_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages one way alone go through the ring again and again."""
    monkeypatch.setattr(channel, "SENT_BYTES", 300_000)

    async def go() -> None:
        listener, answering, asking = await _pair(tmp_path)
        answering.answers = False
        for number in range(1000):
            asking.channel.send(number, 0, bytes(2_000))
            if number % 20 == 0:
                await _until(lambda n=number: len(answering.heard) >= n - 20)
        await _until(lambda: len(answering.heard) == 1000)
        assert all(record.is_in_ring for record, _ in answering.heard)
        await _part(listener, answering, asking)

    asyncio.run(go())


@pytest.mark.parametrize("each", [1, 7, 1000])
def test_a_channel_whose_other_side_does_not_read_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    """At the same number of bytes, however many messages are sent in a turn of the loop."""
    monkeypatch.setattr(channel, "SENT_BYTES", 1_000_000)
    monkeypatch.setattr(channel, "WAITING_BYTES", 3_000_000)

    async def go() -> int:
        path = str(tmp_path / "engine")
        asking = Teller()
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(path)
            deaf.listen()
            await connect(path, asking)
            sent = 0
            while not asking.channel.is_full:
                asking.channel.send(sent, 0, bytes(50_000))
                sent += 1
                if sent % each == 0:
                    await asyncio.sleep(0)
            asking.channel.close()
        await _until(asking.is_lost.is_set)
        return sent * 50_000

    in_socket = 300_000
    assert 4_000_000 < asyncio.run(go()) <= 4_000_000 + 50_000 + in_socket


async def _is_cut_off(link: socket.socket) -> bool:
    link.setblocking(False)
    try:
        return not await asyncio.wait_for(asyncio.get_running_loop().sock_recv(link, 1), 5)
    except ConnectionResetError:
        return True


def test_strangers_are_turned_away(tmp_path: Path) -> None:
    """Who brings no ring is cut off, and others are served; the path is its owner's alone."""

    async def go() -> None:
        listener, answering, asking = await _pair(tmp_path)
        path = tmp_path / "engine"
        assert path.stat().st_mode & 0o777 == 0o600
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b"flowlang ring 1", b""):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(path))
                if hello:
                    stranger.sendall(hello)
                else:
                    stranger.shutdown(socket.SHUT_WR)
                assert await _is_cut_off(stranger)
        with socket.socket(socket.AF_UNIX) as stranger:  # a ring too small for both sides
            memory = os.memfd_create("small")
            stranger.connect(str(path))
            socket.send_fds(stranger, [b"flowlang ring 1"], [memory])
            os.close(memory)
            assert await _is_cut_off(stranger)
        asking.channel.send(1, 1, b"still there")
        await _until(lambda: asking.heard)
        assert asking.heard[0][1] == b"ereht llits"
        await _part(listener, answering, asking)

    asyncio.run(go())


def test_a_lost_channel_gives_its_memory_back(tmp_path: Path) -> None:
    """At once, whoever still knows the channel: rings that pictures went through are large."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("/memfd:flowlang")

    async def go() -> None:
        gc.collect()
        before = mapped()
        listener, answering, asking = await _pair(tmp_path)
        asking.channel.send(1, 1, b"picture")
        await _until(lambda: asking.heard)
        assert mapped() == before + 2
        gc.disable()
        try:
            await _part(listener, answering, asking)
            await _until(lambda: mapped() == before)
        finally:
            gc.enable()
        asking.channel.send(2, 2, b"nobody is there")
        await asyncio.sleep(0)

    asyncio.run(go())
