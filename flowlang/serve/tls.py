"""The certificate a server shows, the key to it, and how a connection with them ends.

Layer 4. The two are read once, before anything listens; each protocol is given what it needs of
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from flowlang.diagnostics import FlowError


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate with those that vouch for it, and its private key, in PEM.

    `context` is what sockets need to speak TLS, version 1.2 or later, in its name.
    """

    chain: bytes
    key: bytes = field(repr=False)
    context: ssl.SSLContext


def read_certificate(chain: Path, key: Path) -> Certificate:
    """The certificate in two files. Raises FlowError where they are none, or do not fit."""
    chain_pem, key_pem = _read(chain, "certificate"), _read(key, "private key")
    if b"-----BEGIN CERTIFICATE-----" not in chain_pem:
        raise FlowError(f"{chain} holds no certificate in PEM")
    if b"PRIVATE KEY-----" not in key_pem:
        raise FlowError(f"{key} holds no private key in PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def password() -> str:
        # Or OpenSSL would ask for it on the terminal, where nobody may be.
        raise FlowError(f"{key} is encrypted: `openssl pkey -in {key}` writes it in plain")

    try:
        context.load_cert_chain(chain, key, password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise FlowError(f"{key} is not the key of the certificate in {chain}") from None
        reason = (error.reason or "not readable").lower().replace("_", " ")
        raise FlowError(f"{chain} and {key} cannot be used for TLS: {reason}") from None
    return Certificate(chain_pem, key_pem, context)


def expect_no_goodbye(transport: asyncio.BaseTransport) -> None:
    """Have a connection that is being closed not wait for its client.

    TLS ends with a goodbye from both, and a client that is idle does not look for ours. So its own
    is taken as said; what is still to be sent to it is sent all the same.
    """
    connected = transport.get_extra_info("socket")
    with (
        contextlib.suppress(OSError),
        socket.socket(fileno=os.dup(connected.fileno())) as ours,
    ):
        ours.shutdown(socket.SHUT_RD)


def _read(path: Path, called: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FlowError(f"cannot read the {called} {path}: {error.strerror}") from None
