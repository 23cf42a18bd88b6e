"""What an engine is built from, as far as it can be told without TensorRT."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from examples import models
from flowlang.diagnostics import EngineError
from flowlang.plan.onnx import read_model
from flowlang.runtime import trt
from flowlang.runtime.cuda import Gpu
from flowlang.runtime.trt import EngineSpec

GPU = Gpu(0, "NVIDIA H200", "9.0", "13.0")


@pytest.mark.parametrize(
    ("batch", "profiles"),
    [
        ((1, 64, 64), ((1, 4, 8), (1, 64, 64))),
        ((1, 16, 64), ((1, 4, 8), (1, 16, 64))),
        ((4, 32, 32), ((4, 4, 8), (4, 32, 32))),
        ((1, 8, 8), ((1, 8, 8),)),
        ((1, 4, 64), ((1, 4, 64),)),
        ((16, 32, 32), ((16, 32, 32),)),
        ((64, 64, 64), ((64, 64, 64),)),
    ],
)
def test_small_batches_have_a_profile_of_their_own(
    batch: tuple[int, int, int], profiles: tuple[tuple[int, int, int], ...]
) -> None:
    """An engine made for large batches is tuned for small ones too, if it may get any."""
    spec = EngineSpec(Path("model.onnx"), "fp16", batch, None)
    assert spec.profiles == profiles
    assert spec.profiles[-1] == batch


def digest(path: Path) -> str:
    spec = EngineSpec(path, "fp16", (1, 8, 8), None, weights=read_model(path).weights)
    return spec.key(GPU).digest


def test_an_engine_belongs_to_weights_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in a file beside the model that change make it another model, as any would."""
    monkeypatch.setattr(trt, "_trt", lambda: SimpleNamespace(__version__="10.0"))
    path, beside = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    model = onnx.load(str(models.two_heads(tmp_path / "inside.onnx", size=8)))
    onnx.save_model(model, path, save_as_external_data=True, location=beside.name, size_threshold=0)
    before, content = digest(path), beside.read_bytes()
    beside.write_bytes(bytes(len(content)))
    os.utime(beside, ns=(1, 1))
    assert digest(path) != before
    beside.write_bytes(content)
    os.utime(beside, ns=(2, 2))
    assert digest(path) == before
    beside.unlink()
    with pytest.raises(EngineError, match=r"`m.onnx` cannot be read: .*m.onnx.data"):
        digest(path)
