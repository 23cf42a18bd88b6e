"""Sealing and opening, every way a sealed file can be wrong, and where keys come from."""

from __future__ import annotations

import base64
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import EngineError
from flowlang.runtime import seal
from flowlang.runtime.seal import Key, read_key

CHUNK = 16
HEAD = len(seal.seal(b"", Key(bytes(32)), header=b"")) - 16
SECRET = bytes(range(32))
KEY = Key(SECRET)
TEXT = base64.b64encode(SECRET).decode()
PLAIN = b"the engine of a secret model, in four chunks of it"
HEADER = b'{"tensorrt":"10.3.0"}'
SEALED = seal.seal(PLAIN, KEY, header=HEADER, chunk_bytes=CHUNK)
CHUNKS = [SEALED[at : at + CHUNK + 16] for at in range(HEAD, len(SEALED), CHUNK + 16)]


def opened(sealed: bytes | bytearray, key: Key, *, header: bytes) -> bytes:
    return seal.open_sealed(io.BytesIO(sealed), key, header=header)


@given(plain=st.binary(max_size=200), header=st.binary(max_size=50), chunk_bytes=st.integers(1, 70))
@settings(max_examples=100)
def test_what_is_sealed_opens_again(plain: bytes, header: bytes, chunk_bytes: int) -> None:
    """Any bytes, in chunks of any length, come back as they were and have the length foretold."""
    sealed = seal.seal(plain, KEY, header=header, chunk_bytes=chunk_bytes)
    assert opened(sealed, KEY, header=header) == plain
    assert len(sealed) == seal.sealed_length(len(plain), chunk_bytes)


def test_a_sealed_file_shows_nothing_and_is_never_the_same_twice() -> None:
    """No eight bytes of the plain text occur in the sealed one, and sealing again differs."""
    assert not any(PLAIN[at : at + 8] in SEALED for at in range(len(PLAIN) - 7))
    again = seal.seal(PLAIN, KEY, header=HEADER, chunk_bytes=CHUNK)
    assert not any(chunk in again for chunk in CHUNKS)


def test_plain_bytes_are_not_taken_for_sealed_ones() -> None:
    """An ONNX file's first bytes are not those of a sealed file, and opening one says so."""
    onnx = b"\x08\x08\x12\x07pytorch"
    with pytest.raises(EngineError, match="not a sealed file"):
        opened(onnx, KEY, header=HEADER)


def test_every_flipped_bit_is_refused() -> None:
    """A sealed file with any one bit of it changed does not open."""
    for at in range(len(SEALED) * 8):
        changed = bytearray(SEALED)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(EngineError):
            opened(changed, KEY, header=HEADER)


def test_every_cut_is_refused() -> None:
    """A sealed file cut anywhere does not open, and past its head says how much of it is there."""
    for length in range(len(SEALED)):
        expected = f"cut: {length} of {len(SEALED)} bytes" if length >= HEAD else "cut|not a sealed"
        with pytest.raises(EngineError, match=expected):
            opened(SEALED[:length], KEY, header=HEADER)


def test_chunks_only_open_in_their_place() -> None:
    """Of all rows that can be made of the chunks of a file, only the written one opens."""
    for order in itertools.product(range(len(CHUNKS)), repeat=len(CHUNKS)):
        changed = SEALED[:HEAD] + b"".join(CHUNKS[number] for number in order)
        if changed != SEALED:
            with pytest.raises(EngineError, match=r"cut|added|damaged or altered"):
                opened(changed, KEY, header=HEADER)


@given(tail=st.binary(min_size=1, max_size=100))
@settings(max_examples=50)
def test_nothing_can_be_appended(tail: bytes) -> None:
    """A sealed file with anything after its end does not open, and the error counts what is."""
    for added in (tail, CHUNKS[0], CHUNKS[-1]):
        with pytest.raises(EngineError, match=f"altered: {len(added)} bytes were added"):
            opened(SEALED + added, KEY, header=HEADER)


def test_equal_chunks_are_sealed_differently() -> None:
    """Two chunks of the same plain bytes share no stretch when sealed: no nonce is used twice."""
    sealed = seal.seal(bytes(3 * CHUNK), KEY, header=HEADER, chunk_bytes=CHUNK)
    stretches = [sealed[at : at + 8] for at in range(HEAD, len(sealed) - 7, 8)]
    assert len(set(stretches)) == len(stretches)


def _forged(sealed: bytes, **changes: int) -> bytes:
    """The sealed file with other numbers in its head, and a checksum to match."""
    return replace(seal._unpack(sealed[:HEAD]), **changes).packed() + sealed[HEAD:]  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"chunk_bytes": 0}, {"chunk_bytes": 2**31}, {"kind": 7}])
def test_a_head_with_impossible_numbers_is_refused(changes: dict[str, int]) -> None:
    """Numbers that no sealed file has are refused even with a checksum to match."""
    with pytest.raises(EngineError, match="damaged: the head"):
        opened(_forged(SEALED, **changes), KEY, header=HEADER)


def test_a_file_cut_between_chunks_with_its_length_forged_is_refused() -> None:
    """Whoever drops the last chunks and corrects the head cannot make the rest open."""
    cut = _forged(SEALED[: HEAD + 2 * (CHUNK + 16)], plain_bytes=2 * CHUNK)
    with pytest.raises(EngineError, match="damaged or altered: part 1 of 2"):
        opened(cut, KEY, header=HEADER)


def test_the_last_chunk_is_sealed_as_the_last() -> None:
    """Only the byte for being last differs between two files' equal chunks, and it counts."""
    head = seal._unpack(SEALED[:HEAD])
    is_last = [head.associated(HEADER, number)[-1] for number in range(head.chunks)]
    assert is_last == [0, 0, 0, 1]


def test_chunks_do_not_move_between_files() -> None:
    """A chunk sealed with the same key at the same place of another file does not open."""
    other = seal.seal(PLAIN, KEY, header=HEADER, chunk_bytes=CHUNK)
    mixed = SEALED[:-16] + other[-16:]
    with pytest.raises(EngineError, match="part 4 of 4"):
        opened(mixed, KEY, header=HEADER)


@given(header=st.binary(max_size=30))
@settings(max_examples=50)
def test_another_header_is_refused(header: bytes) -> None:
    """The clear header given to open must be the one given to seal."""
    if header != HEADER:
        with pytest.raises(EngineError, match=r"damaged or altered.*header"):
            opened(SEALED, KEY, header=header)


def test_a_wrong_key_is_called_a_wrong_key() -> None:
    """Another key, and a passphrase in place of a key, are told from damage and from each other."""
    with pytest.raises(EngineError, match="wrong key: not sealed with the key from FLOWLANG_KEY"):
        opened(SEALED, Key(bytes(32), "FLOWLANG_KEY"), header=HEADER)
    with pytest.raises(EngineError, match="sealed with a 32-byte key, given a passphrase"):
        opened(SEALED, Key(b"secret", is_passphrase=True), header=HEADER)
    with pytest.raises(EngineError, match="damaged: the head"):
        opened(SEALED[: HEAD - 1] + b"?" + SEALED[HEAD:], KEY, header=HEADER)


def test_a_passphrase_seals_with_a_salt_of_its_own() -> None:
    """A passphrase opens what it sealed, however its accents are typed, and no other one does."""
    environ: dict[str, str] = {}
    composed, decomposed = (
        read_key(passphrase=p, environ=environ) for p in ("caf\u00e9", "cafe\u0301")
    )
    sealed = seal.seal(PLAIN, composed, header=HEADER)
    assert opened(sealed, decomposed, header=HEADER) == PLAIN
    with pytest.raises(EngineError, match="wrong key"):
        opened(sealed, read_key(passphrase="cafe", environ=environ), header=HEADER)


def test_a_file_opens_from_where_it_stands(tmp_path: Path) -> None:
    """Sealed bytes after something else in a file open from the position they start at."""
    path = tmp_path / "after.engine.encrypted"
    path.write_bytes(b"front" + SEALED)
    with path.open("rb") as file:
        assert file.read(5) == b"front"
        assert seal.open_sealed(file, KEY, header=HEADER) == PLAIN


def test_a_newer_format_is_named() -> None:
    """A file of a format to come is refused with both format numbers."""
    with pytest.raises(EngineError, match="format 9, this flowlang reads format 1"):
        opened(SEALED[:8] + b"\x09" + SEALED[9:], KEY, header=HEADER)


def _key_file(directory: Path, content: str = TEXT + "\n", mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_text(content)
    path.chmod(mode)
    return path


def test_keys_are_looked_for_in_one_order(tmp_path: Path) -> None:
    """An argument comes before the environment, that before the file, that before a passphrase."""
    file = _key_file(tmp_path)
    in_environment = {"FLOWLANG_KEY": base64.b64encode(b"e" * 32).decode()}
    found = [
        read_key(b"a" * 32, file=file, passphrase="words", environ=in_environment),
        read_key(file=file, passphrase="words", environ=in_environment),
        read_key(file=file, passphrase="words", environ={"FLOWLANG_KEY": ""}),
        read_key(passphrase="words", environ={}),
    ]
    assert [key.secret for key in found] == [b"a" * 32, b"e" * 32, SECRET, b"words"]
    assert [key.is_passphrase for key in found] == [False, False, False, True]


@pytest.mark.parametrize("source", [SECRET, TEXT, lambda: SECRET, lambda: TEXT + "\n"])
def test_an_argument_may_be_bytes_text_or_a_callable(source: seal.KeySource) -> None:
    """The same key is read from its 32 bytes, their base64 text, or a callable giving either."""
    assert read_key(source, environ={}).secret == SECRET


def test_no_key_is_refused() -> None:
    """With no key anywhere nothing is invented: the error names every place for one."""
    with pytest.raises(EngineError, match=r"no key.*set FLOWLANG_KEY.*openssl rand -base64 32"):
        read_key(environ={})


def _fails() -> bytes:
    raise ConnectionError("key service unreachable")


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda: read_key(b"short", environ={}), "has 5 bytes, it must have 32"),
        (lambda: read_key(environ={"FLOWLANG_KEY": "!" * 44}), "FLOWLANG_KEY is not base64"),
        (lambda: read_key(environ={"FLOWLANG_KEY": TEXT[:-4]}), "FLOWLANG_KEY has 30 bytes"),
        (lambda: read_key("\N{SNOWMAN}", environ={}), "is not base64"),
        (lambda: read_key(_fails, environ={}), "ConnectionError: key service unreachable"),
        (lambda: read_key(lambda: None, environ={}), "is NoneType"),  # type: ignore[arg-type]
        (lambda: read_key(passphrase="", environ={}), "the passphrase is empty"),
        (lambda: read_key(file="/nowhere/key", environ={}), "cannot read the key file /nowhere"),
    ],
)
def test_an_unusable_key_is_refused(read: Callable[[], Key], expected: str) -> None:
    """A key too short, not base64, not there or not obtainable is refused, with its place."""
    with pytest.raises(EngineError, match=expected) as caught:
        read()
    assert TEXT[:-4] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_key_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """A key file others have any right to is refused, with the command that closes it."""
    file = _key_file(tmp_path, mode=mode)
    with pytest.raises(EngineError, match=f"mode {mode:04o}.*chmod 600 {file}"):
        read_key(file=file, environ={})


def test_a_key_file_of_another_user_is_refused(tmp_path: Path) -> None:
    """A key file owned by somebody else is refused even where it can be read."""
    if os.geteuid() == 0:
        file = _key_file(tmp_path)
        os.chown(file, 12345, -1)
    else:
        file = Path("/etc/passwd")
    with pytest.raises(EngineError, match="belongs to user"):
        read_key(file=file, environ={})


def test_a_key_file_holding_something_else_is_refused(tmp_path: Path) -> None:
    """A key file with 32 bytes that are not base64 text is refused, its content not repeated."""
    file = _key_file(tmp_path, content="correct horse battery staple")
    with pytest.raises(EngineError, match="is not base64") as caught:
        read_key(file=file, environ={})
    assert "horse" not in str(caught.value)


def test_a_key_does_not_print_itself() -> None:
    """Neither repr nor str of a key holds its bytes."""
    assert repr(SECRET)[2:-1] not in f"{KEY!r} {KEY}"
    assert "secret" not in repr(KEY)


def test_without_cryptography_the_error_names_what_to_install() -> None:
    """Where the package is missing, the module imports and sealing says what to install."""
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from flowlang.diagnostics import EngineError\n"
        "from flowlang.runtime import seal\n"
        "try: seal.seal(b'x', seal.Key(bytes(32)), header=b'')\n"
        "except EngineError as error: print(error)\n"
    )
    root = Path(seal.__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    assert "pip install 'flowlang[encrypt]'" in ran.stdout
