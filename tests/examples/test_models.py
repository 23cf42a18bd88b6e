"""The example models: reproducible, valid, and able to tell photographs apart."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import skimage
from numpy.typing import NDArray

from examples import models

Floats = NDArray[np.float32]
Generator = Callable[[Path], Path]

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "ihc.png")
GENERATORS: dict[str, Generator] = {
    "resnet18": lambda path: models.resnet(path, width=8, size=64, classes=10),
    "resnet50": lambda path: models.resnet(path, depth=50, width=8, size=64, classes=10),
    "mlp": lambda path: models.mlp(path, inputs=8, hidden=32, layers=2, outputs=4),
    "identity": lambda path: models.identity(path, ("N", 3)),
    "two_heads": models.two_heads,
    "two_inputs": models.two_inputs,
}
EACH_GENERATOR = pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)


def run(path: Path, **inputs: Floats) -> dict[str, Floats]:
    """Run a model on the CPU and return its outputs by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def photographs(size: int) -> Floats:
    """Return the photographs as normalised RGB, float32 [6, 3, size, size]."""
    folder = Path(skimage.__file__).parent / "data"
    pixels = [cv2.imread(str(folder / name), cv2.IMREAD_COLOR_RGB) for name in PHOTOGRAPHS]
    resized = [cv2.resize(picture, (size, size)) for picture in pixels if picture is not None]
    scaled = np.stack(resized).astype(np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2), np.float32)


@EACH_GENERATOR
def test_the_same_arguments_give_the_same_bytes(generate: Generator, tmp_path: Path) -> None:
    """Two files made with the same arguments are equal byte for byte."""
    first, second = generate(tmp_path / "first.onnx"), generate(tmp_path / "second.onnx")
    assert first.read_bytes() == second.read_bytes()


@EACH_GENERATOR
def test_models_are_valid_onnx(generate: Generator, tmp_path: Path) -> None:
    """The ONNX checker accepts each model in full, at opset 17 and IR version 8."""
    model = onnx.load(generate(tmp_path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [entry.version for entry in model.opset_import]) == (8, [17])


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    """The seed reaches the weights: two seeds answer differently for one picture."""
    picture = photographs(64)[:1]
    answers = [
        run(models.resnet(tmp_path / f"{seed}.onnx", width=8, size=64, seed=seed), data=picture)
        for seed in (0, 1)
    ]
    assert not np.allclose(answers[0]["logits"], answers[1]["logits"], atol=0.1)


def test_a_file_made_with_the_same_arguments_is_kept(tmp_path: Path) -> None:
    """A second call leaves the file alone; other arguments replace it."""
    path = models.mlp(tmp_path / "mlp.onnx", inputs=4, hidden=8, layers=1, outputs=2)
    before = os.stat(path).st_ino
    models.mlp(path, inputs=4, hidden=8, layers=1, outputs=2)
    assert os.stat(path).st_ino == before
    models.mlp(path, inputs=4, hidden=8, layers=1, outputs=3)
    assert run(path, data=np.ones((1, 4), np.float32))["logits"].shape == (1, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlp.onnx"]


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_tells_photographs_apart(depth: int, tmp_path: Path) -> None:
    """Six photographs get at least four top classes, from logits spread by one to about three."""
    path = models.resnet(tmp_path / "resnet.onnx", depth=depth)
    logits = run(path, data=photographs(224))["logits"]
    assert logits.shape == (6, 1000)
    assert len(set(logits.argmax(axis=1).tolist())) >= 4
    assert 1 <= np.median(logits.std(axis=1)) <= 3.5


def test_a_resnet_scores_a_picture_alike_in_any_batch(tmp_path: Path) -> None:
    """A batch gives each picture the logits that it gets alone."""
    path = models.resnet(tmp_path / "resnet.onnx", width=8, size=64)
    pictures = photographs(64)
    alone = np.concatenate([run(path, data=picture[None])["logits"] for picture in pictures])
    np.testing.assert_allclose(run(path, data=pictures)["logits"], alone, atol=1e-4)


def test_resnet_names_and_batch_are_the_callers(tmp_path: Path) -> None:
    """Input name, output name and a fixed batch are those asked for."""
    path = models.resnet(
        tmp_path / "m.onnx", width=8, size=64, classes=7, batch=2, input_name="x", output_name="y"
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ports: list[Any] = [*session.get_inputs(), *session.get_outputs()]
    assert [(port.name, port.shape) for port in ports] == [("x", [2, 3, 64, 64]), ("y", [2, 7])]


def test_an_unknown_depth_is_refused(tmp_path: Path) -> None:
    """A depth without a block table is a ValueError, and no file appears."""
    with pytest.raises(ValueError, match="34"):
        models.resnet(tmp_path / "resnet.onnx", depth=34)
    assert not list(tmp_path.iterdir())


def test_small_models_answer_on_every_port(tmp_path: Path) -> None:
    """Several outputs come by name, every input has a say, and identity changes nothing."""
    pictures = photographs(64)
    heads = run(models.two_heads(tmp_path / "heads.onnx"), data=pictures)
    assert {name: array.shape for name, array in heads.items()} == {
        "scores": (6, 10),
        "embedding": (6, 16),
    }
    both = models.two_inputs(tmp_path / "inputs.onnx")
    zeros, ones = np.zeros((6, 8), np.float32), np.ones((6, 8), np.float32)
    scores = run(both, image=pictures, features=zeros)["scores"]
    assert scores.shape == (6, 10)
    assert not np.allclose(scores, run(both, image=pictures, features=ones)["scores"], atol=0.1)
    assert not np.allclose(scores, run(both, image=pictures[::-1], features=zeros)["scores"])
    same = run(models.identity(tmp_path / "same.onnx", ("N", 8)), data=ones)["result"]
    np.testing.assert_array_equal(same, ones)


def test_the_command_makes_the_classifier(tmp_path: Path) -> None:
    """`models.py classifier DIR` writes the network and one class name for each of its logits."""
    command = [sys.executable, models.__file__, "classifier", str(tmp_path / "made")]
    subprocess.run(command, check=True, capture_output=True)
    logits = run(tmp_path / "made" / "classifier.onnx", data=photographs(224)[:1])["logits"]
    names = (tmp_path / "made" / "classes.txt").read_text().splitlines()
    assert len(names) == len(set(names)) == logits.shape[1] == 1000


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="needs rapidocr")
def test_the_text_models_read_a_line(tmp_path: Path) -> None:
    """The copied models find a printed line upright, its rotation not, and the keys spell it."""
    models.text(tmp_path)
    page = cv2.imread(str(Path(skimage.__file__).parent / "data" / "page.png"))
    assert page is not None
    line = page[10:34, 4:294]

    turned = [text_input(line, 192), text_input(line[::-1, ::-1], 192)]
    (orientation,) = run(tmp_path / "text_orientation.onnx", x=np.concatenate(turned)).values()
    assert orientation.argmax(axis=1).tolist() == [0, 1]

    (chances,) = run(tmp_path / "text_recognition.onnx", x=text_input(line, 580)).values()
    keys = (tmp_path / "text_keys.txt").read_text(encoding="utf-8").splitlines()
    assert len(keys) + 1 == chances.shape[2]
    best = [0, *chances[0].argmax(axis=1).tolist()]
    kept = [now for last, now in pairwise(best) if now not in (0, last)]
    assert "".join(keys[number - 1] for number in kept) == "Region-based segmentation"


def text_input(line: NDArray[Any], width: int) -> Floats:
    """Return a BGR line as the text models take it: float32 [1, 3, 48, width] in -1 to 1."""
    scaled = cv2.resize(np.ascontiguousarray(line), (width, 48)).astype(np.float32)
    return np.ascontiguousarray((scaled / 127.5 - 1).transpose(2, 0, 1)[None])
