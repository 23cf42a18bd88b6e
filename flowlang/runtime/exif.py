"""Turns the bytes of a picture file into the size it has once it stands upright.

Layer 3, pure Python. Cameras store the pixels as the sensor lay and note the turn in a tag
(Exif 2.32, 4.6.4 A; TIFF 6.0, page 36); decoders undo it. It reads that tag and no pixels. Where a
file says it twice or wrongly, this follows OpenCV, the reference decoder.
"""

from __future__ import annotations

import struct
from struct import unpack_from

from flowlang.diagnostics import BadRequest
from flowlang.runtime.picture import Picture, UnreadablePicture, read_picture

ORIENTATION = 0x0112
# Values 5 to 8: the first row of the file is a side of the picture, so the sides change places.
LYING = frozenset(range(5, 9))


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width that `decode` gives of a picture file. Raises BadRequest."""
    try:
        picture = read_picture(data)
    except UnreadablePicture as error:
        raise BadRequest(str(error)) from None
    if is_lying(data, picture):
        return picture.width, picture.height
    return picture.height, picture.width


def is_lying(data: bytes, picture: Picture) -> bool:
    """Whether a picture is stored on its side."""
    if picture.format == "tiff":
        return _orientation(data, is_file=True) in LYING
    if picture.exif is None:
        return False
    block = data[picture.exif]
    if picture.format == "png" and block[:4] not in (b"II*\0", b"MM\0*"):
        return False  # libpng does not hand it on
    return _orientation(block, is_file=False) in LYING


# Tags whose value lies elsewhere in an Exif block: OpenCV gives the block up where it does not.
_TEXTS = frozenset((0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x8298))
_FRACTIONS = {0x011A: 8, 0x011B: 8, 0x013E: 16, 0x013F: 48, 0x0211: 24, 0x0214: 48}
# The layout of a field's value, by its type (TIFF 6.0, page 15)
_LAYOUTS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}


def _orientation(block: bytes, is_file: bool) -> int:
    """The value of the first orientation tag of a TIFF structure's first directory; 1 without.

    The structure is a TIFF file, or the Exif block of another.
    """
    order = "<" if block[:2] == b"II" else ">"  # whatever else is there
    try:
        mark, at = unpack_from(order + "HI", block, 2)
        return _read_directory(block, order, at, is_file) if mark == 42 else 1
    except struct.error:
        return 1


def _read_directory(block: bytes, order: str, at: int, is_file: bool) -> int:
    (count,) = unpack_from(order + "H", block, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, size = unpack_from(order + "HHI", block, entry)
        if tag == ORIENTATION:
            layout = "H"
            if is_file:  # libtiff passes over a tag that is not one whole number
                layout = _LAYOUTS.get(kind, "") if size == 1 else ""
            return int(unpack_from(order + layout, block, entry + 8)[0]) if layout else 1
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
