"""Plain bytes to sealed bytes and back, and where the key for it comes from.

Layer 3; the only file importing cryptography, and only when something is sealed or opened.
AES-256-GCM protects a file at rest (a disk, a backup, a bucket), not the memory of a running
program. Nothing here touches the disk but to read key files and sealed models.

A sealed file, numbers big-endian::

    magic 8 | format 1 | key kind 1 | chunk bytes 4 | plain bytes 8 | salt 32 | nonce prefix 8
    | key check 16 | first 8 bytes of the SHA-256 of all before | chunks, each with its 16-byte tag

Salt and key give, by HKDF, a key for this file alone and the key check. A chunk's nonce is the
prefix and its number; its associated data is everything above, the caller's header, and a byte
that is 1 for the last chunk. So chunks cannot be cut, added, reordered or moved between files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import io
import os
import secrets
import struct
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flowlang.diagnostics import EngineError, FlowError
from flowlang.runtime.secret import read_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SUFFIX = ".encrypted"
"""Ends the name of every sealed file: `resnet50.onnx.encrypted`."""

MODEL_HEADER = b"flowlang model"
"""The header of a sealed model file, so that a sealed engine never opens as a model."""

CHUNK_BYTES = 64 << 20
KEY_BYTES = 32
MAGIC = b"flowseal"
FORMAT = 1

_FIELDS = struct.Struct(">8sBBIQ32s8s16s")
_SUM_BYTES = 8
_HEAD_BYTES = _FIELDS.size + _SUM_BYTES
_TAG_BYTES = 16
_MAX_CHUNK_BYTES = 2**31 - 1 - _TAG_BYTES  # the most that one AES-GCM call takes
_RAW, _PASSPHRASE = 0, 1
_KINDS = {_RAW: "a 32-byte key", _PASSPHRASE: "a passphrase"}
_HOW_TO_MAKE = "make one with `openssl rand -base64 32`"


@dataclass(frozen=True, slots=True)
class Key:
    """What seals: 32 bytes, or a passphrase in UTF-8. `origin` says where it was found."""

    secret: bytes = field(repr=False)
    origin: str = "the caller"
    is_passphrase: bool = False

    def __post_init__(self) -> None:
        if not self.is_passphrase and len(self.secret) != KEY_BYTES:
            raise EngineError(
                f"the key from {self.origin} has {len(self.secret)} bytes, "
                f"it must have {KEY_BYTES}: {_HOW_TO_MAKE}"
            )
        if not self.secret:
            raise EngineError(f"the passphrase from {self.origin} is empty")


KeySource = bytes | str | Callable[[], bytes | str]


def read_key(
    argument: KeySource | None = None,
    environment_variable: str | None = "FLOWLANG_KEY",
    file: str | Path | None = None,
    passphrase: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Key:
    """The first key given, in this order; there is never a built-in one.

    `argument` is 32 bytes, their base64 text, or a callable returning either (for a key service);
    the environment variable and the file hold base64 text; an empty variable counts as unset.
    The file must belong to the user and be closed to everybody else. Raises EngineError.
    """
    if callable(argument):
        return _asked(argument)
    if argument is not None:
        return _key(argument, "the caller")
    if environment_variable and environ.get(environment_variable):
        return _key(environ[environment_variable], environment_variable)
    if file is not None:
        return _from_file(Path(file))
    if passphrase is not None:
        # A typed accent has two spellings in Unicode, depending on the keyboard.
        secret = unicodedata.normalize("NFC", passphrase).encode()
        return Key(secret, "the passphrase", is_passphrase=True)
    variable = f"set {environment_variable}, " if environment_variable else ""
    raise EngineError(
        f"no key to seal or open with: {variable}give a key file or a key ({_HOW_TO_MAKE})"
    )


def model_opener(argument: KeySource | None = None) -> Callable[[Path], bytes]:
    """What opens encrypted models, with the key `read_key` finds once it is needed."""

    def open_model(path: Path) -> bytes:
        key = read_key(argument)
        with open(path, "rb") as sealed:
            return open_sealed(sealed, key, header=MODEL_HEADER)

    return open_model


def _asked(source: Callable[[], bytes | str]) -> Key:
    """The key a callable answers with."""
    try:
        answer = source()
    except Exception as error:
        raise EngineError(f"the key callable failed: {type(error).__name__}: {error}") from error
    return _key(answer, "the key callable")


def _key(value: object, origin: str) -> Key:
    """A key out of 32 bytes or base64 text; messages never repeat the value."""
    if isinstance(value, str):
        try:
            value = base64.b64decode(value.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise EngineError(f"the key from {origin} is not base64: {_HOW_TO_MAKE}") from None
    if not isinstance(value, bytes):
        raise EngineError(f"the key from {origin} is {type(value).__name__}, not bytes or text")
    return Key(value, origin)


def _from_file(path: Path) -> Key:
    """The key in a file that only its owner, who is the user, can read."""
    try:
        content = read_secret(path, "key file")
    except FlowError as error:
        raise EngineError(str(error)) from error
    return _key(content.decode("ascii", errors="replace"), f"the key file {path}")


def check_installed() -> None:
    """Raise EngineError unless the cryptography package is there: before long work, not after."""
    try:
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401  (only whether it imports)
    except ImportError as error:
        raise EngineError(
            "sealed files need the cryptography package: pip install 'flowlang[encrypt]'"
        ) from error


@dataclass(frozen=True, slots=True)
class _Head:
    """The first bytes of a sealed file, in their order there."""

    kind: int
    chunk_bytes: int
    plain_bytes: int
    salt: bytes
    prefix: bytes
    check: bytes

    @property
    def chunks(self) -> int:
        return max(1, -(-self.plain_bytes // self.chunk_bytes))

    @property
    def sealed_bytes(self) -> int:
        return _HEAD_BYTES + self.plain_bytes + self.chunks * _TAG_BYTES

    def packed(self) -> bytes:
        fields = _FIELDS.pack(
            MAGIC, FORMAT, self.kind, self.chunk_bytes, self.plain_bytes,
            self.salt, self.prefix, self.check,
        )  # fmt: skip
        return fields + hashlib.sha256(fields).digest()[:_SUM_BYTES]

    def nonce(self, number: int) -> bytes:
        return self.prefix + number.to_bytes(4, "big")

    def associated(self, header: bytes, number: int) -> bytes:
        is_last = number == self.chunks - 1
        return self.packed() + header + bytes([is_last])


def sealed_length(plain_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many bytes a plain length takes when sealed."""
    return _Head(_RAW, chunk_bytes, plain_bytes, b"", b"", b"").sealed_bytes


def seal_chunks(
    plain: bytes | memoryview, key: Key, *, header: bytes, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """The sealed file piece by piece, never holding more than one chunk of it.

    `header` is not stored: it is clear text the caller keeps and must give again to open.
    """
    check_installed()
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    view = memoryview(plain).cast("B")
    salt = secrets.token_bytes(32)
    secret, check = _derive(key, salt)
    kind = _PASSPHRASE if key.is_passphrase else _RAW
    head = _Head(kind, chunk_bytes, len(view), salt, secrets.token_bytes(8), check)
    cipher = AESGCM(secret)
    yield head.packed()
    for number in range(head.chunks):
        chunk = view[number * chunk_bytes : (number + 1) * chunk_bytes]
        yield cipher.encrypt(head.nonce(number), chunk, head.associated(header, number))


def seal(
    plain: bytes | memoryview, key: Key, *, header: bytes, chunk_bytes: int = CHUNK_BYTES
) -> bytes:
    """The sealed file in one piece; see `seal_chunks`."""
    return b"".join(seal_chunks(plain, key, header=header, chunk_bytes=chunk_bytes))


def open_sealed(file: BinaryIO, key: Key, *, header: bytes) -> bytes:
    """What is sealed from a file's position to its end, in plain, all of it authentic.

    Holds one sealed chunk at a time. Raises EngineError: another key, another header, or anything
    changed, cut or added.
    """
    check_installed()
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    head = _unpack(file.read(_HEAD_BYTES))
    if size != head.sealed_bytes:
        raise EngineError(wrong_size(size, head.sealed_bytes))
    cipher = AESGCM(_secret_for(head, key))

    most = min(head.chunk_bytes, head.plain_bytes) + _TAG_BYTES

    def chunk(number: int) -> bytes:
        return _open_chunk(cipher, head, header, number, file.read(most))

    if head.chunks == 1:
        return chunk(0)
    # BytesIO grows in place and gives its buffer away uncopied; joined chunks would be held twice.
    plain = io.BytesIO()
    for number in range(head.chunks):
        plain.write(chunk(number))
    return plain.getvalue()


def _open_chunk(cipher: AESGCM, head: _Head, header: bytes, number: int, sealed: bytes) -> bytes:
    """One chunk in plain, once it has been found to be the one that belongs there."""
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(head.nonce(number), sealed, head.associated(header, number))
    except InvalidTag:
        raise EngineError(
            f"damaged or altered: part {number + 1} of {head.chunks} of the sealed bytes, "
            "or the header they were sealed with, is not what was written"
        ) from None


def wrong_size(size: int, expected: int) -> str:
    """The sentence for a file that is not as long as its first bytes say."""
    if size < expected:
        return f"cut: {size:,} of {expected:,} bytes"
    return f"altered: {size - expected:,} bytes were added to its {expected:,}"


def _unpack(packed: bytes) -> _Head:
    """The head of a sealed file, checked as far as that is possible without the key."""
    if not packed.startswith(MAGIC):
        raise EngineError("not a sealed file")
    if len(packed) < _HEAD_BYTES:
        raise EngineError(f"cut: {len(packed):,} bytes, shorter than the head of a sealed file")
    _, version, kind, chunk_bytes, plain_bytes, salt, prefix, check = _FIELDS.unpack_from(packed)
    if version != FORMAT:
        raise EngineError(f"sealed in format {version}, this flowlang reads format {FORMAT}")
    head = _Head(kind, chunk_bytes, plain_bytes, salt, prefix, check)
    is_possible = kind in _KINDS and 0 < chunk_bytes <= _MAX_CHUNK_BYTES
    if not is_possible or head.packed() != packed:
        raise EngineError("damaged: the head of the sealed file is not what was written")
    return head


def _secret_for(head: _Head, key: Key) -> bytes:
    """The file's own key, or an EngineError that says the key given is another one."""
    if key.is_passphrase != (head.kind == _PASSPHRASE):
        given = _KINDS[_PASSPHRASE if key.is_passphrase else _RAW]
        raise EngineError(f"wrong key: sealed with {_KINDS[head.kind]}, given {given}")
    secret, check = _derive(key, head.salt)
    if not hmac.compare_digest(check, head.check):
        raise EngineError(f"wrong key: not sealed with the key from {key.origin}")
    return secret


def _derive(key: Key, salt: bytes) -> tuple[bytes, bytes]:
    """The key of one file (32 bytes), and 16 bytes that recognise it and tell nothing of it."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    secret = key.secret
    if key.is_passphrase:
        secret = Scrypt(salt=salt, length=KEY_BYTES, n=2**15, r=8, p=1).derive(secret)
    derived = HKDF(SHA256(), KEY_BYTES + 16, salt=salt, info=b"flowlang seal 1").derive(secret)
    return derived[:KEY_BYTES], derived[KEY_BYTES:]
