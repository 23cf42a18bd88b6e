"""A line in the log for each request over HTTP, where that is wanted.

Layer 4. Written to the bare ASGI protocol around an application, which knows nothing of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from flowlang.diagnostics import Cancelled
from flowlang.serve.body import Message, Receive, Scope, Send

log = logging.getLogger("flowlang.access")


class AccessLog:
    """An application that also tells of each request: what was asked, its status and its time."""

    def __init__(self, application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._application = application
        log.setLevel(logging.INFO)  # asked for by name, whatever the level of the others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        start_s = time.perf_counter()
        status, request_id = Cancelled.http_status, ""  # where the client has hung up

        async def noting(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message["headers"])[b"x-request-id"].decode("ascii")
            await send(message)

        try:
            await self._application(scope, receive, noting)
        finally:
            tell(scope, status, round((time.perf_counter() - start_s) * 1e3, 3), request_id)


def tell(scope: Scope, status: int, ms: float, request_id: str) -> None:
    """One line. The path is as it was sent: nothing in it can end the line."""
    method, path = scope["method"], scope["raw_path"].decode("ascii", "backslashreplace")
    fields = {
        "method": method,
        "path": path,
        "status": status,
        "ms": ms,
        "request_id": request_id or None,
    }
    log.info("%s %s %d %.3f ms %s", method, path, status, ms, request_id or "-", extra=fields)
