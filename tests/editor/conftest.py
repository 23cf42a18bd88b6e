"""The folder that programs of the editor's tests stand in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.editor.programs import write_used
from tests.standins import furnish


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that programs name, and those that they use."""
    write_used(furnish(tmp_path))
    return tmp_path
