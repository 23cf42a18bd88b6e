"""Turns the bytes of a picture file into the size it has once it stands upright.

Layer 3, pure Python. Cameras store the pixels as the sensor lay and note the turn in a tag
(Exif 2.32, 4.6.4 A; TIFF 6.0, page 36); decoders undo it. It reads that tag and no pixels. Where a
file says it twice or wrongly, this follows OpenCV, the reference decoder.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from struct import unpack_from

from flowlang.diagnostics import BadRequest
from flowlang.runtime.picture import MAX_STEPS, UnreadablePicture, read_picture

ORIENTATION = 0x0112
# Values 5 to 8: the first row of the file is a side of the picture, so the sides change places.
LYING = frozenset(range(5, 9))


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width that `decode` gives of a picture file. Raises BadRequest."""
    try:
        picture = read_picture(data)
    except UnreadablePicture as error:
        raise BadRequest(str(error)) from None
    if is_lying(data, picture.format):
        return picture.width, picture.height
    return picture.height, picture.width


def is_lying(data: bytes, form: str) -> bool:
    """Whether a picture of this format is stored on its side."""
    find = _BLOCKS.get(form)
    if find is None:
        return False
    try:
        block = find(data)
    except (struct.error, IndexError):
        return False
    return block is not None and _orientation(block, is_file=form == "tiff") in LYING


def _find_in_jpeg(data: bytes) -> bytes | None:
    """The first Exif segment before the pixels."""
    at = 2
    for _ in range(MAX_STEPS):
        prefix, marker, size = unpack_from(">BBH", data, at)
        if prefix != 0xFF or marker in (0, 0xFF):
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        elif marker in (0xDA, 0xD9):
            return None
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 10 : at + 2 + size]
        else:
            at += 2 + size
    return None


def _find_in_png(data: bytes) -> bytes | None:
    at = 8
    for _ in range(MAX_STEPS):
        size, kind = unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            return data[at + 8 : at + 8 + size]
        if kind == b"IEND":
            return None
        at += 12 + size
    return None


def _find_in_webp(data: bytes) -> bytes | None:
    at = 12
    for _ in range(MAX_STEPS):
        kind, size = unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            return data[at + 8 : at + 8 + size]
        at += 8 + size + (size & 1)
    return None


_BLOCKS: Mapping[str, Callable[[bytes], bytes | None]] = {
    "jpeg": _find_in_jpeg,
    "png": _find_in_png,
    "webp": _find_in_webp,
    "tiff": lambda data: data,
}
# Tags whose value lies elsewhere in an Exif block: OpenCV gives the block up where it does not.
_TEXTS = frozenset((0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298))
_FRACTIONS = {0x011A: 8, 0x011B: 8, 0x013E: 16, 0x013F: 48, 0x0211: 24, 0x0214: 48}
_WIDTHS = {1: "B", 3: "H", 4: "I"}  # of a field's value, by its type (TIFF 6.0, page 15)


def _orientation(block: bytes, is_file: bool) -> int:
    """The value of the first orientation tag of a TIFF structure's first directory; 1 without.

    The structure is a TIFF file, or the Exif block of another.
    """
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        mark, at = unpack_from(order + "HI", block, 2)
        return _read_directory(block, order, at, is_file) if mark == 42 else 1
    except struct.error:
        return 1


def _read_directory(block: bytes, order: str, at: int, is_file: bool) -> int:
    (count,) = unpack_from(order + "H", block, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = unpack_from(order + "HH", block, entry)
        if tag == ORIENTATION:
            width = _WIDTHS.get(kind, "") if is_file else "H"
            return int(unpack_from(order + width, block, entry + 8)[0]) if width else 1
        if not is_file and _reaches_out(block, order, tag, entry):
            return 1
    return 1


def _reaches_out(block: bytes, order: str, tag: int, entry: int) -> bool:
    if tag not in _TEXTS and tag not in _FRACTIONS:
        return False
    size, value = unpack_from(order + "II", block, entry + 4)
    if tag in _TEXTS:
        return bool(size > 4 and value + size > len(block))
    return bool(value + _FRACTIONS[tag] > len(block))
