"""docs/serving.md: its session runs, and its table has every option."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest

from flowlang.cli import main
from tests.serve.server import ROOT, Server, serving, write
from tests.test_readme import assert_printed, steps

PAGE = ROOT / "docs/serving.md"
PORTS = {"8000": "", "8001": "--grpc-port", "8002": "--metrics-port"}


def sessions() -> list[str]:
    return re.findall(r"^```console\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(command: str, folder: Path, closing: ExitStack) -> tuple[Server, str]:
    """A server as a command starts it, on free ports, and what it printed with the known ones."""
    words = shlex.split(command)[2:]
    files = {name: str(folder / name) for name in ("my.flow", "server.crt", "server.key", "token")}
    words = ["0" if word in PORTS else files.get(word, word) for word in words]
    server = closing.enter_context(serving(folder, *words))
    printed = f"loading, on {', '.join(server.urls)}\n{server.line('serving ')}"
    return server, at_known_ports(printed, server)


def found_ports(server: Server) -> dict[str, str]:
    """The ports of the page, and those that the server has."""
    grpc, metrics, http = (re.findall(r":(\d+)", url)[0] for url in server.urls)
    return {"8001": grpc, "8002": metrics, "8000": http}


def at_known_ports(text: str, server: Server) -> str:
    for known, found in found_ports(server).items():
        text = text.replace(f":{found}", f":{known}")
    return text


@pytest.mark.skipif(
    shutil.which("curl") is None or shutil.which("openssl") is None, reason="needs curl and openssl"
)
def test_the_session_prints_what_it_shows(tmp_path: Path, closing: ExitStack) -> None:
    """Each command prints what stands below it, with a server as the page starts it."""
    write(tmp_path / "my.flow", "pass\n")
    write(tmp_path / ".curlrc", "silent\n")
    (session,) = sessions()
    server: Server | None = None
    for command, expected in steps(session):
        if command.startswith("flowlang serve"):
            server, printed = start(command, tmp_path, closing)
        else:
            for known, found in found_ports(server).items() if server else ():
                command = command.replace(f":{known}", f":{found}")
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env={"PATH": "/usr/bin:/bin", "CURL_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        assert_printed(printed, expected, command)
    assert server is not None


def test_the_table_has_every_option() -> None:
    """The options of `serve` are those of the table; an address and a port have their defaults."""
    assert isinstance(main, click.Group)
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \|", PAGE.read_text("utf-8"), re.M))
    options = {
        option.opts[0]: option
        for option in main.commands["serve"].params
        if isinstance(option, click.Option)
    }
    assert set(rows) == set(options)
    for name in ("--host", "--port"):
        assert rows[name] == str(options[name].default)
