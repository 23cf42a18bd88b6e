"""The models, engines, apps and pictures of the tests on a GPU.

Engines are built once a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from examples import models
from flowlang import App
from flowlang.runtime import cuda, dali
from flowlang.runtime.dali import Decodings
from flowlang.runtime.instances import Instances
from tests.engines import build_soon
from tests.gpu.place import Place, decoded
from tests.pictures import photographs
from tests.regions import gpu_plan, write_models


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The models and engines. How pictures are decoded best is measured once, not for each app."""
    reason = cuda.why_no_gpu()
    if reason:
        pytest.skip(reason)
    cuda.use(0)
    root = write_models(tmp_path_factory.mktemp("models"))
    models.resnet(root / "net.onnx", depth=18, width=8)
    models.mlp(root / "mlp.onnx", inputs=16, hidden=64, layers=2, outputs=5)
    models.identity(root / "four.onnx", (4, 6))
    models.two_heads(root / "heads.onnx", size=64)
    models.two_heads(root / "others.onnx", size=64, seed=1)
    models.two_inputs(root / "pair.onnx", size=64)
    measure, measured = dali.choose_decodings, {}

    def measure_once(device: int, *rest: Any) -> Decodings:
        if device not in measured:
            measured[device] = measure(device, *rest)
        return measured[device]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dali, "choose_decodings", measure_once)
        build_soon(patch)
        yield Place(root, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def open_app(place: Place) -> Iterator[Callable[..., App]]:
    """Loads flows on the GPU, and closes them again."""
    apps: list[App] = []

    def opener(text: str, **options: Any) -> App:
        apps.append(place.load(text, f"app{len(apps)}", **options))
        return apps[-1]

    yield opener
    for app in apps:
        app.close()


@pytest.fixture
def open_instance(place: Place) -> Iterator[Callable[[str], Any]]:
    """Makes warm instances of flows of one stage, whose batches a test puts together itself."""
    opened: list[Any] = []

    def opener(text: str) -> Any:
        plan = gpu_plan(text, place.models)
        (stage,) = plan.stages
        made = Instances(plan, place.engines)
        instance = made.make(stage, 0)
        opened.extend((instance, made))
        instance.warm()
        return instance

    yield opener
    for thing in opened:
        thing.close()


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    return photographs(32)


@pytest.fixture(scope="session")
def crops(photos: list[bytes]) -> list[bytes]:
    """256 pictures: crops of the photographs, of many sizes."""
    random = np.random.default_rng(3)
    whole = [decoded(data) for data in photos]
    made = []
    for index in range(256):
        image = whole[index % len(whole)]
        top, left = random.integers(0, 120, 2)
        height, width = random.integers(180, 250, 2)
        crop = image[top : top + height, left : left + width][:, :: int(random.choice((-1, 1)))]
        made.append(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
    return made
