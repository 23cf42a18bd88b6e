"""The engine store: only whole engines for exactly the key asked for, and one builder at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import EngineError, InternalError
from flowlang.runtime import engine_store, seal
from flowlang.runtime.engine_store import EngineKey, EngineStore, Loaded

ROOT = Path(engine_store.__file__).parents[2]
ENGINE = b"ftrt plan bytes " * 8
SECRET = seal.Key(bytes(range(32)))
KEY = EngineKey(
    model_sha256=hashlib.sha256(b"resnet50.onnx").hexdigest(),
    precision="fp16",
    profile=(("images", (1, 224, 224, 3), (4, 224, 224, 3), (8, 224, 224, 3)),),
    normalisation=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    options=(("workspace", "1073741824"), ("aux_streams", "0")),
    tensorrt="10.3.0",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    driver_class="550",
)
OLDER = replace(KEY, tensorrt="8.6.0")


def _never() -> bytes:
    raise AssertionError("built although the engine is stored")


def _stored(directory: Path, key: seal.Key | None = None) -> Path:
    """A store's file holding ENGINE for KEY."""
    store = EngineStore(directory, key)
    assert store.build(KEY, lambda: ENGINE) == ENGINE
    return store.path(KEY)


@pytest.fixture(params=[None, SECRET], ids=["plain", "sealed"])
def sealing(request: pytest.FixtureRequest) -> seal.Key | None:
    """The store's key: each test runs on a plain and on a sealed store."""
    key: seal.Key | None = request.param
    return key


def test_an_engine_is_built_once(tmp_path: Path, sealing: seal.Key | None) -> None:
    """The second build of a key, in another store object, loads what the first stored."""
    _stored(tmp_path / "new" / "engines", sealing)
    again = EngineStore(tmp_path / "new" / "engines", sealing)
    assert again.build(KEY, _never) == ENGINE
    assert again.load(KEY) == Loaded(ENGINE)


def test_the_digest_is_of_the_meaning() -> None:
    """The digest ignores the order of inputs and options, and nothing else."""
    two = (*KEY.profile, ("sizes", (1, 2), (4, 2), (8, 2)))
    same = replace(KEY, options=KEY.options[::-1], profile=two[::-1])
    assert same.digest == replace(KEY, profile=two).digest
    changes: list[EngineKey] = [
        KEY,
        OLDER,
        replace(KEY, model_sha256="0" * 64),
        replace(KEY, precision="int8"),
        replace(KEY, profile=two),
        replace(KEY, normalisation=None),
        replace(KEY, options=()),
        replace(KEY, gpu="NVIDIA L4"),
        replace(KEY, compute_capability="8.9"),
        replace(KEY, driver_class="535"),
    ]
    assert len({key.digest for key in changes}) == len(changes)
    with pytest.raises(InternalError):
        replace(KEY, model_sha256="../../etc")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (OLDER, "built by TensorRT 8.6.0, this is 10.3.0"),
        (replace(KEY, gpu="NVIDIA L4"), "built on NVIDIA L4, this is NVIDIA H200"),
        (replace(KEY, precision="int8"), "built in int8, asked for fp16"),
        (replace(KEY, driver_class="535"), "built under driver 535, this is 550"),
        (replace(KEY, compute_capability="8.9"), "compute capability 8.9, this is 9.0"),
        (replace(KEY, normalisation=None), "normalisation null, asked for [[0.485, "),
        (replace(KEY, options=()), 'options [], asked for [["aux_streams", "0"]'),
        (replace(KEY, profile=()), 'shapes [], asked for [["images", [1, 224, 224, 3]'),
        (replace(KEY, model_sha256="0" * 64), "SHA-256 000000"),
    ],
)
def test_an_engine_for_something_else_is_refused(
    tmp_path: Path, sealing: seal.Key | None, other: EngineKey, expected: str
) -> None:
    """A file built from or for anything else is refused with both values, wherever it lies."""
    store = EngineStore(tmp_path, sealing)
    path = tmp_path / ("chosen" + store.suffix)
    store.place(other, path, ENGINE)
    found = store.load_file(path, KEY)
    assert found.engine is None
    assert expected in found.reason
    path.rename(store.path(KEY))
    assert store.load(KEY) == found


def test_a_miss_names_the_nearest_engine(tmp_path: Path) -> None:
    """Where no engine fits, the reason tells what sets the nearest one of the same model apart."""
    store = EngineStore(tmp_path)
    assert store.load(KEY).reason == "not built yet"
    store.build(replace(OLDER, gpu="NVIDIA L4"), lambda: ENGINE)
    store.build(OLDER, lambda: ENGINE)
    nearest = "not built yet; the nearest was built by TensorRT 8.6.0, this is 10.3.0"
    assert store.load(KEY) == Loaded(None, nearest)


def test_every_cut_is_refused(tmp_path: Path, sealing: seal.Key | None) -> None:
    """A file cut anywhere is refused, and past its header says how much of it is there."""
    path = _stored(tmp_path, sealing)
    whole = path.read_bytes()
    store = EngineStore(tmp_path, sealing)
    payload = len(whole) - (len(ENGINE) if sealing is None else seal.sealed_length(len(ENGINE)))
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        expected = f"{length:,} of {len(whole):,} bytes" if length >= payload else ""
        found = store.load(KEY)
        assert found.engine is None
        assert found.reason.startswith(f"cut: {expected}")


def test_every_flipped_bit_is_refused(tmp_path: Path, sealing: seal.Key | None) -> None:
    """A file with one bit of any of its bytes changed is refused."""
    path = _stored(tmp_path, sealing)
    whole = path.read_bytes()
    store = EngineStore(tmp_path, sealing)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << (at * 5 + 3) % 8]), at)
            assert store.load(KEY).engine is None, f"byte {at}"
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert store.load(KEY).engine == ENGINE


@pytest.fixture(scope="module")
def small_files() -> Iterator[dict[bool, bytes]]:
    """A plain and a sealed store's file, by whether it is sealed."""
    with tempfile.TemporaryDirectory() as name:
        yield {bool(key): _stored(Path(name), key).read_bytes() for key in (None, SECRET)}


@given(
    is_sealed=st.booleans(),
    edits=st.lists(
        st.tuples(st.integers(0, 1200), st.integers(0, 40), st.binary(max_size=40)),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=300)
def test_no_edit_of_a_file_is_trusted(
    small_files: dict[bool, bytes], is_sealed: bool, edits: list[tuple[int, int, bytes]]
) -> None:
    """However bytes are replaced, removed or added, a file loads as written or not at all."""
    whole = changed = small_files[is_sealed]
    for at, removed, added in edits:
        changed = changed[:at] + added + changed[at + removed :]
    store = EngineStore(Path("/nowhere"), SECRET if is_sealed else None)
    with tempfile.NamedTemporaryFile() as file:
        file.write(changed)
        file.flush()
        found = store.load_file(Path(file.name), KEY)
    assert found.engine == (ENGINE if changed == whole else None)
    assert bool(found.reason) != (changed == whole)


def _with_header(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    """Rewrite a file's header, with a checksum to match: what a forger can do without a key."""
    whole = path.read_bytes()
    start = engine_store._FRONT_BYTES
    length = engine_store._FRONT.unpack_from(whole)[2]
    header = json.loads(whole[start : start + length])
    text = json.dumps(edit(header), sort_keys=True).encode()
    front = engine_store._FRONT.pack(engine_store.MAGIC, engine_store.FORMAT, len(text))
    digest = hashlib.sha256(front + text).digest()
    path.write_bytes(front + digest + text + whole[start + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: [header],
        lambda header: header | {"key": 3},
        lambda header: header | {"payload_bytes": "many"},
        lambda header: header | {"payload_bytes": -1},
        lambda header: header | {"payload_bytes": 10**12},
        lambda header: header | {"built": float("nan")},
        lambda header: header | {"more": 1},
        lambda header: {"key": header["key"]},
        lambda header: header | {"key": header["key"] | {"gpu": "\x1b[2J\n" + "x" * 999}},
    ],
)
def test_a_forged_header_is_refused_in_one_clean_line(
    tmp_path: Path, edit: Callable[[dict[str, object]], object]
) -> None:
    """A header of other types, or made to upset a terminal, gives a short printable reason."""
    path = _stored(tmp_path)
    _with_header(path, edit)
    found = EngineStore(tmp_path).load(KEY)
    assert found.engine is None
    assert found.reason.isprintable()
    assert len(found.reason) < 300


def test_a_sealed_header_cannot_be_forged(tmp_path: Path) -> None:
    """Relabelling a sealed engine for another GPU, checksum and all, does not make it load."""
    path = _stored(tmp_path, SECRET)
    _with_header(path, lambda header: header | {"key": json.loads(OLDER.canonical)})
    found = EngineStore(tmp_path, SECRET).load_file(path, OLDER)
    assert found.engine is None
    assert "damaged or altered" in found.reason


def test_a_wrong_key_is_called_a_wrong_key(tmp_path: Path) -> None:
    """A sealed engine is refused with another key and without one, saying which."""
    path = _stored(tmp_path, SECRET)
    other = EngineStore(tmp_path, seal.Key(bytes(32), "FLOWLANG_KEY"))
    assert other.load(KEY).reason == "wrong key: not sealed with the key from FLOWLANG_KEY"
    assert EngineStore(tmp_path).load_file(path, KEY).reason == "sealed, and no key is given"


def test_a_plain_engine_is_refused_where_a_key_is_given(tmp_path: Path) -> None:
    """Nobody without the key can put an engine where sealed ones are asked for."""
    path = _stored(tmp_path)
    store = EngineStore(tmp_path, SECRET)
    path.rename(store.path(KEY))
    assert "not sealed, and a key is given" in store.load(KEY).reason


def _all_bytes(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in directory.rglob("*") if path.is_file()]


def test_a_sealed_store_holds_no_plain_bytes(tmp_path: Path) -> None:
    """No file of a sealed store, nor one placed from it, holds any stretch of the engine."""
    store = EngineStore(tmp_path, SECRET)
    engine = os.urandom(4096)
    store.build(KEY, lambda: engine)
    store.place(KEY, tmp_path / "out.engine.encrypted")
    contents = _all_bytes(tmp_path)
    assert sum(len(content) > len(engine) for content in contents) == 2
    for content in contents:
        assert not any(engine[at : at + 8] in content for at in range(0, len(engine) - 7, 8))


def test_a_placed_engine_loads_with_the_same_checks(
    tmp_path: Path, sealing: seal.Key | None
) -> None:
    """An engine written to a chosen path loads from there for its key, and for no other."""
    _stored(tmp_path / "store", sealing)
    store = EngineStore(tmp_path / "store", sealing)
    path = tmp_path / ("resnet50" + store.suffix)
    store.place(KEY, path)
    assert store.load_file(path, KEY).engine == ENGINE
    assert store.load_file(path, OLDER).reason == "built by TensorRT 10.3.0, this is 8.6.0"
    assert "No such file" in store.load_file(tmp_path / "absent.engine", KEY).reason


def test_what_cannot_be_placed_is_an_error(tmp_path: Path) -> None:
    """A missing engine, a missing directory and a name that lies about sealing are errors."""
    store = EngineStore(tmp_path)
    with pytest.raises(EngineError, match=r"no engine to write to .*: not built yet"):
        store.place(KEY, tmp_path / "a.engine")
    with pytest.raises(EngineError, match="No such file or directory"):
        store.place(KEY, tmp_path / "absent" / "a.engine", ENGINE)
    with pytest.raises(EngineError, match=r"without a key an engine ends in \.engine"):
        store.place(KEY, tmp_path / "a.engine.encrypted", ENGINE)
    with pytest.raises(EngineError, match=r"a sealed engine ends in \.engine\.encrypted"):
        EngineStore(tmp_path, SECRET).place(KEY, tmp_path / "a.engine", ENGINE)
    assert _all_bytes(tmp_path) == []


def test_a_refused_engine_is_built_again_and_the_reason_logged(
    tmp_path: Path, sealing: seal.Key | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file is replaced by a new engine, with a warning that says what was wrong."""
    path = _stored(tmp_path, sealing)
    path.write_bytes(path.read_bytes()[:-1])
    store = EngineStore(tmp_path, sealing)
    with caplog.at_level(logging.INFO, logger="flowlang.engine_store"):
        assert store.build(KEY, lambda: b"a new engine") == b"a new engine"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cut: " in caplog.text
    assert store.build(KEY, _never) == b"a new engine"


def test_a_failing_builder_leaves_nothing(tmp_path: Path) -> None:
    """A builder's error passes through, and the next build is free to go ahead."""
    store = EngineStore(tmp_path)
    with pytest.raises(OSError, match="device lost"):
        store.build(KEY, lambda: (_ for _ in ()).throw(OSError("device lost")))
    with pytest.raises(EngineError, match="returned no engine"):
        store.build(KEY, lambda: b"")
    assert store.build(KEY, lambda: ENGINE) == ENGINE


def test_an_unwritable_directory_costs_only_the_storing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the directory cannot be made, the engine is returned and a warning says so."""
    (tmp_path / "file").write_text("in the way")
    store = EngineStore(tmp_path / "file" / "engines")
    assert store.build(KEY, lambda: ENGINE) == ENGINE
    assert "built but not stored" in caplog.text
    assert "Not a directory" in caplog.text


def test_a_place_for_engines_is_checked_before_they_are_built(tmp_path: Path) -> None:
    """Who builds ahead of time has nothing of an engine that is not kept."""
    EngineStore(tmp_path / "new" / "engines").check_place()
    assert list((tmp_path / "new" / "engines").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"no engine can be kept in .*file/engines: Not a direct"):
        EngineStore(tmp_path / "file" / "engines").check_place()


def test_a_directory_where_the_file_should_be_is_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Something that is no file at the engine's path is refused, not replaced, and not fatal."""
    store = EngineStore(tmp_path)
    store.path(KEY).mkdir()
    assert "Is a directory" in store.load(KEY).reason
    assert store.build(KEY, lambda: ENGINE) == ENGINE
    assert "built but not stored" in caplog.text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".engine", ".lock"]


def test_threads_build_once(tmp_path: Path) -> None:
    """Eight threads asking for one engine at once build it once."""
    built: list[int] = []
    start = threading.Barrier(8)
    answers: list[bytes] = []

    def builder() -> bytes:
        built.append(1)
        return ENGINE

    def ask() -> None:
        start.wait()
        answers.append(EngineStore(tmp_path).build(KEY, builder))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), answers) == (1, [ENGINE] * 8)


# Runs in other processes: builds the test's key, telling on stdout where it has come to.
# argv: directory, "sealed" or "plain", and how this process goes about it.
BUILDER = """
import logging, os, resource, signal, sys
from pathlib import Path
from flowlang.runtime import seal
from flowlang.runtime.engine_store import EngineStore
from tests_key import KEY, SECRET

directory, sealing, way = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

def builder():
    print("building", flush=True)
    if way == "asked":
        sys.stdin.readline()
    if way == "forks" and os.fork() == 0:
        sys.stdin.readline()
        os._exit(0)
    return bytes(range(256)) * 4096

def kill_at_rename(event, arguments):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)

if way == "killed at rename":
    sys.addaudithook(kill_at_rename)
if way in ("killed in writing", "full"):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
if way == "killed in writing":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
store = EngineStore(Path(directory), SECRET if sealing == "sealed" else None)
engine = store.build(KEY, builder)
print("engine", len(engine), flush=True)
"""
LARGE = bytes(range(256)) * 4096


def _start(directory: Path, sealing: seal.Key | None, way: str) -> subprocess.Popen[str]:
    """Another process building KEY, its program and this test's key beside the store."""
    program = directory.with_suffix(".program")
    program.mkdir(exist_ok=True)
    (program / "tests_key.py").write_text(
        "from flowlang.runtime.engine_store import EngineKey\n"
        "from flowlang.runtime.seal import Key\n"
        f"KEY = {KEY!r}\nSECRET = Key({SECRET.secret!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, directory, "sealed" if sealing else "plain", way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=program,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(program)])},
    )


def _line(running: subprocess.Popen[str], containing: str) -> str:
    """The next line of a process's output with these words in it."""
    stream = running.stdout
    if stream is not None:
        for line in stream:
            if containing in line:
                return line
    raise AssertionError(f"the process ended without saying {containing!r}")


def test_two_processes_build_once(tmp_path: Path, sealing: seal.Key | None) -> None:
    """A process asking for an engine that another is building waits, and loads that one."""
    directory = tmp_path / "engines"
    with _start(directory, sealing, "asked") as first:
        _line(first, "building\n")
        with _start(directory, sealing, "asked") as second:
            _line(second, "waiting for another process")
            first_rest, _ = first.communicate("go on\n")
            second_rest, _ = second.communicate()
    assert "engine 1048576" in first_rest
    assert second_rest == "engine 1048576\n"
    assert EngineStore(directory, sealing).load(KEY).engine == LARGE


def test_a_builder_killed_while_building_lets_the_next_one_in(tmp_path: Path) -> None:
    """When the process that builds is killed, the one waiting for it builds."""
    directory = tmp_path / "engines"
    with _start(directory, None, "asked") as first:
        _line(first, "building\n")
        with _start(directory, None, "at once") as second:
            _line(second, "waiting for another process")
            first.kill()
            rest, _ = second.communicate()
    assert first.returncode == -signal.SIGKILL
    assert "building\nengine 1048576\n" in rest


def test_the_lock_ends_with_the_build(tmp_path: Path) -> None:
    """A process forked by the builder, and living on, does not keep the engine locked."""
    directory = tmp_path / "engines"
    with _start(directory, None, "forks") as running:
        _line(running, "engine 1048576")
        lock = next(directory.glob("*.lock"))
        with lock.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        running.communicate("end\n")


@pytest.mark.parametrize(
    ("way", "by"),
    [("killed in writing", signal.SIGXFSZ), ("killed at rename", signal.SIGKILL)],
)
def test_a_builder_killed_while_storing_leaves_nothing_trusted(
    tmp_path: Path, sealing: seal.Key | None, way: str, by: signal.Signals
) -> None:
    """A process killed in mid-write or before the rename leaves a partial file the next clears."""
    directory = tmp_path / "engines"
    with _start(directory, sealing, way) as running:
        running.communicate()
    assert running.returncode == -by
    left = [path for path in directory.iterdir() if path.name.endswith(engine_store.PARTIAL)]
    assert [path.stat().st_size > 0 for path in left] == [True]
    assert not sealing or LARGE[:64] not in left[0].read_bytes()
    store = EngineStore(directory, sealing)
    assert store.load(KEY) == Loaded(None, "not built yet")
    assert store.build(KEY, lambda: LARGE) == LARGE
    assert store.load(KEY).engine == LARGE
    assert not left[0].exists()


def test_a_full_disk_costs_only_the_storing(tmp_path: Path, sealing: seal.Key | None) -> None:
    """A process that may not write that much returns the engine, warns and leaves no file of it."""
    directory = tmp_path / "engines"
    with _start(directory, sealing, "full") as running:
        output, _ = running.communicate()
    assert "built but not stored" in output
    assert "File too large" in output
    assert output.endswith("engine 1048576\n")
    assert [path.suffix for path in directory.iterdir()] == [".lock"]


def test_a_file_being_written_is_not_cleared(tmp_path: Path) -> None:
    """Clearing what dead writers left spares what a live one is writing."""
    target, other = tmp_path / "one.engine", tmp_path / "two.engine"

    def pieces() -> Iterator[bytes]:
        yield b"first half, "
        engine_store.write_whole(other, [b"another"])
        yield b"second half"

    engine_store.write_whole(target, pieces())
    assert target.read_bytes() == b"first half, second half"
    assert sorted(tmp_path.iterdir()) == [target, other]


def test_writers_do_not_clear_each_other(tmp_path: Path) -> None:
    """Threads writing many files to one directory all succeed: nothing live is ever cleared."""
    stop = threading.Event()

    def clear() -> None:
        while not stop.is_set():
            engine_store._clear_partial(tmp_path)

    clearing = [threading.Thread(target=clear) for _ in range(2)]
    for thread in clearing:
        thread.start()
    try:
        for number in range(100):
            engine_store.write_whole(tmp_path / f"{number}.engine", [b"whole"])
    finally:
        stop.set()
        for thread in clearing:
            thread.join()
    assert _all_bytes(tmp_path) == [b"whole"] * 100


def test_a_large_engine_is_held_once(tmp_path: Path, sealing: seal.Key | None) -> None:
    """An engine of several chunks loads whole, with at most one chunk of it held twice besides."""
    engine = os.urandom(1 << 16) * 3072 + b"end"
    store = EngineStore(tmp_path, sealing)
    store.build(KEY, lambda: engine)
    tracemalloc.start()
    try:
        found = store.load(KEY)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.engine == engine
    besides = 2 * seal.CHUNK_BYTES if sealing else 0
    assert len(engine) > 3 * seal.CHUNK_BYTES
    assert peak_bytes < len(engine) + besides + (1 << 20)


def test_engines_are_kept_in_the_users_cache() -> None:
    """The default directory is in XDG_CACHE_HOME if absolute, else in HOME, else an error."""
    default = engine_store.default_directory
    assert default({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/flowlang/engines")
    assert default({"XDG_CACHE_HOME": "c", "HOME": "/h"}) == Path("/h/.cache/flowlang/engines")
    with pytest.raises(EngineError, match="neither XDG_CACHE_HOME nor HOME"):
        default({})
