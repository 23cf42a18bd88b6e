"""The processes of `--ingest`: one engine, several fronts, and the one that watches over them.

Layer 4. The watching process does nothing else, so it has nothing to die of: it starts the others
by fork, before anything in it has made a thread, and starts again what has ended. It alone listens
to signals; the others are told to stop through a pipe, whose end they take for the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger("flowlang.serve")

STOPS = (signal.SIGTERM, signal.SIGINT)
SHORT_S = 1.0  # a process that lived no longer is started again after a pause
PAUSES_S = (0.1, 5.0)  # the first, and the longest


class Reins(Protocol):
    """What a child is told by, and tells."""

    def fileno(self) -> int:
        """Readable, or at its end, once the child is to stop."""

    def is_ready(self) -> None:
        """To be called once the child does what it is there for."""


class _Reins:
    def __init__(self, stop: int, ready: int) -> None:
        self._stop, self._ready = stop, ready

    def fileno(self) -> int:
        return self._stop

    def is_ready(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._ready, b"!")


Work = Callable[[str, Reins], int]
"""What a child does, told the path of the engine's socket. Returns its exit status."""


@dataclass(slots=True)
class _Child:
    """A process that runs. `role` is None for the engine, and the number of a front."""

    role: int | None
    stop: int
    ready: int
    since_s: float

    def tell(self) -> None:
        """Have it stop, after it has answered what it accepted."""
        with contextlib.suppress(OSError):
            os.write(self.stop, b"!")

    def was_ready(self) -> bool:
        try:
            return bool(os.read(self.ready, 1))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self.stop)
        os.close(self.ready)


class Supervisor:
    """Runs an engine and fronts until a signal comes. Must be made in the main thread."""

    def __init__(self, engine: Work, fronts: Sequence[Work]) -> None:
        self._folder = tempfile.mkdtemp(prefix="flowlang-")  # for its owner alone
        self._path = os.path.join(self._folder, "engine")
        self._engine = engine
        self._fronts = fronts
        self._children: dict[int, _Child] = {}
        self._was_ready = False
        self._is_stopping = False
        self._status = 0
        self._short = 0  # children that ended at once, one after the other

    def run(self) -> int:
        """Returns the exit status: 0 if all that was accepted has been answered."""
        for stop in STOPS:
            signal.signal(stop, self._on_signal)
        try:
            self._start(None)
            for number in range(len(self._fronts)):
                self._start(number)
            while self._children:
                pid, status = os.wait()
                child = self._children.pop(pid, None)
                if child is not None:
                    self._ended(child, status)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._status

    def _start(self, role: int | None) -> None:
        if role is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        (stop, tell), (ready, told) = os.pipe(), os.pipe()
        os.set_blocking(ready, False)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.close(tell)
            os.close(ready)
            self._be(self._engine if role is None else self._fronts[role], _Reins(stop, told))
        os.close(stop)
        os.close(told)
        self._children[pid] = child = _Child(role, tell, ready, time.monotonic())
        if self._is_stopping:  # the signal came in between
            child.tell()

    def _be(self, work: Work, reins: Reins) -> None:
        """The whole life of a child. A terminal's Ctrl-C is not for it: it is told."""
        status = 1
        try:
            for child in self._children.values():
                child.close()
            for stop in STOPS:
                signal.signal(stop, signal.SIG_IGN)
            status = work(self._path, reins)
        except BaseException:
            log.exception("flowlang: a process could not go on")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _ended(self, child: _Child, status: int) -> None:
        was_ready = child.was_ready()
        child.close()
        is_engine = child.role is None
        if is_engine:
            self._was_ready = self._was_ready or was_ready
        if self._is_stopping:
            self._status = self._status or min(1, status)
            self._stop_engine()
            return
        if is_engine and not self._was_ready:  # it cannot begin: its reason is told already
            self._status = 1
            self._stop()
            return
        name = "the engine" if is_engine else f"front {child.role}"
        log.warning("flowlang: %s %s: it is started again", name, _how(status))
        self._short = self._short + 1 if time.monotonic() - child.since_s < SHORT_S else 0
        if self._short:
            first, longest = PAUSES_S
            time.sleep(min(longest, first * 2 ** min(self._short - 1, 10)))
        self._start_unless_stopping(child.role)

    def _start_unless_stopping(self, role: int | None) -> None:
        if self._is_stopping:
            self._stop_engine()
        else:
            self._start(role)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._is_stopping:
            for pid in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(1)
        self._stop()

    def _stop(self) -> None:
        """Have the fronts answer what they accepted. The engine comes last: they need it."""
        self._is_stopping = True
        for child in list(self._children.values()):
            if child.role is not None:
                child.tell()
        self._stop_engine()

    def _stop_engine(self) -> None:
        if all(child.role is None for child in self._children.values()):
            for child in self._children.values():
                child.tell()


def _how(status: int) -> str:
    """How a process ended, by what `wait` says."""
    if os.WIFSIGNALED(status):
        return f"was ended by signal {os.WTERMSIG(status)}"
    return f"ended with status {os.WEXITSTATUS(status)}"
