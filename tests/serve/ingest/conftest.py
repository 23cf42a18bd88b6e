"""Flows that a server with `--ingest` has, and such a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.ingesting import ingesting, write_ingested
from tests.serve.server import Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `light.flow` and `holding.flow`."""
    return write_ingested(tmp_path_factory.mktemp("flows"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server that the tests leave whole, if not with the same processes."""
    with ingesting(folder, file="holding.flow") as server:
        yield server
