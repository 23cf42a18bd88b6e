"""A line in the log for each request, where that is wanted, whatever protocol it came by.

Layer 4. For HTTP written to the bare ASGI protocol around an application, which knows nothing of
it; flowlang.serve.grpc and flowlang.serve.thrift tell of theirs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

from flowlang.diagnostics import Cancelled
from flowlang.serve.body import Message, Receive, Scope, Send
from flowlang.serve.log import on_one_line

# In a scope:
REFUSED = "flowlang.refused"  # the status answered by the protocol to what it is of
REQUEST_ID = "flowlang.request_id"  # the request's id, where its answer brings no other
MAX_PATH = 1000  # characters: what a client asks for may be as long as it likes

log = logging.getLogger("flowlang.access")
log.setLevel(logging.INFO)  # asked for by name, whatever the level of the others


class AccessLog:
    """An application that also tells of each request: what was asked, its status and its time."""

    def __init__(self, application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        start_s = time.perf_counter()
        status, request_id = 0, ""

        async def noting(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message["headers"])[b"x-request-id"].decode("ascii")
            await send(message)

        try:
            await self._application(scope, receive, noting)
        finally:
            path = scope["raw_path"].decode("latin-1")
            # Without an answer from here, the client has hung up, or has sent what is no body.
            status = status or scope.get(REFUSED, Cancelled.http_status)
            request_id = request_id or scope[REQUEST_ID].decode("ascii")
            tell(scope["method"], path, status, start_s, request_id)


def tell(
    method: str, path: str, status: int | None, start_s: float, request_id: str, name: str = ""
) -> None:
    """One line of a request that is over. What is not known of it is empty.

    `status` is a number of its protocol, None where nothing was answered; as text it is told by its
    `name`, where it has one.
    """
    ms = round((time.perf_counter() - start_s) * 1e3, 3)
    path = on_one_line(path[:MAX_PATH])
    fields = {
        "method": method,
        "path": path or None,
        "status": status,
        "ms": ms,
        "request_id": request_id or None,
    }
    shown = name or (status if status is not None else "-")
    words = (method, path or "-", shown, ms, request_id or "-")
    log.info("%s %s %s %.3f ms %s", *words, extra=fields)
