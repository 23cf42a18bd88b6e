"""A short run under compute-sanitizer: no kernel and no copy touches what is not its own.

It needs the `compute-sanitizer` of a CUDA toolkit on the PATH; that of the wheel
nvidia-cuda-sanitizer-api-cu12 lacks the programs that it starts others with.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import models
from flowlang.runtime import cuda

pytestmark = pytest.mark.gpu

FLOW = 'decode -> resize(224) -> rgb -> trt("net.onnx", fp16, batch=1..4..16)\n'
# Every picture, each batch size once, and a bad one among its neighbours.
RUN = """
import sys, flowlang, pytest
from tests.engines import build_soon
from tests.pictures import photographs
build_soon(pytest.MonkeyPatch())
pictures = photographs(32)
pictures[5] = pictures[5][:999]
with flowlang.load(sys.argv[1], device="gpu", engines=sys.argv[2]) as app:
    for count in (1, 4, 9, 32):
        answers = list(app.map(pictures[:count], errors="return"))
        print(count, sum(isinstance(a, Exception) for a in answers))
"""


def test_memcheck_finds_nothing_in_a_short_run(tmp_path: Path) -> None:
    """The run answers as it does without the sanitizer, which reports no error."""
    if reason := cuda.why_no_gpu():
        pytest.skip(reason)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    models.resnet(tmp_path / "net.onnx", depth=18, width=8)
    flow = tmp_path / "net.flow"
    flow.write_text(FLOW)
    run = [sys.executable, "-c", RUN, str(flow), str(tmp_path / "engines")]
    plain = subprocess.run(run, capture_output=True, text=True, timeout=200, check=True)
    memcheck = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no"]
    checked = subprocess.run(
        [*memcheck, "--error-exitcode", "9", *run],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "ERROR SUMMARY: 0 errors" in checked.stdout
    assert [line for line in checked.stdout.splitlines() if not line.startswith("=")] == (
        plain.stdout.splitlines()
    )
    assert plain.stdout.splitlines() == ["1 0", "4 0", "9 1", "32 1"]
