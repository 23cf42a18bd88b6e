"""Flows on the second of two NVIDIA GPUs, and on both."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flowlang import App
from flowlang.runtime import cuda, trt
from flowlang.runtime.stage import InstanceLost
from flowlang.serve.metrics import Counts, metrics_text
from tests.gpu.place import CELL_LEVELS, CELLS, ON_GPU, Place, cells_on_host
from tests.waiting import eventually

pytestmark = ON_GPU

ANSWER = """
import gc
import sys
from pathlib import Path
from flowlang import load

with load(sys.argv[1], device=sys.argv[2], engines=Path(sys.argv[3])) as app:
    print(len(app(Path(sys.argv[4]).read_bytes())), flush=True)
    sys.stdin.readline()
gc.collect()
print("closed", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def two(place: Place) -> None:
    if cuda.gpu_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize(
    ("settings", "used"), [("gpu=1, ", {1}), ("gpu=0..1, ", {0, 1}), ("", {0})]
)
def test_each_gpu_answers_with_the_cells_of_its_own_pictures(
    place: Place,
    open_app: Callable[..., App],
    crops: list[bytes],
    settings: str,
    used: set[int],
) -> None:
    text = CELLS.replace("batch=", f"{settings}batch=").format(4)
    app = open_app(text)
    (stage,) = app.scheduler.stages
    assert set(stage.plan.gpus) == used
    counts = Counts()
    counts.follow(app)
    place_told = f'device="gpu:{"..".join(map(str, sorted(used)))}"'
    assert place_told in metrics_text(counts, "ready", {}).decode()
    wanted = np.stack(cells_on_host(place, crops))
    got = np.stack(list(app.map(crops * 8)))
    assert abs(got - np.concatenate([wanted] * 8)).max() <= CELL_LEVELS


def test_a_lost_gpu_leaves_the_other_one_serving(
    place: Place,
    open_app: Callable[..., App],
    photos: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it had in hand fails, and the log says which GPU that was. Its instances come back if it
    does.
    """
    app = open_app(CELLS.replace("batch=", "gpu=0..1, batch=").format(4))
    wanted = cells_on_host(place, photos)
    collect, use, is_lost = trt.Context.collect, cuda.use, threading.Event()
    (stage,) = app.scheduler.stages

    def collect_or_fail(self: trt.Context, count: int) -> Any:
        found = collect(self, count)
        if is_lost.is_set() and cuda.where() == " on gpu 0":
            raise InstanceLost("gone")
        return found

    def use_or_fail(index: int) -> None:
        use(index)
        if is_lost.is_set() and index == 0:
            raise InstanceLost("still gone")

    def ask() -> list[Any]:
        return list(app.map(photos * 4, errors="return"))

    monkeypatch.setattr(trt.Context, "collect", collect_or_fail)
    monkeypatch.setattr(cuda, "use", use_or_fail)
    is_lost.set()
    assert eventually(lambda: len(ask()) > 0 and stage.lost == 2)
    for _ in range(3):
        for index, cells in enumerate(ask()):
            assert abs(cells - wanted[index % len(photos)]).max() <= CELL_LEVELS
    assert "an instance of stage `chw` on gpu 0 is lost: gone" in caplog.text
    assert "no new instance of stage `chw` on gpu 0 yet: still gone" in caplog.text
    assert "on gpu 1" not in caplog.text
    is_lost.clear()
    assert eventually(lambda: stage.lost == 0)
    assert not [o for o in ask() if isinstance(o, Exception)]


@pytest.mark.parametrize(("settings", "device"), [("gpu=1, ", "gpu"), ("", "gpu:1")])
def test_a_flow_of_the_second_gpu_takes_no_memory_of_the_first(
    place: Place, photos: list[bytes], settings: str, device: str
) -> None:
    """A process that works on one GPU has no context on another one (hundreds of MiB), neither
    while it does nor when it has let go of its engines, from whichever of its threads.
    """
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()

    def used_mib() -> list[float]:
        devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(2)]
        return [pynvml.nvmlDeviceGetMemoryInfo(d).used / 2**20 for d in devices]

    flow, picture = place.models / "second.flow", place.models / "picture.jpg"
    flow.write_text(CELLS.replace("batch=", f"{settings}batch=").format(2))
    picture.write_bytes(photos[0])
    before = used_mib()
    command = [sys.executable, "-c", ANSWER, flow, device, place.engines, picture]
    with subprocess.Popen(
        [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline().strip().isdigit()
        at_work = used_mib()
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "closed\n"
        closed = used_mib()
        process.communicate("")
    assert process.returncode == 0
    assert at_work[1] - before[1] > 200
    assert at_work[0] - before[0] < 32
    assert closed[0] - before[0] < 32
