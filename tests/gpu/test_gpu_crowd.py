"""Many requests at once on an NVIDIA GPU: none gets another's answer, and no memory is lost."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from flowlang import App
from flowlang.runtime import cuda
from tests.gpu.place import CELL_LEVELS, CELLS, ON_GPU, Array, Place
from tests.regions import cells_of, on_host, region_of

pytestmark = ON_GPU

COUNT = 20_000


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many different pictures, each with the cells it must be answered with."""

    files: list[bytes]
    cells: Array


@pytest.fixture(scope="module")
def crowd(place: Place) -> Crowd:
    nodes = region_of(CELLS.format(1), place.models)[:-1]

    def draw(seed: int) -> tuple[bytes, Array]:
        patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        image = cv2.resize(patches, (250, 188), interpolation=cv2.INTER_CUBIC)
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        return data, cells_of(on_host(nodes, data))

    with ThreadPoolExecutor(12) as pool:
        drawn = list(pool.map(draw, range(COUNT), chunksize=1))
    return Crowd([data for data, _ in drawn], np.stack([cells for _, cells in drawn]))


@pytest.fixture(scope="module")
def crowd_app(place: Place) -> Iterator[App]:
    text = f"export flow f = {CELLS.format(4)}\nschedule {{ f(queue=1024) }}"
    with place.load(text, "crowd") as app:
        yield app


async def _answers(app: App, files: Sequence[bytes], outstanding: int) -> list[Any]:
    answers: list[Any] = [None] * len(files)
    numbers = iter(range(len(files)))

    async def client() -> None:
        for number in numbers:
            answers[number] = await app.acall(files[number])

    await asyncio.gather(*(client() for _ in range(outstanding)))
    return answers


def test_every_answer_is_that_of_its_own_picture(crowd: Crowd, crowd_app: App) -> None:
    """Of 20,000 different pictures through four lanes at once, each gets its own answer."""
    got = np.stack(asyncio.run(_answers(crowd_app, crowd.files, 256)))
    apart = abs(got - crowd.cells).max(1)
    # Others' answers are far away; but colours as strong as these differ more than photographs'.
    assert apart.max() <= 2 * CELL_LEVELS, f"{(apart > 2 * CELL_LEVELS).sum()} are of others"
    asked = np.random.default_rng(9).choice(COUNT, 2_000, replace=False)
    lengths = (crowd.cells**2).sum(1)
    nearest = (lengths[None] - 2 * got[asked] @ crowd.cells.T).argmin(1)
    np.testing.assert_array_equal(nearest, asked)


def test_memory_does_not_grow(crowd: Crowd, crowd_app: App) -> None:
    """After 5,000 requests that warm up, 15,000 more take neither host nor GPU memory."""

    def used() -> tuple[float, float]:
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20, -cuda.free_bytes() / 2**20

    for at in range(0, 5_000, 1_000):
        asyncio.run(_answers(crowd_app, crowd.files[at : at + 1_000], 256))
    before = used()
    for at in range(5_000, COUNT, 1_000):
        asyncio.run(_answers(crowd_app, crowd.files[at : at + 1_000], 256))
    host, gpu = (now - then for now, then in zip(used(), before, strict=True))
    assert host < 50, f"{host:.0f} MiB more"
    assert gpu < 50, f"{gpu:.0f} MiB more on the GPU"
