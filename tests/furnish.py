"""The ten programs of the language with everything they name: small models that really compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from examples import models

PROGRAMS = Path(__file__).parent / "programs"
KEYS = "".join(f"{chr(0x21 + i)}\n" for i in range(96))


def _network(size: int = 224) -> Callable[[Path], Path]:
    return lambda path: models.resnet(path, width=4, size=size)


def _detector(head: str, side: int) -> Callable[[Path], Path]:
    return lambda path: models.detector(path, head=head, side=side)


MODELS: dict[str, Callable[[Path], Path]] = {
    **{
        name: _network()
        for name in (
            *("resnet50.onnx", "scene.onnx", "nsfw.onnx", "clip.onnx", "large.onnx", "small.onnx"),
            *("breed.onnx", "resnet18.onnx", "fastervit_0.onnx", "models/resnet50.onnx"),
            *("models/vehicle.onnx", "models/person.onnx"),
        )
    },
    "rec.onnx": models.recogniser,
    "yolov8n.onnx": _detector("yolov8", 640),
    "yolox_tiny.onnx": _detector("yolox", 416),
    "common/vit.onnx": _network(256),
    "models/yolov8m.onnx": _detector("yolov8", 640),
    "models/plates.onnx": _detector("yolov8", 320),
    "models/crnn.onnx": lambda path: models.recogniser(path, height=48, width=320),
}
TEXTS = {
    "keys.txt": KEYS,
    "models/keys.txt": KEYS,
    "models/imagenet.txt": "".join(f"class {i}\n" for i in range(1000)),
}


def furnish(folder: Path) -> Path:
    """Write the programs, their models and their word lists into a folder."""
    shutil.copytree(PROGRAMS, folder, dirs_exist_ok=True)
    for name, write in MODELS.items():
        write(folder / name)
    for name, text in TEXTS.items():
        (folder / name).write_text(text, "utf-8")
    return folder
