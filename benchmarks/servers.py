"""Servers as processes of their own: started on a free port, waited for, asked, always killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
START_S = 60.0  # a server that takes longer to answer has failed
STOP_S = 5.0  # what does not end by itself is killed then
ANSWER_S = 30.0
PATHS = {"mosec": "/inference", "litserve": "/predict"}  # of the others it is `/`
PACKAGES = {
    "uvicorn": ("uvicorn", "httptools", "uvloop"),
    "mosec": ("mosec", "numpy", "opencv-python-headless", "onnxruntime"),
    "litserve": ("litserve", "fastapi", "numpy", "opencv-python-headless", "onnxruntime"),
}


@dataclass(frozen=True)
class Setting:
    """A server as it is started; for flowlang the options are the flow's text."""

    server: str
    options: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ", ".join([self.server, *(f"{n}={v}" for n, v in self.options.items())])


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    port: int
    path: str
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """The status and body of one answer. Raises OSError or HTTPException without one."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request("POST", self.path, body, {"Content-Type": "image/jpeg"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def processes(self) -> list[int]:
        """The server and all that it has started."""
        first = psutil.Process(self.pid)
        return [first.pid, *(child.pid for child in first.children(recursive=True))]


@contextmanager
def started(
    command: Callable[[int], Sequence[str | Path]], path: str, sample: bytes, log: Path
) -> Iterator[Server]:
    """A server that has answered `sample` once. `command` is told the port.

    Raises RuntimeError, with what it wrote, if it never does.
    """
    port = _free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command(port)), cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        server = Server(port, path, process.pid)
        end_s = time.monotonic() + START_S
        while not _answers(server, sample):
            if process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"the server does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield server
    finally:
        _end(process)


def _answers(server: Server, sample: bytes) -> bool:
    with suppress(OSError, HTTPException):
        return server.ask(sample)[0] == 200
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and whatever it has started: all of it is in one process group."""
    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def versions(server: str, interpreter: Path) -> dict[str, str] | None:
    """The versions of what a peer runs on there; None where it is not installed."""
    program = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [interpreter_of(server, interpreter), "-c", program, *PACKAGES[server]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def interpreter_of(server: str, peers: Path) -> str:
    """uvicorn is flowlang's own server, so it runs where flowlang does."""
    return sys.executable if server == "uvicorn" else str(peers)
