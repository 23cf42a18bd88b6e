"""What a server is to be, as its processes are told.

Layer 4.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from flowlang.serve.inference import Inference
    from flowlang.serve.tls import Certificate
    from flowlang.serve.token import Token
    from flowlang.serve.trace import Tracer


class Face(Protocol):
    """Another protocol beside HTTP, at a port of its own: flowlang.serve.grpc, .thrift."""

    scheme: str

    async def start(self) -> int:
        """Begin to listen. Returns the port. Raises FlowError where it cannot be had."""

    async def stop(self, grace_s: float) -> bool:
        """Answer what is inside, then stop. Returns whether that was done in time."""


# What makes a face, of what it answers with and of what the server is to be.
MakeFace: TypeAlias = "Callable[[Inference, Setup], Face]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a server is to be: the arguments of `serve`, for whichever of its processes.

    `port` is the one told for HTTP; who listens to it is another matter, and faces have their own.
    """

    host: str
    port: int
    grace_s: float
    drain_delay_s: float = 0.0
    max_body_bytes: int
    faces: Sequence[MakeFace] = ()
    certificate: Certificate | None = None
    token: Token | None = None
    metrics_listener: socket.socket | None = None
    on_listen: Callable[[str], None] | None = None
    on_ready: Callable[[str], None] | None = None
    tracer: Tracer | None = None
    tells_requests: bool = False
