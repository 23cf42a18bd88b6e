"""What an engine is built from, as far as it can be told without TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.runtime.trt import EngineSpec


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
