"""Secrets in files that nobody but their owner can read.

Layer 3. Knows nothing of what the secrets are for.
"""

from __future__ import annotations

import os
from pathlib import Path

from flowlang.diagnostics import FlowError

MAX_BYTES = 4096


def read_secret(path: Path, called: str) -> bytes:
    """The start of a file that only its owner, who is the user, can read. Raises FlowError."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid():
                raise FlowError(
                    f"the {called} {path} belongs to user {status.st_uid}, "
                    f"flowlang runs as user {os.geteuid()}: give it a file of its own"
                )
            if status.st_mode & 0o077:
                raise FlowError(
                    f"the {called} {path} has mode {status.st_mode & 0o777:04o}, so others can "
                    f"use it: chmod 600 {path}"
                )
            return file.read(MAX_BYTES)
    except OSError as error:
        raise FlowError(f"cannot read the {called} {path}: {error.strerror}") from error
