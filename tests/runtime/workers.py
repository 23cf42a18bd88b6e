"""Instances that do as a test tells them, and flows of one stage for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlang.app import App
from flowlang.runtime.stage import InstanceLost
from tests.waiting import LONG_S

# One stage taking any bytes, since what its instances do with them is up to each test.
NET = """
    export flow f = decode -> resize(8) -> rgb -> trt("heads.onnx", batch=1..4) x{}
    schedule {{ f(queue=100000) }}"""
ONE_BY_ONE = NET.replace("1..4", "1")
Start = Callable[..., App]


class Worker:
    """An instance that does to a batch what it is told, and remembers its life."""

    def __init__(self, work: Callable[[Sequence[Any]], list[Any]] = list) -> None:
        self.work = work
        self.is_warm = self.is_closed = False
        self.ran: list[Any] = []

    def warm(self) -> None:
        self.is_warm = True

    def run(self, values: Sequence[Any]) -> list[Any]:
        assert self.is_warm
        assert not self.is_closed
        self.ran += [v for v in values if isinstance(v, bytes)]
        return self.work(values)

    def close(self) -> None:
        self.is_closed = True


class Interrupted(BaseException):
    """Like KeyboardInterrupt, and not one."""


class Gate:
    """Work that waits behind a gate. What is on its way through is shown by `entered`."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        self.entered.set()
        assert self.opened.wait(LONG_S)
        return list(values)


def name(number: int) -> bytes:
    return b"item %d" % number


def row(number: int) -> NDArray[np.float32]:
    return np.full(4, number, np.float32)


def poison(values: Sequence[Any]) -> list[Any]:
    if b"poison" in values:
        raise InstanceLost("the context is gone")
    return list(values)


class Overlapped(Worker):
    """An instance that begins a batch while the one before is under way. `step` is told of all."""

    def __init__(self, step: Callable[[str, list[Any]], None]) -> None:
        super().__init__()
        self.step = step

    def begin(self, values: Sequence[Any]) -> list[Any]:
        assert self.is_warm
        assert not self.is_closed
        self.step("begin", list(values))
        return list(values)

    def launch(self, begun: list[Any]) -> list[Any]:
        self.step("launch", begun)
        return begun

    def collect(self, launched: list[Any]) -> list[Any]:
        self.step("collect", launched)
        return launched
