"""Flows of every kind, a server of them all, Triton's client of it, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.http as triton

from tests.serve.browser import Browser, opened
from tests.serve.faces import write_types
from tests.serve.server import KINDS, Server, check_errors, serving, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `all.flow` and `types.flow`."""
    folder = tmp_path_factory.mktemp("flows")
    write_types(folder)
    return folder


@pytest.fixture
def echo(folder: Path) -> Path:
    """A file with one flow, which answers what it is sent."""
    return write(folder / "echo.flow", "pass\n")


@pytest.fixture(scope="module", params=KINDS)
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of every flow, shared by the tests that leave it as it was."""
    files = (str(folder / "all.flow"), str(folder / "types.flow"))
    with serving(folder, *request.param, *files) as server:
        yield server.wait_ready()
        check_errors(server)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    """Triton's client, as it comes."""
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of a file."""
    yield from opened(tmp_path_factory.mktemp("chromium"))
