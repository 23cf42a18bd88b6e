"""The process that a server runs in: where it listens, what it is allowed, how it ends.

Layer 4. Knows nothing of what is served.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

from flowlang.diagnostics import CompileError, FlowError

BACKLOG = 2048  # connections that nobody has taken yet
STOPS = (signal.SIGTERM, signal.SIGINT)
READER_S = 1.0  # for so long a reader of what is written may stand still, before it is left out
KEPT_BYTES = 64 << 20  # at the top of a heap; what is larger than half of it lies in none

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

log = logging.getLogger("flowlang.serve")


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A socket that listens there, a shared one beside others. Raises FlowError if it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(
            address[:2],
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=both,
            reuse_port=is_shared,
        )
    except OSError as error:
        reason = (error.strerror or "").partition(" (while ")[0]  # Python repeats the address
        raise FlowError(f"cannot listen on {host}:{port}: {reason}") from error
    except UnicodeError:
        raise FlowError(f"cannot listen on {host}:{port}: this is no name of a host") from None


def url_of(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def open_standard_streams() -> None:
    """Open those that were closed when the process began: a socket would get their numbers.

    libuv aborts where it is to close one of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def allow_many_connections() -> None:
    """Each connection takes a file descriptor, and the usual soft limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def keep_freed_memory() -> None:
    """Have glibc keep what bodies and pictures have used, rather than give it back each time.

    Given back and had again, memory is cleared by the kernel page by page: measured on bodies of
    65 KB, up to ten page faults a request and a third of the processor time spent on it. Naming
    one of the two thresholds stops glibc from raising the other by itself, so both are named.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        set_option(_M_TRIM_THRESHOLD, KEPT_BYTES)


def say(line: str) -> None:
    """Say a line on stdout. Who reads that may be gone, and the server goes on all the same."""
    if sys.stdout is not None and _takes(sys.stdout, READER_S):
        with _unread(sys.stdout):
            print(line, flush=True)


def flush() -> None:
    """Have what was said and logged written."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _takes(stream):  # None if closed when the process began
            with _unread(stream):
                stream.flush()


class Outlet:
    """Where the log is written to: a stream of the process, as long as somebody reads it.

    A reader may stand still and not be gone: a terminal after Ctrl-S, a shipper of logs that hangs.
    It is waited for once, for READER_S; then, until it goes on, what is logged is left out. No
    request would be answered otherwise, and no signal heard.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._is_stalled = False
        self._is_cut = False  # the last line written has no end

    def write(self, text: str) -> None:
        stream = self._stream
        if stream is None:
            return
        line = ("\n" if self._is_cut else "") + text
        left = memoryview(line.encode(stream.encoding, "backslashreplace"))
        while left:
            self._is_stalled = not _takes(stream, 0.0 if self._is_stalled else READER_S)
            if self._is_stalled:
                return
            try:
                left = left[os.write(stream.fileno(), left[: select.PIPE_BUF]) :]
            except OSError:  # the reader is gone, or a disk is full
                return
            self._is_cut = bool(left)


def _takes(stream: TextIO, within_s: float = 0.0) -> bool:
    """Whether a stream takes PIPE_BUF bytes without waiting for its reader."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except OSError:  # none of the system's, as in a notebook
        return True
    return bool(poll.poll(within_s * 1e3))


@contextlib.contextmanager
def _unread(stream: TextIO) -> Iterator[None]:
    """What a stream cannot take is let go of, and all that comes after it.

    It would stay in the stream's buffer, and fail again whenever that is written, at the end too.
    """
    try:
        yield
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def end(status: int) -> NoReturn:
    """End the process without waiting for any thread."""
    flush()
    os._exit(status)


def report(failure: BaseException) -> None:
    """Say why the flows cannot be served."""
    if isinstance(failure, CompileError):
        log.error("%s", failure)
    elif isinstance(failure, (FlowError, OSError)):
        log.error("flowlang: %s", failure)
    else:
        log.error("flowlang: the flows cannot be loaded", exc_info=failure)
