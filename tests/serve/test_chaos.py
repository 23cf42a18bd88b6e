"""Everything at once: a storm of clients while processes die, and ten thousand that say nothing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.serve.chaos import storm
from tests.serve.chaos_clients import BAD, GOOD
from tests.serve.server import KINDS, serving, write

SEED = 20  # `make chaos` takes another each time
IDLE = 10_000


def test_a_storm_leaves_a_server_whole(tmp_path: Path) -> None:
    """Good requests are answered right, once, or it is told why not; nothing grows or stays."""
    found = storm(tmp_path, 1_500, SEED)
    assert {asked.kind for asked in found.told} == {*GOOD, *BAD}
    assert {role for role, _, _ in found.kills} == {"engine", "front"}


@pytest.fixture
def many_files() -> Iterator[None]:
    """Leave to open as many files as there will be connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 1_000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files here, and this needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("kind", KINDS)
def test_idle_connections_keep_nobody_from_being_answered(
    tmp_path: Path, kind: tuple[str, ...]
) -> None:
    """Ten thousand that say nothing, or nothing more, and others are served as if alone."""
    flow = write(tmp_path / "echo.flow", "pass\n")
    with serving(tmp_path, *kind, "--device", "cpu", str(flow)) as server, ExitStack() as stack:
        server.wait_ready()
        idle = [stack.enter_context(server.connect()) for _ in range(IDLE)]
        for connection in idle[:100]:
            connection.post("/", b"before")
        assert all(connection.answer()[2] == b"before" for connection in idle[:100])

        def ask(number: int) -> bool:
            body = b"%d" % number
            with server.connect() as connection:
                connection.post("/", body)
                return connection.answer()[2] == body

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(500)))
        for connection in idle[-100:]:  # they were only waiting
            connection.post("/", b"after")
        assert all(connection.answer()[2] == b"after" for connection in idle[-100:])
        server.signal()
        assert server.wait() == 0
