"""The process that a server runs in: where it listens, what it is allowed, how it ends.

Layer 4. Knows nothing of what is served.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn, TextIO

from flowlang.diagnostics import CompileError, FlowError

BACKLOG = 2048  # connections that nobody has taken yet
STOPS = (signal.SIGTERM, signal.SIGINT)
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
    with _unread(sys.stdout):
        print(line, flush=True)


def flush() -> None:
    """Have what was said and logged written."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed when the process began
            with _unread(stream):
                stream.flush()


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
