"""The processes of a server with `--ingest`, seen from outside."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.serve.server import Server, wait_until


@dataclass(frozen=True)
class Processes:
    """The engine and the fronts there are now."""

    engine: int
    fronts: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return (self.engine, *self.fronts)


def processes(server: Server, fronts: int = 2) -> Processes:
    """Those of a server that is complete, or will soon be."""
    found: list[Processes] = []

    def are_there() -> bool:
        engines, listening = _by_role(server)
        if len(engines) == 1 and len(listening) == fronts:
            found.append(Processes(engines[0], tuple(listening)))
        return bool(found)

    wait_until(are_there)
    return found[0]


def _by_role(server: Server) -> tuple[list[int], list[int]]:
    """The engines and the fronts: it is these that listen at the port of HTTP."""
    engines: list[int] = []
    fronts: list[int] = []
    for child in psutil.Process(server.process.pid).children():
        try:
            ports = {c.laddr.port for c in child.net_connections("tcp") if c.status == "LISTEN"}
        except psutil.Error:  # it has ended just now
            continue
        (fronts if server.port in ports else engines).append(child.pid)
    return engines, fronts


def is_there(pid: int) -> bool:
    """Whether a process runs. One that ended and that nobody asked about does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(*pids: int) -> None:
    wait_until(lambda: not any(map(is_there, pids)))


def kill(pid: int) -> None:
    """End a process as the kernel does when memory is out."""
    psutil.Process(pid).send_signal(signal.SIGKILL)
    wait_gone(pid)


def memory_bytes(pid: int) -> int:
    """What a process has for itself alone."""
    return int(psutil.Process(pid).memory_full_info().uss)


def peak_bytes(server: Server) -> int:
    """The most memory that each process of a server ever had, added up."""
    root = psutil.Process(server.process.pid)
    found = 0
    for process in (root, *root.children()):
        status = Path(f"/proc/{process.pid}/status").read_text()
        found += int(status.partition("VmHWM:")[2].split()[0]) << 10
    return found


def open_files(pid: int) -> int:
    return int(psutil.Process(pid).num_fds())
