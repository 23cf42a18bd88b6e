"""Flows loaded again when a file they were made from has changed.

Layer 4. Files are looked at, not subscribed to: that works on every file system, over networks and
in containers too. A change counts once it has stood still for one look, so that half a file is not
read.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from flowlang.diagnostics import FlowError

if TYPE_CHECKING:
    from flowlang.app import App

LOOK_S = 0.5

log = logging.getLogger("flowlang.serve")

Seen: TypeAlias = "dict[str, tuple[str, int, int] | None]"


def look(files: Iterable[str]) -> Seen:
    """Where each file lies, when it was changed last, how long it is; None where it is not there.

    A link may lead to another release, all of whose files have the same time as those before.
    """
    found: Seen = {}
    for file in files:
        try:
            status = os.stat(file)
            found[file] = (os.path.realpath(file), status.st_mtime_ns, status.st_size)
        except OSError:
            found[file] = None
    return found


def _has_stood(file: str, since_ns: int) -> bool:
    """Whether a file, and a link that is one, is what it was then.

    What is moved to a place was changed long before, but for its status.
    """
    try:
        status = os.stat(file)
        changes_ns = (status.st_mtime_ns, status.st_ctime_ns, os.lstat(file).st_ctime_ns)
    except OSError:
        return False
    return max(changes_ns) < since_ns


async def reload_on_change(
    files: Callable[[], Iterable[str]],
    load: Callable[[], Awaitable[App]],
    change: Callable[[App], None],
    since_ns: int,
) -> None:
    """Load flows anew whenever `files` have changed since that time, for ever.

    The old flows go on while it loads; `change` gets what it gave. Where it fails the old flows
    stay, and the log says why. A change while it loads counts as another.
    """
    seen = {file: state for file, state in look(files()).items() if _has_stood(file, since_ns)}
    while True:
        await asyncio.sleep(LOOK_S)
        now = look(files())
        if now == seen:
            continue
        await asyncio.sleep(LOOK_S)
        if look(now) != now:
            continue  # still being written
        seen = now
        try:
            app = await load()
        except (FlowError, OSError) as error:
            told = "flowlang: kept as it was, for what has changed cannot be served:\n%s"
            log.warning(told, error)
            continue
        except Exception as error:
            log.exception("what has changed cannot be loaded")
            log.warning("flowlang: kept as it was: %s: %s", type(error).__name__, error)
            continue
        change(app)
        seen = {file: now.get(file, state) for file, state in look(files()).items()}
