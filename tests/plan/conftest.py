"""The folder that programs of the tests stand in, with the files they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.standins import furnish


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("app"))


@pytest.fixture
def folder(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It is the working directory too: programs and messages name its files as they are."""
    monkeypatch.chdir(furnished)
    return furnished
