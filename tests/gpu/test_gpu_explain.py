"""What `flowlang explain --physical` says of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from flowlang.cli import main
from flowlang.runtime import cuda
from tests.regions import write_models

pytestmark = pytest.mark.gpu

DECODED = "\ngpu:0  JPEG is decoded by "


@pytest.mark.parametrize(("decoder", "is_said"), [("", True), ("(libjpeg)", False)])
def test_explain_says_what_decodes_on_a_gpu(tmp_path: Path, decoder: str, is_said: bool) -> None:
    """Whether JPEG engines or CPU threads do is measured, where a stage decodes on the GPU."""
    if reason := cuda.why_no_gpu():
        pytest.skip(reason)
    flow = write_models(tmp_path) / "a.flow"
    flow.write_text(f'decode{decoder} -> resize(64) -> rgb -> trt("chw.onnx")\n')
    shown = CliRunner().invoke(main, ["explain", "--physical", "--device", "gpu", str(flow)])
    assert shown.exit_code == 0, shown.output
    assert "gpu:0 x3" in shown.output
    assert (DECODED in shown.output) == is_said
    assert ("pictures/s in one region" in shown.output) == is_said
