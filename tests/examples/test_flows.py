"""The example flows: laid out, checked, and giving right answers about real pictures."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest

from examples import models
from flowlang import check, load
from flowlang.syntax.format import format_program
from flowlang.syntax.parse import parse, read_source

EXAMPLES = Path(models.__file__).parent
FLOWS = sorted(EXAMPLES.glob("*.flow"))
EACH_FLOW = pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.stem)
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flows with their models and pictures."""
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("needs rapidocr")
    copy = tmp_path_factory.mktemp("examples")
    for flow in FLOWS:
        shutil.copy(flow, copy)
    models.classifier(copy / "models")
    models.text(copy / "models")
    models.pictures(copy / "pictures")
    return copy


def picture(folder: Path, name: str) -> bytes:
    return (folder / "pictures" / name).read_bytes()


@EACH_FLOW
def test_examples_check_without_a_remark(flow: Path, folder: Path) -> None:
    """Nothing is said about an example: no error, no warning, no hint."""
    assert check(folder / flow.name) == []


@EACH_FLOW
def test_examples_are_laid_out_and_documented(flow: Path) -> None:
    """An example opens with its documentation, and the formatter leaves it as it is."""
    text = flow.read_text("utf-8")
    assert text.startswith("## ")
    assert format_program(parse(read_source(flow))) == text


def test_the_classifier_says_what_its_network_says(folder: Path) -> None:
    """Five labels, equal to OpenCV and ONNX Runtime doing the same by hand."""
    with load(folder / "classify.flow", device="cpu") as app:
        answer = app(picture(folder, "coffee.jpg"))
    pixels = cv2.imread(str(folder / "pictures/coffee.jpg"), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    levels = cv2.resize(pixels, (224, 224)).astype(np.float64)
    batch = np.ascontiguousarray(((levels - MEAN) / STD).transpose(2, 0, 1)[None], np.float32)
    session = onnxruntime.InferenceSession(folder / "models/classifier.onnx")
    logits = session.run(None, {"data": batch})[0][0]
    shares = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-shares)[:5]
    assert [label["index"] for label in answer] == best.tolist()
    assert [label["label"] for label in answer] == [f"class {index}" for index in best]
    np.testing.assert_allclose([label["score"] for label in answer], shares[best], rtol=1e-3)


def test_a_printed_line_is_read(folder: Path) -> None:
    """The line of the page is read letter for letter, at twice its size too."""
    line = cv2.imread(str(folder / "pictures/line.png"))
    assert line is not None
    larger = cv2.imencode(".png", cv2.resize(line, None, fx=2, fy=2))[1].tobytes()
    with load(folder / "read_line.flow", device="cpu") as app:
        answers = list(app.map([picture(folder, "line.png"), larger]))
    assert answers == ["Region-based segmentation"] * 2


def test_a_line_upside_down_is_known(folder: Path) -> None:
    """One line of print, turned half round, goes from `upright` to `upside down`."""
    with load(folder / "upright.flow", device="cpu") as app:
        upright = app(picture(folder, "line.png"))
        turned = app(picture(folder, "line_upside_down.png"))
    assert (upright["label"], turned["label"]) == ("upright", "upside down")
    assert min(upright["score"], turned["score"]) > 0.9


def test_the_command_writes_the_pictures(tmp_path: Path) -> None:
    """`models.py pictures DIR` writes photographs, a page of print, and a line both ways up."""
    command = [sys.executable, models.__file__, "pictures", str(tmp_path / "made")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    made = {Path(name).name: cv2.imread(name) for name in done.stdout.splitlines()}
    photographs = [made.pop(name) for name in ("cat.jpg", "coffee.jpg", "rocket.jpg")]
    assert all(p is not None and p.shape[2] == 3 and p.std() > 20 for p in photographs)
    page = made.pop("page.png")
    assert page is not None
    line, turned = made.pop("line.png"), made.pop("line_upside_down.png")
    assert line is not None
    assert turned is not None
    np.testing.assert_array_equal(line[::-1, ::-1], turned)
    np.testing.assert_array_equal(line, page[10:34, 4:294])
    assert not made
