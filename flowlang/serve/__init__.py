"""Flows over HTTP.

Layer 4. `serve` runs flows as a server process until it is told to stop; `asgi` makes of running
flows an ASGI application for another server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["asgi", "serve"]

if TYPE_CHECKING:
    from flowlang.serve.http import serve
    from flowlang.serve.routes import asgi


def __getattr__(name: str) -> Any:
    """The two functions, brought in when first used: the ASGI application needs no uvicorn."""
    if name == "serve":
        from flowlang.serve.http import serve

        return serve
    if name == "asgi":
        from flowlang.serve.routes import asgi

        return asgi
    raise AttributeError(f"module 'flowlang.serve' has no attribute {name!r}")
