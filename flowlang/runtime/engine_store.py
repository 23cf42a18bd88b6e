"""Built engines kept on disk under what they were built from: an EngineKey to engine bytes.

Layer 3. Knows nothing of TensorRT: an engine is opaque bytes. A file is trusted only when every
byte of it is what was written and its header says exactly what is asked for; otherwise the
engine is built again and the reason logged.

A file, numbers big-endian: magic 8 | format 2 | header length 4 | SHA-256 of these and the
header 32 | header, JSON | payload. The payload is the engine, with its SHA-256 in the header, or
the engine sealed with the header as associated data.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from flowlang.diagnostics import EngineError, InternalError
from flowlang.runtime import seal

log = logging.getLogger("flowlang.engine_store")

MAGIC = b"flowengn"
FORMAT = 1
SUFFIX = ".engine"
PARTIAL = ".flowlang-partial"

_FRONT = struct.Struct(">8sHI")
_FRONT_BYTES = _FRONT.size + hashlib.sha256().digest_size
_MAX_HEADER_BYTES = 1 << 20
_NAME_BYTES = 12  # of the model's SHA-256 in a file name: enough to find a model's engines
_READABLE = 120  # a longer value is cut in a reason

Shape = tuple[int, ...]
InputProfile = tuple[str, Shape, Shape, Shape]
"""An input's name and its least, best and greatest shape, batch first."""

_DIFFERENCES = {
    "model_sha256": "built from a model with SHA-256 {}, this one has {}",
    "tensorrt": "built by TensorRT {}, this is {}",
    "gpu": "built on {}, this is {}",
    "compute_capability": "built for compute capability {}, this is {}",
    "driver_class": "built under driver {}, this is {}",
    "precision": "built in {}, asked for {}",
    "profile": "built for the shapes {}, asked for {}",
    "normalisation": "built with the normalisation {}, asked for {}",
    "options": "built with the options {}, asked for {}",
}


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that makes an engine the right one; two equal keys may share an engine.

    `model_sha256` is 64 hex digits; `normalisation` is the mean, the std and the picture's height,
    width and channels, or None when it is not part of the engine; `driver_class` names the drivers
    an engine may be shared between.
    """

    model_sha256: str
    precision: str
    profile: tuple[InputProfile, ...]
    normalisation: tuple[tuple[float, ...], ...] | None
    options: tuple[tuple[str, str], ...]
    tensorrt: str
    gpu: str
    compute_capability: str
    driver_class: str

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.model_sha256):
            raise InternalError(f"not a SHA-256 in hex: {self.model_sha256!r}")

    @property
    def canonical(self) -> str:
        """The key as JSON, the same text for the same meaning."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"profile": sorted(self.profile), "options": sorted(self.options)}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the key, in hex."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, or None and a sentence saying why there is none."""

    engine: bytes | None
    reason: str = ""


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where engines are kept unless told otherwise: the user's cache directory."""
    cache = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the XDG specification has relative paths ignored
        home = environ.get("HOME", "")
        if not os.path.isabs(home):
            raise EngineError(
                "no place to keep engines: neither XDG_CACHE_HOME nor HOME is set; "
                "name a directory for them"
            )
        cache = os.path.join(home, ".cache")
    return Path(cache, "flowlang", "engines")


class EngineStore:
    """A directory of engines. With a key, all of them are sealed and a plain one is refused."""

    def __init__(self, directory: Path, key: seal.Key | None = None) -> None:
        if key is not None:
            seal.check_installed()  # now, rather than after minutes of building
        self.directory = directory
        self._key = key

    @property
    def suffix(self) -> str:
        """How this store's files end."""
        return SUFFIX if self._key is None else SUFFIX + seal.SUFFIX

    def path(self, key: EngineKey) -> Path:
        """Where the engine for this key is, or would be."""
        return self.directory / (self._stem(key) + self.suffix)

    def load(self, key: EngineKey) -> Loaded:
        """The stored engine for a key."""
        path = self.path(key)
        if not os.path.exists(path):
            return Loaded(None, self._nearest(key))
        return self.load_file(path, key)

    def load_file(self, path: Path, key: EngineKey) -> Loaded:
        """The engine in a file, if it is whole, readable with this store's key, and for `key`."""
        try:
            with path.open("rb") as file:
                return Loaded(self._read(file, key))
        except EngineError as error:
            return Loaded(None, str(error))
        except OSError as error:
            return Loaded(None, f"cannot be read: {error.strerror}")

    def build(self, key: EngineKey, builder: Callable[[], bytes]) -> bytes:
        """The stored engine, or else what `builder` returns, stored.

        Of several processes (and threads) asking at once, one builds and the others wait for it.
        An engine that cannot be stored is returned all the same, with a warning in the log.
        """
        found = self.load(key)
        if found.engine is not None:
            return found.engine
        with _locked(self.directory / (self._stem(key) + ".lock")):
            found = self.load(key)
            if found.engine is not None:
                return found.engine
            path = self.path(key)
            level = logging.WARNING if os.path.exists(path) else logging.INFO
            log.log(level, "building %s: %s", path, found.reason)
            engine = builder()
            if not engine:
                raise EngineError("the builder returned no engine")
            try:
                self._write(path, key, engine)
            except OSError as error:
                log.warning(
                    "the engine was built but not stored, so the next start builds it again: "
                    "%s: %s", path, error.strerror or error,
                )  # fmt: skip
            return engine

    def check_place(self) -> None:
        """Raise EngineError where no engine can be kept: before it is built, rather than after."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial, file = _open_partial(self.directory)
            with file:
                partial.unlink()
        except OSError as error:
            raise EngineError(
                f"no engine can be kept in {self.directory}: {error.strerror or error}"
            ) from error

    def place(self, key: EngineKey, path: Path, engine: bytes | None = None) -> None:
        """Write an engine (by default the stored one) to a chosen path, for `load_file`.

        Raises EngineError if there is none, if it cannot be written, or if the name would say
        the wrong thing about whether it is sealed.
        """
        if (self._key is not None) != path.name.endswith(seal.SUFFIX):
            asks = "a sealed engine ends in" if self._key else "without a key an engine ends in"
            raise EngineError(f"cannot write {path}: {asks} {self.suffix}")
        if engine is None:
            found = self.load(key)
            if found.engine is None:
                raise EngineError(f"no engine to write to {path}: {found.reason}")
            engine = found.engine
        try:
            self._write(path, key, engine)
        except OSError as error:
            raise EngineError(f"cannot write {path}: {error.strerror or error}") from error

    def _stem(self, key: EngineKey) -> str:
        return f"{key.model_sha256[:_NAME_BYTES]}-{key.digest}"

    def _nearest(self, key: EngineKey) -> str:
        """Why there is no file for a key: never built, or built for something else."""
        reasons = []
        for path in self.directory.glob(f"{key.model_sha256[:_NAME_BYTES]}-*{self.suffix}"):
            with suppress(OSError, EngineError), path.open("rb") as file:
                if different := _differences(_read_header(file), key):
                    reasons.append((len(different), "; ".join(different)))
        if not reasons:
            return "not built yet"
        return f"not built yet; the nearest was {min(reasons)[1]}"

    def _write(self, path: Path, key: EngineKey, engine: bytes) -> None:
        is_sealed = self._key is not None
        header = _Header(
            key=json.loads(key.canonical),
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            sealed=is_sealed,
            payload_bytes=seal.sealed_length(len(engine)) if is_sealed else len(engine),
            # Tags authenticate a sealed payload; the sum of a secret engine is nobody's business.
            payload_sha256=None if is_sealed else hashlib.sha256(engine).hexdigest(),
        )
        write_whole(path, self._pieces(header.packed(), engine))

    def _pieces(self, header: bytes, engine: bytes) -> Iterator[bytes]:
        front = _FRONT.pack(MAGIC, FORMAT, len(header))
        yield front + hashlib.sha256(front + header).digest() + header
        if self._key is None:
            yield engine
        else:
            yield from seal.seal_chunks(engine, self._key, header=header)

    def _read(self, file: BinaryIO, key: EngineKey) -> bytes:
        header = _read_header(file)
        if different := _differences(header, key):
            raise EngineError("; ".join(different))
        if header.sealed and self._key is None:
            raise EngineError("sealed, and no key is given")
        if not header.sealed and self._key is not None:
            raise EngineError("not sealed, and a key is given: only sealed engines are used")
        size, expected = _size(file), file.tell() + header.payload_bytes
        if size != expected:
            raise EngineError(seal.wrong_size(size, expected))
        if self._key is not None:
            return seal.open_sealed(file, self._key, header=header.packed())
        engine = file.read(header.payload_bytes)
        if hashlib.sha256(engine).hexdigest() != header.payload_sha256:
            raise EngineError("damaged: the engine's SHA-256 is not the one in its header")
        return engine


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says of its payload, in clear."""

    key: dict[str, object]
    built: str
    sealed: bool
    payload_bytes: int
    payload_sha256: str | None

    def packed(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False).encode()


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _read_header(file: BinaryIO) -> _Header:
    """The header of an engine file; leaves the file at its payload. Raises EngineError."""
    front = file.read(_FRONT_BYTES)
    if not MAGIC.startswith(front[: len(MAGIC)]):
        raise EngineError("not an engine file of flowlang")
    if len(front) < _FRONT_BYTES:
        raise EngineError(f"cut: {len(front):,} bytes, shorter than any engine file")
    _, version, length = _FRONT.unpack_from(front)
    if version != FORMAT:
        raise EngineError(f"written in format {version}, this flowlang reads format {FORMAT}")
    if length > _MAX_HEADER_BYTES:
        raise EngineError("damaged: the header is not what was written")
    text = file.read(length)
    if len(text) < length:
        raise EngineError(f"cut: {_size(file):,} bytes, shorter than its own header")
    if hashlib.sha256(front[: _FRONT.size] + text).digest() != front[_FRONT.size :]:
        raise EngineError("damaged: the header is not what was written")
    try:
        header = _Header(**json.loads(text))
        if _is_well_formed(header) and header.packed() == text:
            return header
    except (TypeError, ValueError, RecursionError):
        pass
    raise EngineError("the header is not one that flowlang writes")


def _is_well_formed(header: _Header) -> bool:
    """Whether a header from a file, whose JSON could hold anything, has the types it declares."""
    return (
        isinstance(header.key, dict)
        and isinstance(header.sealed, bool)
        and isinstance(header.payload_bytes, int)
        and header.payload_bytes > 0
    )


def _differences(header: _Header, key: EngineKey) -> list[str]:
    """One sentence for each respect in which a file is not what is asked for."""
    asked = json.loads(key.canonical)
    if header.key == asked:
        return []
    sentences = [
        sentence.format(_shown(header.key.get(name)), _shown(asked[name]))
        for name, sentence in _DIFFERENCES.items()
        if header.key.get(name) != asked[name]
    ]
    return sentences or ["built by a flowlang that distinguished more"]


def _shown(value: object) -> str:
    """A value out of a file, safe to print on a line of a log."""
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= _READABLE else text[:_READABLE] + "..."


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes and threads, as far as the file system has locks.

    The kernel gives the lock of a process that dies to the next; the lock file stays, since
    removing it would let two in at once.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(_unlock, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process to build this engine: %s", path)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("no lock, other processes may build the same engine: %s", error)
        yield


def _unlock(lock: int) -> None:
    # Closing alone would not do: a process forked meanwhile holds the same lock.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def write_whole(path: Path, pieces: Iterable[bytes], *, mode: int | None = None) -> None:
    """Write a file so that it has all its pieces or does not exist, even after a power failure.

    An existing file is replaced at once. `mode` is who may do what with it, where that is not left
    to the user's umask. Raises OSError.
    """
    _clear_partial(path.parent)
    partial, file = _open_partial(path.parent)
    try:
        with file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the file is there; some file systems cannot sync a directory
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open_partial(directory: Path) -> tuple[Path, BinaryIO]:
    """A new file to write to, locked for as long as it is open."""
    while True:
        partial = directory / f".{secrets.token_hex(8)}{PARTIAL}"
        file = partial.open("xb")
        with suppress(OSError):  # no locks here: then nobody clears either
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return partial, file
        file.close()  # cleared by another process before it was locked


def _clear_partial(directory: Path) -> None:
    """Remove what writers left that died: files of theirs that nobody has locked."""
    for partial in directory.glob(f".*{PARTIAL}"):
        with suppress(OSError), partial.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
