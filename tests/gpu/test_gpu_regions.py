"""Regions on an NVIDIA GPU: what DALI makes of pictures, against the reference operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import pytest

from flowlang.runtime import dali
from flowlang.runtime.dali import Decoding, Region
from tests.gpu.place import CELL_LEVELS, CELLS, ON_GPU, Place, cells_on_host, decoded
from tests.pictures import good
from tests.regions import CHAINS, JPEG_LEVELS, Chain, decodable, in_dali, on_host, region_of

pytestmark = ON_GPU


@pytest.fixture(scope="module")
def references(place: Place, photos: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Photographs, and some of them in files that keep every pixel."""
    images = [decoded(data) for data in photos[:4]]
    images[1] = images[1][:251, :127]
    return photos[: dali.MOST], [cv2.imencode(".png", image)[1].tobytes() for image in images]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.text)
def test_every_operator_agrees_with_its_reference(
    place: Place, references: tuple[list[bytes], list[bytes]], chain: Chain
) -> None:
    """Results on the GPU are those of the reference operators, within the tolerances."""
    nodes = region_of(chain.text, place.models)
    region = Region(nodes, dali.MOST, 0, Decoding())
    try:
        for files, is_jpeg in zip(references, (True, False), strict=True):
            wanted = [on_host(nodes, data) for data in files]
            chain.check(in_dali(region, files), wanted, jpeg=is_jpeg)
    finally:
        region.close()


@pytest.fixture(scope="module")
def decoder(place: Place) -> Iterator[tuple[Region, list[Any]]]:
    nodes = region_of("decode -> rgb", place.models)
    region = Region(nodes, 8, 0, Decoding())
    yield region, nodes
    region.close()


@pytest.mark.parametrize("name", good())
def test_every_format_shows_the_same(decoder: tuple[Region, list[Any]], name: str) -> None:
    """What DALI is handed of a file, or of its bitmap, shows what OpenCV sees in the file."""
    region, nodes = decoder
    picture = good()[name]
    if name == "tiff-1-bit":
        pytest.skip("DALI refuses it, so an instance decodes it on the host: tested with instances")
    (got,) = in_dali(region, [decodable(picture.data)])
    wanted = on_host(nodes, picture.data)
    assert got.shape == wanted.shape
    apart = abs(got.astype(int) - wanted).max()
    assert apart <= (JPEG_LEVELS + 1 if picture.format == "jpeg" else 1), f"{name}: {apart} levels"


def test_every_format_goes_through_a_flow(place: Place, open_instance: Any) -> None:
    """Files of all formats together are answered, those the GPU cannot decode included."""
    instance = open_instance(CELLS.format(1))
    names = list(good())
    files = [good()[name].data for name in names]
    outcomes = [o for at in range(0, len(files), 32) for o in instance.run(files[at : at + 32])]
    failed = {}
    for name, outcome, wanted in zip(names, outcomes, cells_on_host(place, files), strict=True):
        if isinstance(outcome, Exception):
            failed[name] = str(outcome)
        elif abs(outcome - wanted).max() > CELL_LEVELS + 1:
            failed[name] = f"{abs(outcome - wanted).max():.1f} levels"
    assert not failed
