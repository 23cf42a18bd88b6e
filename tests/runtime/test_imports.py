"""Files beside an operator's file: what is imported from there, and that folders are apart."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import flowlang

Write: TypeAlias = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a file; every one it writes is newer than all before."""
    now_ns = 10**18

    def put(name: str, text: str) -> None:
        nonlocal now_ns
        now_ns += 1
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, ns=(now_ns, now_ns))

    paths = list(sys.path)
    yield put
    sys.path[:] = paths
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]


def flow(folder: Path, name: str = "f") -> Path:
    path = folder / f"{name}.flow"
    path.write_text(f'use "ops.py" as ops\nexport flow {name} = ops.f\n')
    return path


def answer(folder: Path, item: Any = 0) -> Any:
    """What the operator of a folder gives now."""
    with flowlang.load(flow(folder), device="cpu") as app:
        return app(item)


def test_folders_do_not_share_their_helpers(tmp_path: Path, write: Write) -> None:
    """Each `helper` is that of its own folder, also where it is imported when it is needed."""
    for name in ("one", "two"):
        write(f"{name}/helper.py", f"K = '{name}'\n")
        write(f"{name}/late.py", f"from helper import K\nL = K + '{name}'\n")
        write(
            f"{name}/ops.py",
            "from helper import K\ndef f(x: int) -> str:\n    import late\n    return K + late.L\n",
        )
    files = [flow(tmp_path / name, name) for name in ("one", "two")]
    with flowlang.load(*files, device="cpu") as app:
        assert app["one"](0) == "oneoneone"
        assert app["two"](0) == "twotwotwo"
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(app["two"], range(50))) == {"twotwotwo"}
    assert "helper" not in sys.modules


def test_every_form_of_import_finds_the_folder(tmp_path: Path, write: Write) -> None:
    """Modules, packages, those inside them, and relative ones; and a circle of two files."""
    write("pack/__init__.py", "from . import inner\nfrom .inner import A\n")
    write("pack/inner.py", "A = 1\n")
    write("pack/deep/more.py", "from ..inner import A\nimport side\nB = A + side.S\n")
    write("bare/leaf.py", "C = 3\n")
    write("side.py", "import ops\nS = 1\ndef name(): return ops.NAME\n")
    write(
        "ops.py",
        "NAME = 'ops'\nimport pack, pack.deep.more, side\nimport pack.inner as inner\n"
        "import bare.leaf\nfrom pack.deep import more\nfrom pack import *\n"
        "from . import side as s\n"
        "def f(x: int) -> list[str]:\n"
        "    found = [pack.inner.A, pack.deep.more.B, inner.A, bare.leaf.C, more.B, A]\n"
        "    return [str(n) for n in found] + [side.name(), str(s is side)]\n",
    )
    assert answer(tmp_path) == ["1", "2", "1", "3", "2", "1", "ops", "True"]


def test_a_file_is_run_once_however_often_it_is_used(tmp_path: Path, write: Write) -> None:
    """Two operators' files of a folder have one helper between them."""
    write("helper.py", "from collections import Counter\ncalls = Counter()\n")
    for name in ("a", "b"):
        write(
            f"{name}.py",
            "import helper\ndef f(x: int) -> int:\n    helper.calls['f'] += 1\n"
            "    return helper.calls['f']\n",
        )
    path = tmp_path / "both.flow"
    path.write_text('use "a.py" as a\nuse "b.py" as b\nexport flow f = a.f -> b.f\n')
    with flowlang.load(path, device="cpu") as app:
        assert [app(0), app(0)] == [2, 4]
    with flowlang.load(path, device="cpu") as app:
        assert app(0) == 6


def test_a_changed_helper_is_run_again(tmp_path: Path, write: Write) -> None:
    """For who loads the flow then; one that runs goes on with what it has."""
    write("helper.py", "K = 1\n")
    write("ops.py", "import helper\ndef f(x: int) -> int: return helper.K\n")
    with flowlang.load(flow(tmp_path), device="cpu") as old:
        write("helper.py", "K = 2\n")
        assert answer(tmp_path) == 2
        assert old(0) == 1


def test_a_failed_import_is_tried_again(tmp_path: Path, write: Write) -> None:
    """What was missing may be there by then; the message names modules as the files do."""
    write("ops.py", "from helper import K\nimport other\ndef f(x: int) -> int: return K\n")
    with pytest.raises(flowlang.EngineError, match="No module named 'helper'"):
        answer(tmp_path)
    write("helper.py", "J = 1\n")
    with pytest.raises(flowlang.EngineError, match="cannot import name 'K' from 'helper'"):
        answer(tmp_path)
    write("helper.py", "K = 1\n")
    with pytest.raises(flowlang.EngineError, match="No module named 'other'"):
        answer(tmp_path)
    write("other.py", "")
    assert answer(tmp_path) == 1


def test_the_standard_library_is_not_hidden(tmp_path: Path, write: Write) -> None:
    """Files that are named like its modules, or like flowlang, are not taken for them."""
    write("queue.py", "raise RuntimeError\n")
    write("flowlang.py", "raise RuntimeError\n")
    write("numpy/notes.txt", "no package\n")
    write(
        "ops.py",
        "import queue, numpy\nfrom flowlang import BadRequest\n"
        "def f(x: int) -> int: return int(numpy.int64(queue.Queue(3).maxsize))\n",
    )
    assert answer(tmp_path) == 3


def test_what_the_program_has_imported_is_the_same_thing(tmp_path: Path, write: Write) -> None:
    """A program beside its operators shares its modules with them."""
    write("shared_state.py", "seen = []\n")
    write("ops.py", "import shared_state\ndef f(x: int) -> int:\n"
          "    shared_state.seen.append(x)\n    return x\n")  # fmt: skip
    sys.path.append(str(tmp_path))
    state = importlib.import_module("shared_state")
    answer(tmp_path, 5)
    assert state.seen == [5]


def test_objects_of_a_folder_can_be_pickled(tmp_path: Path, write: Write) -> None:
    """Their classes are found by the names they say; names in older pickles are found too."""
    write("kinds.py", "class Kind: pass\n")
    write(
        "ops.py",
        "import pickle\nfrom kinds import Kind\nclass Own: pass\n"
        "def f(x: int) -> bool:\n"
        "    both = pickle.loads(pickle.dumps([Own(), Kind()]))\n"
        "    old = pickle.loads(b'ckinds\\nKind\\n.')\n"
        "    return [type(b) for b in both] == [Own, Kind] and old.__name__ == 'Kind'\n",
    )
    assert answer(tmp_path) is True
