"""TensorRT engines for tests: soon built, and slower than they could be."""

from __future__ import annotations

from typing import Any

import pytest

from flowlang.runtime import trt


def build_soon(patch: pytest.MonkeyPatch) -> None:
    """Let TensorRT take the first of its kernels that works, where it would time them all."""
    configure = trt._configuration

    def configure_for_tests(*given: Any) -> Any:
        config = configure(*given)
        config.builder_optimization_level = 0
        return config

    patch.setattr(trt, "_configuration", configure_for_tests)
