"""Batches on an NVIDIA GPU: of every size, and with bad pictures in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flowlang import App
from flowlang.diagnostics import BadRequest
from tests.gpu.place import CELL_LEVELS, CELLS, ON_GPU, Place, cells_on_host
from tests.pictures import bad, good

pytestmark = ON_GPU


def test_every_batch_size_and_both_ways_to_enqueue(
    place: Place, open_instance: Any, photos: list[bytes]
) -> None:
    """Batches of 1 to 32 are right item by item, with CUDA graphs and without."""
    wanted = cells_on_host(place, photos)
    with_graphs = open_instance(CELLS.format(1))
    without = open_instance(CELLS.format(1).replace("1..32", "1..32, graphs=false"))
    for count in (*range(1, 21), 25, 31, 32, 3):
        order = [(index * 7 + count) % 32 for index in range(count)]
        batch = [photos[index] for index in order]
        one, other = with_graphs.run(batch), without.run(batch)
        assert len(one) == len(other) == count
        for index, a, b in zip(order, one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
            assert abs(a - wanted[index]).max() <= CELL_LEVELS


def damaged(name: str) -> bytes:
    """A file whole to its end, with bytes of its compressed pixels flipped."""
    data = bytearray(good()[name].data)
    at = len(data) // 2
    data[at : at + 40] = bytes(byte ^ 0xFF for byte in data[at : at + 40])
    return bytes(data)


def test_a_bad_picture_fails_alone(place: Place, open_instance: Any, photos: list[bytes]) -> None:
    """Of a batch in which one picture is bad only that one fails, told which operator and where.

    The last two look whole and fail in the decoder; all others are told by their headers.
    """
    instance = open_instance(CELLS.format(1))
    alone = [instance.run([data])[0] for data in photos[:7]]
    cases = {name: (picture.data, picture.word) for name, picture in bad().items()}
    cases |= {name: (damaged(name), "decoded") for name in ("png-rgb", "png-palette")}
    for number, (name, (data, word)) in enumerate(cases.items()):
        at = number % 8
        outcomes = instance.run([*photos[:at], data, *photos[at:7]])
        error = outcomes.pop(at)
        assert isinstance(error, BadRequest), name
        assert error.stage == "decode", name
        assert error.message.startswith("decode failed: "), name
        assert word.lower() in error.message.lower(), name
        assert str(error).endswith("test.flow:1:1)"), name
        for outcome, single in zip(outcomes, alone, strict=True):
            assert isinstance(outcome, np.ndarray), name
            assert abs(outcome - single).max() <= CELL_LEVELS, name


def test_one_bad_picture_of_a_full_batch_takes_nobody_along(
    place: Place, open_instance: Any, photos: list[bytes]
) -> None:
    """Nor the process, which DALI alone would: it refuses the header of the first of the two."""
    instance = open_instance(CELLS.format(1).replace("1..32", "1..56"))
    refused, broken = good()["tiff-1-bit"].data, damaged("png-rgb")
    alone = {data: instance.run([data])[0] for data in (*photos, refused)}
    for count in (56, 33, 28, 9, 56):
        for at in (0, count // 2, count - 1):
            given = [photos[(index + at) % len(photos)] for index in range(count)]
            given[at], given[at - 1] = refused, broken
            outcomes = instance.run(given)
            for data, outcome in zip(given, outcomes, strict=True):
                if data is broken:
                    assert isinstance(outcome, BadRequest)
                else:
                    assert abs(outcome - alone[data]).max() <= CELL_LEVELS


def test_several_bad_pictures_fail_alone(
    place: Place, open_instance: Any, photos: list[bytes]
) -> None:
    """A batch may hold several bad pictures of both kinds, or nothing else."""
    instance = open_instance(CELLS.format(1))
    broken = [damaged("png-rgb"), b"", damaged("png-palette"), photos[0][:-200]]
    assert [type(o) for o in instance.run(broken)] == [BadRequest] * 4
    mixed = [broken[0], photos[0], broken[1], photos[1], broken[2], photos[2], broken[3]]
    outcomes = instance.run(mixed)
    assert [isinstance(o, BadRequest) for o in outcomes] == [True, False] * 3 + [True]
    for outcome, wanted in zip(outcomes[1::2], cells_on_host(place, photos[:3]), strict=True):
        assert abs(outcome - wanted).max() <= CELL_LEVELS


def test_a_truncated_picture_that_is_allowed_outlives_a_bad_neighbour(
    open_instance: Any, photos: list[bytes]
) -> None:
    """What was made readable once stays so when its batch is done again without the bad one."""
    instance = open_instance(CELLS.format(1).replace("decode", "decode(truncated=allow)"))
    cut = photos[0][: len(photos[0]) // 2]
    (alone,) = instance.run([cut])
    outcomes = instance.run([photos[1], cut, damaged("png-rgb")])
    assert isinstance(outcomes[2], BadRequest)
    assert abs(outcomes[1] - alone).max() <= CELL_LEVELS


def test_a_picture_smaller_than_its_crop_fails_alone(
    place: Place, open_app: Callable[..., App], photos: list[bytes]
) -> None:
    """What DALI cannot crop is told as the reference operator tells it, and the rest answered."""
    app = open_app('decode -> crop(h=64, w=64) -> rgb -> trt("chw.onnx", batch=1..32) x1')
    small = good()["png-1x1"].data
    outcomes = list(app.map([photos[0], small, photos[1], small], errors="return"))
    for error in outcomes[1::2]:
        assert isinstance(error, BadRequest)
        assert error.stage == "crop"
        assert "an image of 1x1 has no centre of 64x64" in error.message
    assert all(isinstance(outcome, np.ndarray) for outcome in outcomes[::2])


def test_bad_pictures_among_the_requests_of_an_app(
    place: Place, open_app: Callable[..., App], photos: list[bytes]
) -> None:
    """Through the whole app, too, each bad picture is told to its own sender alone."""
    app = open_app(CELLS.format(2))
    whole = cells_on_host(place, photos)
    broken = [picture.data for picture in bad().values()]
    items = [(photos[i % 32], whole[i % 32]) for i in range(160)]
    mixed = [x for at, item in enumerate(items) for x in (item, (broken[at % len(broken)], None))]
    outcomes = list(app.map((data for data, _ in mixed), errors="return"))
    for outcome, (_, wanted) in zip(outcomes, mixed, strict=True):
        if wanted is None:
            assert isinstance(outcome, BadRequest)
        else:
            assert abs(outcome - wanted).max() <= CELL_LEVELS
