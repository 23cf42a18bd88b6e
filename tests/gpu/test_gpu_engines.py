"""Engines and instances on an NVIDIA GPU: built, kept, lost and closed; memory that runs out."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from examples import models
from flowlang import App, load
from flowlang.cli import main
from flowlang.diagnostics import EngineError, FlowError, StageFailed
from flowlang.runtime import cuda, engine_store, trt
from flowlang.runtime.stage import InstanceLost
from tests.gpu.place import CELL_LEVELS, CELLS, LONG_S, ON_GPU, Array, Place, cells_on_host

pytestmark = ON_GPU


def test_an_engine_is_built_once_and_a_damaged_one_again(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second load builds nothing; where a byte flipped the engine is built anew, and told why."""
    caplog.set_level(logging.INFO, "flowlang")
    item = np.ones(16, np.float32)

    def load_again() -> tuple[Path, int, str, Array]:
        caplog.clear()
        with place.load('trt("mlp.onnx", batch=1..2) x2', "cached", tmp_path) as app:
            answer = app(item)
        (path,) = tmp_path.glob("*.engine")
        said = "\n".join(r.getMessage() for r in caplog.records if "build" in r.getMessage())
        return path, path.stat().st_mtime_ns, said, answer

    path, built_ns, said, answer = load_again()
    assert "`mlp.onnx`" in said
    assert "not built yet" in said
    again = load_again()
    assert again[:3] == (path, built_ns, "")
    np.testing.assert_array_equal(again[3], answer)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    mended = load_again()
    assert mended[0] == path
    assert mended[1] != built_ns
    assert "damaged" in mended[2]
    np.testing.assert_allclose(mended[3], answer, rtol=1e-2, atol=1e-2)
    assert load_again()[2] == ""


def test_building_ahead_keeps_what_it_says_it_built(place: Place, tmp_path: Path) -> None:
    """`flowlang build` is at fault where its engines cannot be kept, and then builds none."""
    path = place.models / "ahead.flow"
    path.write_text('trt("mlp.onnx", batch=1..2) x2', "utf-8")
    (tmp_path / "file").touch()

    def build_to(folder: Path) -> Result:
        return CliRunner().invoke(main, ["build", str(path), "--output", str(folder)])

    refused = build_to(tmp_path / "file" / "engines")
    assert refused.exit_code == 1
    assert "no engine can be kept in" in refused.output
    assert "built in" not in refused.output
    (tmp_path / "engines").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_store, "write_whole", _disk_is_full)
        lost = build_to(tmp_path / "engines")
    assert lost.exit_code == 1
    assert "the engine of `mlp.onnx` was built, but not kept: not built yet" in lost.output
    for said in ("built in", "was there already"):
        done = build_to(tmp_path / "engines")
        assert done.exit_code == 0
        assert f"mlp.onnx: {said}" in done.output


def _disk_is_full(*given: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_lost_instance_is_replaced(
    place: Place,
    open_app: Callable[..., App],
    photos: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The requests of a lost instance fail, its lane gets a new one, and the others go on."""
    app = open_app(CELLS.format(2))
    wanted = cells_on_host(place, photos)
    collect, warm = trt.Context.collect, trt.Context.warm
    calls, is_replaced = itertools.count(), threading.Event()

    def failing(self: Any, *rest: Any) -> Any:
        if next(calls) == 0:
            raise InstanceLost("lost on purpose")
        return collect(self, *rest)

    def warming(self: Any) -> None:
        warm(self)
        is_replaced.set()

    monkeypatch.setattr(trt.Context, "collect", failing)
    monkeypatch.setattr(trt.Context, "warm", warming)
    outcomes = list(app.map(photos * 4, errors="return"))
    failed = [o for o in outcomes if isinstance(o, Exception)]
    assert 1 <= len(failed) <= 96
    for error in failed:
        assert isinstance(error, StageFailed)
        assert "lost on purpose" in str(error)
    for index, outcome in enumerate(outcomes):
        if not isinstance(outcome, Exception):
            assert abs(outcome - wanted[index % 32]).max() <= CELL_LEVELS
    assert is_replaced.wait(LONG_S)
    for _ in range(4):
        for outcome, cells in zip(app.map(photos), wanted, strict=True):
            assert abs(outcome - cells).max() <= CELL_LEVELS


def test_a_model_that_cannot_be_built_is_told(place: Place, open_app: Callable[..., App]) -> None:
    """An operator TensorRT does not know is an EngineError with the model's name and a reason."""
    node = helper.make_node("Invented", ["data"], ["out"], domain="made.up")
    ports = [helper.make_tensor_value_info(n, 1, ["N", 4]) for n in ("data", "out")]
    graph = helper.make_graph([node], "odd", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("made.up", 1)]
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=opsets), place.models / "odd.onnx"
    )
    with pytest.raises(EngineError, match=r"TensorRT cannot (read|build) `odd.onnx`: .+"):
        open_app('trt("odd.onnx", batch=1..2) x2')


def test_an_output_without_a_row_for_each_item_is_told(
    place: Place, open_app: Callable[..., App]
) -> None:
    """Its memory would be overrun, and items given what belongs to others."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["data", "shape"], ["out"])],
        "flat",
        [helper.make_tensor_value_info("data", 1, ["N", 32])],
        [helper.make_tensor_value_info("out", 1, ["M", 4])],
        [numpy_helper.from_array(np.asarray([-1, 4], np.int64), "shape")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=opsets), place.models / "flat.onnx"
    )
    with pytest.raises(EngineError, match=r"`flat.onnx` gives `out` as .* for a batch of"):
        open_app('trt("flat.onnx", batch=1..8) x1')


ROW_BYTES = 1 << 20


@pytest.fixture
def wide(place: Place) -> str:
    """A flow whose buffers take 256 MiB each, its engine built while there is memory for it."""
    models.identity(place.models / "wide.onnx", ("N", ROW_BYTES // 4))
    text = 'trt("wide.onnx", batch=1..1..256, graphs=false) x1'
    with place.load(text) as app:
        item = np.arange(ROW_BYTES // 4, dtype=np.float32)
        np.testing.assert_array_equal(app(item), item)
    return text


class Hog:
    """All of the GPU's memory but `left_bytes`.

    What tests before gave back may become free seconds later, so it takes until nothing more comes.
    """

    def __init__(self, left_bytes: int) -> None:
        self._held: list[cuda.DeviceBuffer] = []
        steady = 0
        while steady < 20:
            more_bytes = cuda.free_bytes() - left_bytes
            if more_bytes > 1 << 21:
                self._held.append(cuda.DeviceBuffer(more_bytes))
                steady = 0
            steady += 1
            time.sleep(0.1)

    def close(self) -> None:
        for buffer in self._held:
            buffer.close()


@pytest.mark.parametrize("left_bytes", [128 << 20, 400 << 20])
def test_too_little_gpu_memory_is_told_and_nothing_is_kept(
    place: Place, wide: str, left_bytes: int
) -> None:
    """Where buffers do not fit an EngineError says so, and those that did fit are given back."""
    gc.collect()
    hog = Hog(left_bytes)
    try:
        before = cuda.free_bytes()
        with pytest.raises(EngineError, match=r"out of GPU memory|cannot (build|load)"):
            place.load(wide)
        gc.collect()
        assert before - cuda.free_bytes() < 64 << 20
    finally:
        hog.close()
    with place.load(wide) as app:
        np.testing.assert_array_equal(
            app(np.ones(ROW_BYTES // 4, np.float32)), np.ones(ROW_BYTES // 4, np.float32)
        )


def test_a_buffer_larger_than_the_gpu_is_told(place: Place) -> None:
    """The error names what was wanted and what is free, and the GPU goes on working."""
    with pytest.raises(EngineError, match=r"out of GPU memory .*: 4,398,046,511,104 bytes wanted"):
        cuda.DeviceBuffer(1 << 42)
    cuda.DeviceBuffer(1 << 20).close()


def test_a_gpu_there_is_not_is_told(place: Place) -> None:
    """The device is checked before anything is loaded."""
    path = place.models / "nowhere.flow"
    path.write_text('trt("mlp.onnx", batch=1..2) x1', "utf-8")
    with pytest.raises(FlowError, match=r"there is no gpu 99: this machine has [1-9]"):
        load(path, device="gpu:99", engines=place.engines)


def test_closing_an_app_gives_its_memory_back(place: Place, photos: list[bytes]) -> None:
    """Loading and closing again and again leaves neither GPU memory nor threads behind."""
    free: list[int] = []
    threads: list[int] = []
    for _ in range(5):
        with place.load(CELLS.format(1), "again") as app:
            app(photos[0])
        gc.collect()
        limit_s = time.monotonic() + 5
        while threads and threading.active_count() > threads[0] and time.monotonic() < limit_s:
            time.sleep(0.01)
        free.append(cuda.free_bytes())
        threads.append(threading.active_count())
    assert free[1] - free[-1] < 64 << 20
    assert threads[-1] <= threads[0]
