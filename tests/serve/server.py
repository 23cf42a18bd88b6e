"""Real servers for tests: processes, what they serve, and raw connections to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples import models

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0  # a test that waits longer than this for anything has failed

# What a server may be made of: the parameters of a fixture, where it is the same to the tests.
KINDS = [pytest.param((), id="one-process"), pytest.param(("--ingest", "2"), id="ingest")]

FLOWS = """
## Three best classes of one picture.
export flow classify: bytes -> list<label> =
  decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("classifier.onnx") -> softmax
  -> top(3, names="classes.txt")
export flow two = decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("two_heads.onnx")
export flow echo = pass
export flow same = trt("identity.onnx")
export flow pair = trt("two_inputs.onnx")
export flow held = trt("identity.onnx", batch=1..64, wait=60s)
export flow thousand = trt("identity.onnx", batch=1..1000, wait=60s)
schedule { echo(queue=1000) }
"""


def write_flows(folder: Path) -> Path:
    """Every kind of flow the tests ask for; `held` and `thousand` wait for a full batch."""
    models.resnet(folder / "classifier.onnx", width=8, size=64, classes=10)
    models.labels(folder / "classes.txt", 10)
    models.two_heads(folder / "two_heads.onnx")
    models.two_inputs(folder / "two_inputs.onnx")
    models.identity(folder / "identity.onnx", ("N", 3))
    return write(folder / "all.flow", FLOWS)


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


class Server:
    """A server process. `url` is where it listens; `client` speaks to it.

    `trust` is what the client believes a certificate by, `environment` what the process finds there
    besides the usual.
    """

    def __init__(
        self,
        arguments: list[str],
        errors: Path,
        trust: ssl.SSLContext | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._errors = errors
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self._guard = threading.Timer(0.0, self.process.kill)
        self.outlast(PATIENCE_S * 2)
        self.urls = self.line("loading, on ").removeprefix("loading, on ").strip().split(", ")
        self.url = self.urls[-1]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, verify=trust or True)

    def outlast(self, seconds: float) -> None:
        """Kill it unless it has ended within so long."""
        self._guard.cancel()
        self._guard = threading.Timer(seconds, self.process.kill)
        self._guard.daemon = True
        self._guard.start()

    def line(self, start: str) -> str:
        """The next line it prints, which begins with `start`."""
        stdout = self.process.stdout
        assert stdout is not None
        line = stdout.readline()
        assert line.startswith(start), line + self.errors
        return line

    def port_of(self, scheme: str) -> int:
        """The port of the one address that begins so, such as `grpc`."""
        (url,) = (url for url in self.urls if url.startswith(f"{scheme}:"))
        return int(url.rpartition(":")[2])

    def wait_ready(self) -> Server:
        self.line("serving ")
        return self

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text()

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.client.get("/health/ready").json()
        return health

    def wait_inside(self, count: int) -> None:
        """Wait until so many requests are inside."""
        wait_until(lambda: self.health()["requests"] == count)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit status, once the process has ended."""
        return self.process.wait(PATIENCE_S)

    def connect(self) -> Raw:
        return Raw(self.port)

    def close(self) -> None:
        self._guard.cancel()
        self.process.kill()
        self.process.wait()
        self.client.close()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def serving(
    folder: Path,
    *arguments: str,
    trust: ssl.SSLContext | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """`flowlang serve` on a free port; killed at the end if it still runs."""
    command = ("-m", "flowlang", "serve", "--port", "0", *arguments)
    with running(folder, *command, trust=trust, environment=environment) as server:
        yield server


def refused(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The status and the words with which `flowlang serve` ends where it cannot serve."""
    done = subprocess.run(
        [sys.executable, "-m", "flowlang", "serve", "--port", "0", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert "loading" not in done.stdout, "it listened"
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@contextmanager
def running(
    folder: Path,
    *arguments: str,
    trust: ssl.SSLContext | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A Python program that serves."""
    errors = folder / f"stderr-{time.monotonic_ns()}"
    server = Server(list(arguments), errors, trust, environment)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def check_errors(server: Server) -> None:
    """Only the operator that fails on purpose may have left a traceback."""
    assert server.errors.count("Traceback") == server.errors.count("\nRuntimeError: a secret")


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something to come true. Fails after PATIENCE_S."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.01)


class Raw:
    """A bare connection, for what no client library would send."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self._reader = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self.socket.close()

    def send(self, *parts: bytes | str) -> None:
        self.socket.sendall(b"".join(p.encode() if isinstance(p, str) else p for p in parts))

    def post(self, path: str, body: bytes, *headers: str) -> None:
        """Send a whole request."""
        self.send(head(path, len(body), *headers), body)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next response: its status, headers (names in lower case) and body."""
        status = int(self._reader.readline().split()[1])
        lines = iter(lambda: self._reader.readline().strip().decode(), "")
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        return status, headers, self._reader.read(int(headers["content-length"]))

    def error(self) -> tuple[int, str]:
        """The next response, an error: its status and code."""
        status, _, body = self.answer()
        return status, json.loads(body)["error"]["code"]

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        return self._reader.read()

    def wait_closed(self) -> None:
        """Wait for the server to close the connection. Raises TimeoutError if it does not."""
        with contextlib.suppress(ConnectionResetError):
            self.rest()


def head(path: str, length: int, *headers: str) -> str:
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""])
