"""The token that a server asks its clients for (RFC 6750), and where it comes from.

Layer 4. Knows nothing of protocols, but that a token comes as they all bring it: `Bearer TOKEN`.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flowlang.diagnostics import FlowError
from flowlang.runtime.secret import read_secret
from flowlang.serve.answer import Refusal

VARIABLE = "FLOWLANG_TOKEN"
_SECRET = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # what an Authorization header can bring
_HOW_TO_MAKE = "make one with `openssl rand -base64 32`"


@dataclass(frozen=True, slots=True)
class Token:
    """What a client must know to be let in."""

    secret: bytes = field(repr=False)

    def check(self, authorization: bytes | None) -> None:
        """Raises Refusal unless an Authorization header brings the token."""
        scheme, _, given = (authorization or b"").partition(b" ")
        # The time this takes does not tell how much of a guess was right.
        is_right = hmac.compare_digest(given.strip(b" "), self.secret)
        if not is_right or scheme.lower() != b"bearer":
            message = "this server asks for a token: send the header `Authorization: Bearer TOKEN`"
            if authorization is not None:
                message = "the header Authorization does not bring this server's token"
            challenge = (b"www-authenticate", b"Bearer")
            raise Refusal("unauthorized", 401, message, headers=(challenge,))


def read_token(file: Path | None, environ: Mapping[str, str] = os.environ) -> Token | None:
    """The token in a file, else in FLOWLANG_TOKEN, else None. Raises FlowError; never repeats it.

    The first line counts. The file must belong to the user and be closed to everybody else.
    """
    if file is not None:
        return _token(read_secret(file, "token file"), f"the token file {file}")
    if VARIABLE in environ:
        return _token(environ[VARIABLE].encode("utf-8", "surrogateescape"), VARIABLE)
    return None


def _token(text: bytes, origin: str) -> Token:
    secret = text.partition(b"\n")[0].strip()
    if not secret:  # it was meant to be there: serving everybody would be the wrong answer
        raise FlowError(f"there is no token in {origin}: {_HOW_TO_MAKE}")
    if not _SECRET.fullmatch(secret):
        raise FlowError(
            f"the token in {origin} has characters other than letters, digits and -._~+/, "
            f"which no header can bring: {_HOW_TO_MAKE}"
        )
    return Token(secret)
