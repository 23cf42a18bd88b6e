"""Files beside an operator's file: what is imported from there, and that folders are apart."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import flowlang
from tests.waiting import eventually

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
    # A copy, which nothing interrupts: a list of pairs may let the garbage collector run, and so
    # modules leave.
    for name, module in sys.modules.copy().items():
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}{os.sep}"):
            sys.modules.pop(name, None)


def flow(folder: Path, name: str = "f") -> Path:
    path = folder / f"{name}.flow"
    path.write_text(f'use "ops.py" as ops\nexport flow {name} = ops.f\n')
    return path


def answer(folder: Path, item: Any = 0) -> Any:
    """What the operator of a folder gives now."""
    with flowlang.load(flow(folder), device="cpu") as app:
        return app(item)


def is_gone(what: Callable[[], Any]) -> bool:
    """Whether the object of a weak reference goes once it is garbage."""
    return eventually(lambda: gc.collect() >= 0 and what() is None)


def imported(folder: Path) -> list[str]:
    """The files of a folder that are modules."""
    files = [str(getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    return sorted(f[len(f"{folder}{os.sep}") :] for f in files if f.startswith(f"{folder}{os.sep}"))


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


HOLDS = """import weakref
from typing import Any
class Table: pass
table = Table()
def f(x: int) -> Any: return weakref.ref(table)
"""


def test_modules_go_with_the_last_app_that_has_them(tmp_path: Path, write: Write) -> None:
    """Two apps share them; once the first has gone the second has them as they were."""
    write("pack/__init__.py", HOLDS + "count = [0]\n")
    write("helper.py", "import pack\n")
    write(
        "ops.py",
        "from typing import Any\nimport helper\ndef f(x: int) -> Any:\n"
        "    helper.pack.count[0] += 1\n    return helper.pack.count[0], helper.pack.f(x)\n",
    )
    first = flowlang.load(flow(tmp_path), device="cpu")
    assert first(0)[0] == 1
    second = flowlang.load(flow(tmp_path), device="cpu")
    assert second(0)[0] == 2
    gone = weakref.ref(first)
    first.close()
    del first
    assert is_gone(gone)
    count, table = second(0)
    assert count == 3
    assert imported(tmp_path) == ["helper.py", "ops.py", "pack/__init__.py"]
    second.close()
    del second
    assert is_gone(table)
    assert imported(tmp_path) == []
    assert answer(tmp_path)[0] == 1


def test_each_state_of_a_changed_folder_goes(tmp_path: Path, write: Write) -> None:
    """While the app of the next one runs, and where a file fails to run too."""
    write("helper.py", HOLDS)
    write("ops.py", "import helper\ndef f(x: int) -> helper.Any: return helper.f(x)\n")
    running = flowlang.load(flow(tmp_path), device="cpu")
    for number in range(3):
        table = running(0)
        write("helper.py", HOLDS + f"raise ValueError({number})\n")
        with pytest.raises(flowlang.EngineError, match="ValueError"):
            answer(tmp_path)
        write("helper.py", HOLDS)
        following = flowlang.load(flow(tmp_path), device="cpu")
        assert running(0) is table
        running.close()
        running = following
        assert is_gone(table)
        assert running(0)() is not None
        assert imported(tmp_path) == ["helper.py", "ops.py"]
    running.close()


def test_a_running_app_keeps_what_it_may_look_for_later(tmp_path: Path, write: Write) -> None:
    """Though its folder has changed and others have come and gone: imports in any thread, of any
    form and for the first time, pickles, and what annotations name.
    """
    write("late.py", "from __future__ import annotations\nfrom dataclasses import dataclass\n"
          "@dataclass\nclass Late:\n    of: list[Late]\n")  # fmt: skip
    write("pack/__init__.py", "def late():\n    from . import inner\n    return inner.VALUE\n")
    write("pack/inner.py", "from .circle import VALUE\n")
    write("pack/circle.py", "from . import inner\nVALUE = 7\n")
    write(
        "ops.py",
        "import pickle, threading, typing\n"
        "def look(found):\n"
        "    import late, pack\n"
        "    one = pickle.loads(pickle.dumps(late.Late([late.Late([])])))\n"
        "    hints = typing.get_type_hints(late.Late)\n"
        "    found += [one == late.Late([late.Late([])]), hints['of'] == list[late.Late]]\n"
        "    found += [pack.late() == 7]\n"
        "def f(x: int) -> list[bool]:\n"
        "    found = []\n"
        "    thread = threading.Thread(target=look, args=(found,))\n"
        "    thread.start()\n    thread.join()\n    look(found)\n    return found\n",
    )
    with flowlang.load(flow(tmp_path), device="cpu") as old:
        write("ops.py", HOLDS)
        assert is_gone(answer(tmp_path))
        assert old(0) == [True] * 6


def test_what_outlives_its_app_still_imports(tmp_path: Path, write: Write) -> None:
    """A thread that an operator began finds the modules of its folder, which are not run again."""
    write("helper.py", "from collections import Counter\nseen = Counter()\n")
    write("later.py", "import helper\nhelper.seen['later'] += 1\n")
    write(
        "ops.py",
        "import queue, threading\nfrom typing import Any\nimport helper\n"
        "helper.seen['run'] += 1\n"
        "def work(asked, told):\n"
        "    asked.get()\n"
        "    try:\n"
        "        from . import later\n"
        "        import helper, ops\n"
        "        told.put((dict(helper.seen), ops.work is work))\n"
        "    except BaseException as error:\n"
        "        told.put(error)\n"
        "def f(x: int) -> Any:\n"
        "    asked, told = queue.Queue(), queue.Queue()\n"
        "    threading.Thread(target=work, args=(asked, told), daemon=True).start()\n"
        "    return asked, told\n",
    )
    asked, told = answer(tmp_path)
    assert eventually(lambda: gc.collect() >= 0 and imported(tmp_path) == [])
    asked.put(None)
    assert told.get(timeout=20) == ({"run": 1, "later": 1}, True)


def test_an_app_has_one_state_of_a_folder(tmp_path: Path, write: Write) -> None:
    """Though files of it change while its lanes start: what has been run is not run once more."""
    write("helper.py", "K = 1\n")
    change = "import pathlib\npathlib.Path(__file__).with_name('helper.py').write_text('K = 22')\n"
    for name in ("a", "b"):
        text = f"import helper\nM = []\n{change}pathlib.Path(__file__).write_text('broken')\n"
        write(f"{name}.py", text + "def f(x: int) -> int: return x + helper.K\n"
              "def g(x: int) -> int:\n    M.append(x)\n    return x + len(M)\n")  # fmt: skip
    path = tmp_path / "all.flow"
    path.write_text(
        'use "a.py" as a\nuse "b.py" as b\nexport flow f = a.f x2 -> b.f -> a.g x2 -> b.g\n'
    )
    with flowlang.load(path, device="cpu") as app:
        assert app(0) == 4
