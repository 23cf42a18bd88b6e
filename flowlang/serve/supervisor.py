"""The processes of `--ingest`: one engine, several fronts, and the one that watches over them.

Layer 4. The watching process does nothing else, so it has nothing to die of: it starts the others
by fork, before anything in it has made a thread, and starts again what has ended. It alone listens
to signals; the others are told to stop through a pipe, whose end they take for the same.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from flowlang.serve.launch import STOPS, end, flush

log = logging.getLogger("flowlang.serve")

HEARD = (*STOPS, signal.SIGCHLD)
# A process that lived no longer is started again after a pause, as is an engine without flows.
SHORT_S = 1.0
PAUSES_S = (0.1, 5.0)  # the first, and the longest
TOUCH_S = 3600.0  # between looks at the folder, for whoever removes what is old
LONGEST_BYTES = 80  # of a path to the folder: a socket's has 107 at most


class Reins:
    """What a child is told by, and tells."""

    def __init__(self, stop: int, ready: int, parent: int, folder: str) -> None:
        self._stop, self._ready = stop, ready
        self._parent, self._folder = parent, folder

    def fileno(self) -> int:
        """Readable, or at its end, once the child is to stop."""
        return self._stop

    def is_ready(self) -> None:
        """To be called once the child does what it is there for."""
        with contextlib.suppress(OSError):
            os.write(self._ready, b"!")

    def end(self, status: int) -> NoReturn:
        """End the child without waiting for any thread."""
        if os.getppid() != self._parent:  # nobody else is there to do it
            shutil.rmtree(self._folder, ignore_errors=True)
        end(status)


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
    """Runs an engine and fronts until a signal comes. Must be made in the main thread.

    `held` are the sockets that the fronts listen to: they are kept open while a front is started
    again, so that who connects meanwhile waits for it, and closed here once all is to stop.
    """

    def __init__(self, engine: Work, fronts: Sequence[Work], held: Sequence[socket.socket]) -> None:
        self._folder = _own_folder()
        self._path = os.path.join(self._folder, "engine")
        self._engine = engine
        self._fronts = fronts
        self._held = held
        self._pid = os.getpid()
        self._signals = _Signals()
        self._children: dict[int, _Child] = {}
        self._due: dict[int | None, float] = {}  # when those that ended are started again
        self._was_ready = False
        self._is_stopping = False
        self._status = 0
        self._short: Counter[int | None] = Counter()  # how often each ended at once, in a row

    def run(self) -> int:
        """Returns the exit status: 0 if all that was accepted has been answered."""
        # What is there before the forks is never garbage. Were a child's collector to look through
        # it, it would write to all its pages, and each child have 10 MiB for itself that all share.
        gc.collect()
        gc.freeze()
        try:
            for role in (None, *range(len(self._fronts))):
                self._start(role)
            while self._children or self._due:
                for number in self._signals.wait(self._pause_s()):
                    if number in STOPS:
                        self._be_told_to_stop()
                self._reap()
                self._start_due()
                self._touch()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._status

    def _pause_s(self) -> float:
        """How long to wait for a signal."""
        now_s = time.monotonic()
        return max(0.0, min(self._due.values(), default=now_s + TOUCH_S) - now_s)

    def _touch(self) -> None:
        """Have the socket look young: what lies there untouched for days may be removed, and no
        front that begins would find the engine any more.
        """
        for path in (self._folder, self._path):
            with contextlib.suppress(OSError):  # the engine does not listen yet
                os.utime(path, follow_symlinks=False)

    # Beginning

    def _start(self, role: int | None) -> None:
        """Raises OSError where there is no room for a process."""
        if role is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        flush()
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            with _signals_held_back():  # one that came in between would count as the supervisor's
                pid = os.fork()
                if not pid:
                    self._signals.heed_none()
        except OSError:
            for one in ends:
                os.close(one)
            raise
        stop, tell, ready, told = ends
        os.set_blocking(ready, False)
        if not pid:
            os.close(tell)
            os.close(ready)
            self._be(
                self._engine if role is None else self._fronts[role],
                Reins(stop, told, self._pid, self._folder),
            )
        os.close(stop)
        os.close(told)
        self._children[pid] = _Child(role, tell, ready, time.monotonic())

    def _start_due(self) -> None:
        now_s = time.monotonic()
        for role in [role for role, due_s in self._due.items() if due_s <= now_s]:
            del self._due[role]
            try:
                self._start(role)
            except OSError as error:  # the others go on, and what it takes may be there later
                log.warning("flowlang: %s cannot be started: %s", _name(role), error.strerror)
                self._start_later(role, True)

    def _be(self, work: Work, reins: Reins) -> None:
        """The whole life of a child."""
        status = 1
        try:
            for child in self._children.values():
                child.close()
            status = work(self._path, reins)
        except BaseException:
            log.exception("flowlang: a process could not go on")
        finally:
            reins.end(status)

    # Ending

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            child = self._children.pop(pid, None)
            if child is not None:  # as the first process of a container it has other orphans too
                self._ended(child, status)

    def _ended(self, child: _Child, status: int) -> None:
        was_ready = child.was_ready()
        child.close()
        role = child.role
        if self._is_stopping:
            self._status = self._status or min(1, status)
            return
        how = f"{_name(role)} {_how(status)}"
        if role is None:
            self._was_ready = self._was_ready or was_ready
            if not self._was_ready:  # it cannot begin, and says why unless it was ended
                if os.WIFSIGNALED(status):
                    log.warning("flowlang: %s", how)
                self._status = 1
                self._stop()
                return
        log.warning("flowlang: %s: it is started again", how)
        lived_s = time.monotonic() - child.since_s
        self._start_later(role, lived_s < SHORT_S or (role is None and not was_ready))

    def _start_later(self, role: int | None, is_short: bool) -> None:
        """Have it started again: at once, or after a pause where it keeps ending at once."""
        self._short[role] = self._short[role] + 1 if is_short else 0
        first_s, longest_s = PAUSES_S
        pause_s = first_s * 2 ** min(self._short[role] - 1, 10) if self._short[role] else 0.0
        self._due[role] = time.monotonic() + min(longest_s, pause_s)

    def _be_told_to_stop(self) -> None:
        """A second time it ends all at once."""
        if not self._is_stopping:
            self._stop()
            return
        self._status = 1
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)  # none of them is reaped, so that all are ours

    def _stop(self) -> None:
        """Have all answer what they accepted. The engine does so until the fronts have left it."""
        self._is_stopping = True
        self._due.clear()
        for listener in self._held:
            listener.close()
        for child in self._children.values():
            child.tell()


class _Signals:
    """Signals as they come, one after the other, rather than in the middle of anything."""

    def __init__(self) -> None:
        self._heard, self._told = os.pipe()
        os.set_blocking(self._heard, False)
        os.set_blocking(self._told, False)
        signal.set_wakeup_fd(self._told)
        for number in HEARD:
            signal.signal(number, _note)

    def wait(self, within_s: float) -> bytes:
        """The numbers of those that have come, at least one unless it takes longer."""
        select.select([self._heard], [], [], within_s)
        try:
            return os.read(self._heard, 1 << 10)
        except BlockingIOError:
            return b""

    def heed_none(self) -> None:
        """A terminal's Ctrl-C is not for a child, nor what is sent to a whole group: it is told."""
        signal.set_wakeup_fd(-1)
        os.close(self._heard)
        os.close(self._told)
        for stop in STOPS:
            signal.signal(stop, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _own_folder() -> str:
    """A new folder for its owner alone. Raises OSError.

    The usual place may be full, read-only as in many a container, or too long for a socket's path.
    """
    with contextlib.suppress(OSError):
        usual = tempfile.gettempdir()
        if len(os.fsencode(usual)) <= LONGEST_BYTES:
            return tempfile.mkdtemp(prefix="flowlang-", dir=usual)
    return tempfile.mkdtemp(prefix="flowlang-", dir="/dev/shm")


def _note(number: int, frame: object) -> None:
    """That the signal came is in the pipe."""


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _name(role: int | None) -> str:
    return "the engine" if role is None else f"front {role}"


def _how(status: int) -> str:
    """How a process ended, by what `wait` says."""
    if os.WIFSIGNALED(status):
        return f"was ended by signal {os.WTERMSIG(status)}"
    return f"ended with status {os.WEXITSTATUS(status)}"
