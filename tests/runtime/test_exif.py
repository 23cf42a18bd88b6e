"""What a file says of how it was held, against the size that OpenCV gives it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowlang.diagnostics import BadRequest
from flowlang.runtime.exif import upright_size
from flowlang.runtime.vision import silence
from tests.pictures import bad, encode, good

SUBJECT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))
JPEG, PNG = encode(SUBJECT, "JPEG"), encode(SUBJECT, "PNG")
HEADER = b"Exif\0\0"
# Tags of text, of fractions, of the rest, and the one that counts.
TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298, 0x011A, 0x011B, 0x013E, 0x013F, 0x0211,
        0x0214, 0x0213, 0x0128, 0x8769, 0x8825, 0x9999, 0x0112)  # fmt: skip

Entry = tuple[int, int, int, int]  # tag, type, count, value


def block(order: str, *entries: Entry) -> bytes:
    """A TIFF structure of one directory."""
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, kind, count, value in entries:
        form = "H2x" if kind == 3 else "I"
        out += struct.pack(order + "HHI" + form, tag, kind, count, value & 0xFFFF)
    return out + bytes(4)


def in_jpeg(*segments: bytes) -> bytes:
    """A JPEG with more APP1 segments."""
    made = b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments)
    return JPEG[:2] + made + JPEG[2:]


def in_png(kind: bytes, content: bytes, at: int = 33) -> bytes:
    """A PNG with one more chunk."""
    check = zlib.crc32(kind + content)
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
    return PNG[:at] + chunk + PNG[at:]


def with_wrong_sum(data: bytes) -> bytes:
    """A PNG whose first EXIF block does not have the sum that the file tells."""
    at = data.index(b"eXIf")
    (size,) = struct.unpack_from(">I", data, at - 4)
    return data[: at + 4 + size] + b"sum!" + data[at + 8 + size :]


def shown(data: bytes) -> tuple[int, int]:
    silence()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    height, width = image.shape[:2]
    return height, width


@pytest.mark.parametrize("name", good())
def test_a_good_file_has_the_size_it_is_shown_with(name: str) -> None:
    """In every format, the size is that of the upright picture."""
    assert upright_size(good()[name].data) == good()[name].rgb.shape[:2]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff", "tiff-big-endian"])
def test_all_orientations_of_all_formats(form: str, orientation: int) -> None:
    """5 to 8 exchange the sides, wherever a format keeps its EXIF block."""
    makers: dict[str, Callable[[], bytes]] = {
        "jpeg": lambda: in_jpeg(HEADER + block("<", (0x0112, 3, 1, orientation))),
        "png": lambda: in_png(b"eXIf", block(">", (0x0112, 3, 1, orientation))),
        "webp": lambda: encode(
            SUBJECT, "WEBP", lossless=True, exif=block("<", (0x0112, 3, 1, orientation))
        ),
        "tiff": lambda: encode(SUBJECT, "TIFF", tiffinfo={0x0112: orientation}),
        "tiff-big-endian": lambda: written(orientation, byteorder=">"),
    }
    data = makers[form]()
    assert upright_size(data) == shown(data)
    assert upright_size(data) == ((31, 20) if 5 <= orientation <= 8 else (20, 31))


def written(orientation: int, **options: Any) -> bytes:
    out = io.BytesIO()
    tags = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(
        out, np.asarray(SUBJECT), photometric="rgb", metadata=None, extratags=tags, **options
    )
    return out.getvalue()


TURN = HEADER + block("<", (0x0112, 3, 1, 6))
ODD = {
    "xmp first": in_jpeg(b"http://ns.adobe.com/xap/1.0/\0<x/>", TURN),
    "two blocks": in_jpeg(HEADER + block("<", (0x0112, 3, 1, 1)), TURN),
    "two tags": in_jpeg(HEADER + block("<", (0x0112, 3, 1, 1), (0x0112, 3, 1, 6))),
    "no header": in_jpeg(b"Other\0" + TURN[6:]),
    "cut short": in_jpeg(TURN[:-4]),
    "cut in the tag": in_jpeg(TURN[:-8]),
    "more tags promised": in_jpeg(TURN[:14] + b"\x09" + TURN[15:]),
    "orders mixed": in_jpeg(HEADER + b"IM" + TURN[8:]),
    "order of one letter": in_jpeg(HEADER + b"Mx" + block(">", (0x0112, 3, 1, 6))[2:]),
    "no order": in_jpeg(HEADER + b"\0\0" + block(">", (0x0112, 3, 1, 6))[2:]),
    "png without an order": in_png(b"eXIf", b"Mx" + block(">", (0x0112, 3, 1, 6))[2:]),
    "png with a wrong sum": with_wrong_sum(in_png(b"eXIf", TURN[6:])),
    "png with a second block": in_png(b"eXIf", block("<")).replace(
        PNG[33:], in_png(b"eXIf", TURN[6:])[33:]
    ),
    "png with a wrong sum and a second block": with_wrong_sum(
        in_png(b"eXIf", block("<")).replace(PNG[33:], in_png(b"eXIf", TURN[6:])[33:])
    ),
    "no mark": in_jpeg(HEADER + b"II\x2b\0" + TURN[10:]),
    "fill before": JPEG[:2] + b"\xff\xff" + in_jpeg(TURN)[2:],
    "png at the end": in_png(b"eXIf", TURN[6:], PNG.index(b"IEND") - 4),
    "png in a text": in_png(b"tEXt", b"Raw profile type exif\0\nexif\n 1\n" + TURN.hex().encode()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_opencv_reads_them(name: str) -> None:
    """Where a file says it twice, elsewhere or wrongly, what counts is what the decoder does."""
    assert upright_size(ODD[name]) == shown(ODD[name])


def tagged(*entry: int) -> bytes:
    """A TIFF whose orientation is such an entry: its type, its count and its value."""
    data = bytearray(written(1))
    at = data.index(struct.pack("<HHI", 274, 3, 1))
    data[at : at + 12] = block("<", (274, *entry))[10:22]  # type: ignore[arg-type]
    return bytes(data)


@pytest.mark.parametrize("count", [0, 1, 2, 256])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11])
def test_the_orientation_of_a_tiff_is_one_whole_number(kind: int, count: int) -> None:
    """libtiff passes over the tag where its type is another, or where it has several values."""
    data = tagged(kind, count, 6)
    assert upright_size(data) == shown(data)


def test_the_exif_block_of_a_webp_counts_where_the_header_tells_of_it() -> None:
    """A chunk that the flags leave out is passed over."""
    data = bytearray(encode(SUBJECT, "WEBP", lossless=True, exif=TURN[6:]))
    assert upright_size(bytes(data)) == shown(bytes(data)) == (31, 20)
    data[20] &= ~8
    assert upright_size(bytes(data)) == shown(bytes(data)) == (20, 31)


ENTRIES = st.tuples(
    st.sampled_from(TAGS), st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2, 4, 5, 20, 100]),
    st.sampled_from([0, 6, 8, 20, 30, 40, 70, 65535]),
)  # fmt: skip


@settings(max_examples=300)
@given(
    st.sampled_from("<>"), st.lists(ENTRIES, max_size=4), st.integers(0, 9),
    st.lists(ENTRIES, max_size=2), st.integers(0, 60),
)  # fmt: skip
def test_any_block_is_read_as_opencv_reads_it(
    order: str, before: Sequence[Entry], orientation: int, after: Sequence[Entry], cut: int
) -> None:
    """Whatever the tags, their order and what is cut off, the size is that of the pixels."""
    whole = block(order, *before, (0x0112, 3, 1, orientation), *after)
    data = in_jpeg(HEADER + whole[: max(0, len(whole) - cut)])
    assert upright_size(data) == shown(data)


@settings(max_examples=300)
@given(st.sampled_from(sorted(good())), st.data())
def test_damaged_files_raise_nothing_unforeseen(name: str, choice: st.DataObject) -> None:
    """Any bytes give a size or a BadRequest."""
    data = bytearray(good()[name].data)
    for _ in range(choice.draw(st.integers(1, 6))):
        data[choice.draw(st.integers(0, min(len(data), 400) - 1))] = choice.draw(
            st.integers(0, 255)
        )
    try:
        height, width = upright_size(bytes(data[: choice.draw(st.integers(1, len(data)))]))
    except BadRequest:
        return
    assert height > 0
    assert width > 0


def test_what_is_no_picture_is_a_bad_request() -> None:
    """The reason is that of the header's reader."""
    with pytest.raises(BadRequest, match="not a picture"):
        upright_size(bad()["text"].data)
