"""Turns the bytes of a picture file into what the file says of itself, before it is decoded.

Layer 3, pure Python. It reads headers and block lengths, never pixels, so that a picture
too large, cut short or not a picture at all costs microseconds instead of a decoder's memory.
It knows nothing of who decodes the picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from struct import unpack_from

Buffer = bytes | bytearray | memoryview

# Segments, chunks, blocks or strips walked before a file is refused: a thousand times what
# cameras write, and 30 ms at worst for a file made to keep the walk going.
MAX_STEPS = 100_000


class UnreadablePicture(ValueError):
    """The bytes are no picture, or their header cannot be read; the message says which."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture file declares: pixels as stored, before any EXIF turn.

    `is_complete` is False where the file ends before the last pixel of its first image; a file
    damaged in its middle still counts as complete. `channels` counts the components of a pixel,
    None where pixels are indices into a palette. `tile_pixels` are those of all its tiles, which a
    decoder makes whole however little of them is shown; 0 where there are none. `exif` is where the
    first EXIF block lies that a decoder takes for one; a TIFF is one itself.
    """

    format: str  # "jpeg" "png" "webp" "gif" "bmp" "tiff" "jpeg2000" "pnm"
    width: int
    height: int
    is_complete: bool
    channels: int | None
    stores_rgb: bool = False  # a JPEG without the usual YCbCr, which hardware decoders take for it
    tile_pixels: int = 0
    exif: slice | None = field(default=None, compare=False)


def read_picture(data: Buffer) -> Picture:
    """Read the header of a picture and whether its pixels are all there.

    Raises UnreadablePicture, and nothing else, whatever the bytes are.
    """
    if isinstance(data, memoryview) and not (data.c_contiguous and data.format == "B"):
        data = data.tobytes()
    name, read = _recognise(bytes(data[:16]))
    try:
        picture = read(data)
    except (struct.error, IndexError, OverflowError):
        raise UnreadablePicture(f"a {name} cut inside its header") from None
    if picture.width <= 0 or picture.height <= 0:
        raise UnreadablePicture(f"a {name} of {picture.width}x{picture.height} pixels")
    return picture


def plain_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width, as stored, of an everyday JPEG: whole, 8 bits, YCbCr or gray, of at most
    `max_pixels`.

    A quarter of the cost of `read_picture`, for the many. None says nothing: ask `read_picture`.
    """
    if data[:3] != b"\xff\xd8\xff" or data[-2:] != b"\xff\xd9":
        return None
    at = 2
    try:
        for _ in range(24):
            marker = data[at + 1]
            if data[at] != 0xFF:
                return None
            if marker == 0xC0 or marker == 0xC2:
                break
            if marker not in _BEFORE_FRAME:
                return None
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        else:
            return None
        bits, height, width, channels, first = _FRAME(data, at + 4)
    except (IndexError, struct.error):
        return None
    if bits != 8 or (channels != 3 and channels != 1) or first == 0x52:
        return None
    # At least two bits a block, the blocks counted generously: fewer and `read_picture` decides.
    blocks = channels * ((width + 31) >> 3) * ((height + 31) >> 3)
    if 0 < width * height <= max_pixels and (len(data) - at) * 4 >= blocks:
        return height, width
    return None


def _recognise(start: bytes) -> tuple[str, Callable[[Buffer], Picture]]:
    """The name of the format that begins so, and the function that reads it."""
    if start[:3] == b"\xff\xd8\xff":
        return "JPEG", _read_jpeg
    for name, pattern, read in _SIGNATURES:
        if pattern.match(start):
            return name, read
    if not start:
        raise UnreadablePicture("empty")
    if start[4:8] == b"ftyp":
        kind = start[8:12].decode("ascii", "replace")
        raise UnreadablePicture(f"a HEIF or AVIF picture ({kind!r}), which is not read")
    raise UnreadablePicture(f"not a picture: starts with {start!r}")


_EOI, _SOS, _EXIF, _ADOBE = 0xD9, 0xDA, 0xE1, 0xEE  # T.81 table B.1; Adobe Technical Note 5116
# Application segments but Adobe's, tables, restart interval, comment
_BEFORE_FRAME = frozenset((*range(0xE0, 0xEE), 0xEF, 0xDB, 0xC4, 0xDD, 0xFE))
_FRAME = struct.Struct(">BHHBB").unpack_from
_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD9)))  # those without a length after them
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HIERARCHICAL = frozenset((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF))
_PROGRESSIVE = 0xC2  # in Huffman codes


def _read_jpeg(data: Buffer) -> Picture:
    """Walk the segments to the first scan. A thumbnail's own markers lie inside a segment."""
    at, frame_at, is_rgb, exif = 2, 0, False, None
    for _ in range(MAX_STEPS):
        prefix, marker, size = unpack_from(">BBH", data, at)
        if prefix != 0xFF or marker == 0xFF or marker == 0:
            at += 1  # fill, or stray bytes, which decoders skip too
        elif marker in _BARE_MARKERS:
            at += 2
        elif marker == _EOI:
            raise UnreadablePicture("a JPEG that ends before its pixels")
        else:
            if marker == _ADOBE and size >= 14 and data[at + 4 : at + 9] == b"Adobe":
                is_rgb = data[at + 15] == 0
            if marker == _EXIF and exif is None and data[at + 4 : at + 10] == b"Exif\0\0":
                exif = slice(at + 10, at + 2 + size)
            if marker in _FRAMES:
                if frame_at:
                    raise UnreadablePicture("a JPEG with two frame headers")
                frame_at = at
            at += 2 + size
            if marker == _SOS:
                return _read_frame(data, frame_at, at, is_rgb, exif)
    raise UnreadablePicture(f"a JPEG with over {MAX_STEPS} segments before its pixels")


def _read_frame(data: Buffer, at: int, scan_at: int, is_rgb: bool, exif: slice | None) -> Picture:
    """The picture of the frame header at `at`, whose first scan's bits start at `scan_at`."""
    if not at:
        raise UnreadablePicture("a JPEG whose pixels come before its frame header")
    marker, size, bits, height, width, channels = unpack_from(">xBHBHHB", data, at)
    if marker in _HIERARCHICAL:
        raise UnreadablePicture("a hierarchical JPEG, which no decoder here reads")
    if bits != 8:
        raise UnreadablePicture(f"a JPEG of {bits}-bit samples, where 8 bits are read")
    if size != 8 + 3 * channels or not channels:
        raise UnreadablePicture("a JPEG with a damaged frame header")
    least = 0
    if marker < 0xC8:  # Huffman codes: at least one bit for each code
        codes = 1 if marker == _PROGRESSIVE else 2
        least = codes * _count_blocks(data, at + 10, channels, width, height) // 8
    end = _find_last_eoi(data, scan_at)
    stores_rgb = channels == 3 and (is_rgb or bytes(data[at + 10 : at + 19 : 3]) == b"RGB")
    is_complete = end - scan_at >= least
    return Picture("jpeg", width, height, is_complete, channels, stores_rgb, exif=exif)


def _count_blocks(data: Buffer, at: int, channels: int, width: int, height: int) -> int:
    """8x8 blocks of all components. A header may claim more than the file's bits can fill."""
    factors = [(s >> 4, s & 15) for s in bytes(data[at + 1 : at + 3 * channels : 3])]
    if not all(1 <= across <= 4 and 1 <= down <= 4 for across, down in factors):
        raise UnreadablePicture("a JPEG with damaged sampling factors")
    most_across = 8 * max(across for across, _ in factors)
    most_down = 8 * max(down for _, down in factors)
    return sum(
        -(-width * across // most_across) * -(-height * down // most_down)
        for across, down in factors
    )


def _find_last_eoi(data: Buffer, start: int) -> int:
    """Where the last end-of-image marker at or after `start` is; -1 where there is none.

    Scans stuff a zero after every 0xFF of theirs, so 0xFFD9 after the first scan began is real;
    searched from the end, as what follows it is seldom more than padding.
    """
    if data[-2:] == b"\xff\xd9":
        return len(data) - 2 if len(data) - 2 >= start else -1
    return (bytes(data) if isinstance(data, memoryview) else data).rfind(b"\xff\xd9", start)


_PNG_CHANNELS = {0: 1, 2: 3, 3: None, 4: 2, 6: 4}


def _read_png(data: Buffer) -> Picture:
    size, kind, width, height, depth, colour = unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or size != 13:
        raise UnreadablePicture("a PNG whose first chunk is not its header")
    if colour not in _PNG_CHANNELS or depth not in (1, 2, 4, 8, 16):
        raise UnreadablePicture(f"a PNG of unknown colour type {colour} at {depth} bits")
    channels = _PNG_CHANNELS[colour]
    packed, exif = _walk_png(data)
    # Deflate makes at most 1032 bytes of one, so a small file cannot fill a large claim.
    filled = width * height * depth * (channels or 1) // 8 <= 1032 * packed
    return Picture("png", width, height, packed >= 0 and filled, channels, exif=exif)


def _walk_png(data: Buffer) -> tuple[int, slice | None]:
    """Bytes of compressed pixels up to the end chunk, -1 where the file ends before it; and where
    the first EXIF block with the right sum lies.
    """
    at, packed, exif = 8, 0, None
    for _ in range(MAX_STEPS):
        if at + 12 > len(data):
            return -1, exif
        size, kind = unpack_from(">I4s", data, at)
        content = slice(at + 8, at + 8 + size)
        at += 12 + size
        if kind == b"IDAT":
            packed += size
        elif kind == b"IEND":
            return (packed if at <= len(data) else -1), exif
        elif kind == b"eXIf" and exif is None and at <= len(data):
            (sum_,) = unpack_from(">I", data, at - 4)
            if zlib.crc32(data[content.start - 4 : content.stop]) == sum_:
                exif = content
    raise UnreadablePicture(f"a PNG of over {MAX_STEPS} chunks")


def _read_webp(data: Buffer) -> Picture:
    """One VP8 or VP8L chunk, or a VP8X chunk that tells of those after it."""
    riff_size, kind, size = unpack_from("<4xI4x4sI", data, 0)
    end = 8 + riff_size
    is_complete = end <= len(data) and 20 + size <= end
    if kind == b"VP8 ":
        mark, width, height = unpack_from("<3x3sHH", data, 20)
        if mark != b"\x9d\x01\x2a":
            raise UnreadablePicture("a WebP whose first frame is not a key frame")
        return Picture("webp", width & 0x3FFF, height & 0x3FFF, is_complete, 3)
    if kind == b"VP8L":
        mark, sizes = unpack_from("<BI", data, 20)
        if mark != 0x2F:
            raise UnreadablePicture("a WebP with a damaged lossless header")
        width, height = (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1
        return Picture("webp", width, height, is_complete, 4 if sizes >> 28 & 1 else 3)
    if kind != b"VP8X":
        raise UnreadablePicture(f"a WebP that starts with a chunk named {kind!r}")
    flags, wide, high = unpack_from("<B3x3s3s", data, 20)
    width, height = int.from_bytes(wide, "little") + 1, int.from_bytes(high, "little") + 1
    first = 20 + size + (size & 1)
    is_complete = is_complete and _find_webp_chunk(data, first, end, _WEBP_FRAMES) is not None
    exif = _find_webp_chunk(data, first, min(end, len(data)), (b"EXIF",)) if flags & 8 else None
    channels = 4 if flags & 0x10 else 3
    return Picture("webp", width, height, is_complete, channels, exif=exif)


_WEBP_FRAMES = (b"VP8 ", b"VP8L", b"ANMF")


def _find_webp_chunk(data: Buffer, at: int, end: int, kinds: tuple[bytes, ...]) -> slice | None:
    """The content of the first chunk of such a kind from `at`, where it ends at `end` or before."""
    for _ in range(MAX_STEPS):
        if at + 8 > end:
            return None
        kind, size = unpack_from("<4sI", data, at)
        at += 8 + size
        if kind in kinds:
            return slice(at - size, at) if at <= end else None
        at += size & 1
    raise UnreadablePicture(f"a WebP of over {MAX_STEPS} chunks")


_LONG_GIF = f"a GIF of over {MAX_STEPS} blocks up to the end of its first image"


def _read_gif(data: Buffer) -> Picture:
    """The size is the screen's, on which every image is drawn."""
    width, height, flags = unpack_from("<HHB", data, 6)
    try:
        is_complete = _has_gif_image(data, 13 + _count_palette_bytes(flags))
    except IndexError:
        is_complete = False
    return Picture("gif", width, height, is_complete, None)


def _count_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _has_gif_image(data: Buffer, at: int) -> bool:
    """Whether the first image ends; files that lack only the trailer, or later images, exist."""
    steps = iter(range(MAX_STEPS))
    for _ in steps:
        if data[at] == 0x2C:  # an image: its place, palette and code size, then sub-blocks
            _skip_sub_blocks(data, at + 11 + _count_palette_bytes(data[at + 9]), steps)
            return True
        if data[at] == 0x3B:
            raise UnreadablePicture("a GIF without an image")
        if data[at] != 0x21:
            raise UnreadablePicture(f"a GIF with a damaged block at byte {at}")
        at = _skip_sub_blocks(data, at + 2, steps)  # an extension: a label, then sub-blocks
    raise UnreadablePicture(_LONG_GIF)


def _skip_sub_blocks(data: Buffer, at: int, steps: Iterator[int]) -> int:
    """Past the sub-blocks that start at `at`, each its length and so many bytes, and a zero."""
    for _ in steps:
        size = data[at]
        at += 1 + size
        if not size:
            return at
    raise UnreadablePicture(_LONG_GIF)


def _read_bmp(data: Buffer) -> Picture:
    pixels_at, header_size = unpack_from("<II", data, 10)
    packing = packed = 0
    if header_size == 12:
        width, height, bits = unpack_from("<HH2xH", data, 18)
    elif 40 <= header_size <= 124:
        width, height, bits, packing, packed = unpack_from("<ii2xHII", data, 18)
    else:
        raise UnreadablePicture(f"a BMP with a header of {header_size} bytes")
    if bits not in (1, 2, 4, 8, 16, 24, 32) or packing not in (0, 1, 2, 3, 6):
        raise UnreadablePicture(f"a BMP of {bits} bits a pixel in packing {packing}")
    height = abs(height)  # negative where the rows run from the top
    if packing in (1, 2):
        is_complete = pixels_at + packed <= len(data) if packed else data[-2:] == b"\0\1"
    else:
        is_complete = pixels_at + (width * bits + 31) // 32 * 4 * height <= len(data)
    channels = None if bits <= 8 else 4 if bits == 32 else 3
    return Picture("bmp", width, height, is_complete, channels)


_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_SIZES, _PLANES = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 322, 323, 324, 325
_YCBCR = 6


class _Directory:
    """The first directory of a TIFF: arrays of whole numbers by tag, read when asked for."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._order = "<" if data[0] == 0x49 else ">"
        version, at = unpack_from(self._order + "HI", data, 2)
        if version != 42:
            raise UnreadablePicture("a BigTIFF, which is not read")
        (count,) = unpack_from(self._order + "H", data, at)
        at += 2
        if at + 12 * count > len(data):
            raise IndexError
        entries = struct.iter_unpack(self._order + "HHI4x", memoryview(data)[at : at + 12 * count])
        self._entries = {
            tag: (kind, size, at + 12 * index + 8)
            for index, (tag, kind, size) in enumerate(entries)
        }
        if len(self._entries) < count:  # some decoders take the first, some the last
            raise UnreadablePicture("a TIFF that has a tag twice")

    def all(self, tag: int) -> tuple[int, ...]:
        """The numbers of a tag; none where it is absent."""
        kind, count, at = self._entries.get(tag, (3, 0, 0))
        letter = {1: "B", 3: "H", 4: "I"}.get(kind)
        if letter is None:  # some decoders take other types too, and some pass over the tag
            raise UnreadablePicture(f"a TIFF whose tag {tag} is of type {kind}")
        if count > MAX_STEPS:
            raise UnreadablePicture(f"a TIFF of over {MAX_STEPS} strips")
        layout = f"{self._order}{count}{letter}"
        if struct.calcsize(layout) > 4:
            (at,) = unpack_from(self._order + "I", self._data, at)
        return unpack_from(layout, self._data, at)

    def one(self, tag: int, otherwise: int) -> int:
        """The number of a tag, or `otherwise` where it is absent."""
        numbers = self.all(tag) or (otherwise,)
        if len(set(numbers)) > 1:  # bits of each component, elsewhere one number by definition
            raise UnreadablePicture(f"a TIFF whose tag {tag} has several values")
        return numbers[0]


def _read_tiff(data: Buffer) -> Picture:
    directory = _Directory(data)
    width, height = directory.one(_WIDTH, 0), directory.one(_HEIGHT, 0)
    channels = directory.one(_SAMPLES, 1)
    across, down = directory.one(_TILE_WIDTH, 0), directory.one(_TILE_HEIGHT, 0)
    tiles = -(-width // across) * -(-height // down) if across and down else 0
    is_complete = _has_strips(data, directory, width, height, channels, tiles)
    pixels = tiles * across * down
    return Picture("tiff", width, height, is_complete, channels, tile_pixels=pixels)


def _has_strips(
    data: Buffer,
    directory: _Directory,
    width: int,
    height: int,
    channels: int,
    tiles: int,
) -> bool:
    """Whether the strips or tiles are as many as the size asks for, and lie in the file."""
    if tiles:
        starts, sizes = directory.all(_TILES), directory.all(_TILE_SIZES)
        needed = tiles
    else:
        starts, sizes = directory.all(_STRIPS), directory.all(_STRIP_SIZES)
        needed = -(-height // (directory.one(_STRIP_ROWS, 0) or height or 1))
    if directory.one(_PLANES, 1) == 2:
        needed *= channels
    if not starts or not sizes:
        raise UnreadablePicture("a TIFF that does not say where its pixels are")
    if len(starts) < needed or len(sizes) < needed:
        return False
    if any(start + size > len(data) for start, size in zip(starts, sizes, strict=False)):
        return False
    is_raw = directory.one(_COMPRESSION, 1) == 1 and directory.one(_PHOTOMETRIC, 0) != _YCBCR
    raw_bytes = width * height * channels * directory.one(_BITS, 1) // 8
    return not is_raw or sum(sizes) >= raw_bytes


_CODESTREAM = b"\xff\x4f\xff\x51"


def _read_jpeg2000(data: Buffer) -> Picture:
    at = 0 if data[:4] == _CODESTREAM else _find_codestream(data)
    mark, right, bottom, left, top = unpack_from(">4s4xIIII", data, at)
    (channels,) = unpack_from(">H", data, at + 40)
    if mark != _CODESTREAM:
        raise UnreadablePicture("a JPEG 2000 without a codestream header")
    width, height = max(0, right - left), max(0, bottom - top)
    return Picture("jpeg2000", width, height, _has_tile_parts(data, at + 2), channels)


def _find_codestream(data: Buffer) -> int:
    """Walk the boxes of a JP2 file to the one that holds the codestream."""
    at = 0
    for _ in range(MAX_STEPS):
        size, kind = unpack_from(">I4s", data, at)
        if kind == b"jp2c":
            return at + (16 if size == 1 else 8)
        if size == 1:
            (size,) = unpack_from(">Q", data, at + 8)
        if size < 8:
            raise UnreadablePicture("a JPEG 2000 with a damaged box")
        at += size
    raise UnreadablePicture(f"a JPEG 2000 of over {MAX_STEPS} boxes")


def _has_tile_parts(data: Buffer, at: int) -> bool:
    """Walk the segments of the main header, then the tile parts, to the end of the codestream."""
    for _ in range(MAX_STEPS):
        if at + 2 > len(data):
            return False
        (marker,) = unpack_from(">H", data, at)
        if marker == 0xFFD9:
            return True
        if at + 10 > len(data):
            return False
        if marker == 0xFF90:  # a tile part, zero long where it runs to the end
            (size,) = unpack_from(">I", data, at + 6)
            if not size:
                return _find_last_eoi(data, at) >= 0
        else:
            size = 2 + unpack_from(">H", data, at + 2)[0]
        at += max(size, 2)
    raise UnreadablePicture(f"a JPEG 2000 of over {MAX_STEPS} tile parts")


# A comment that a lone return ends, or that touches a number, is another one to each decoder.
_GAP = rb"(?:\s|#[^\r\n]*\r?\n)"
_NEXT = rb"\s" + _GAP + rb"*(\d{1,9})"
_BITMAP_HEADER = re.compile(rb"P[14]" + _GAP + rb"+(\d{1,9})" + _NEXT + rb"\s")
_PIXMAP_HEADER = re.compile(rb"P[2356]" + _GAP + rb"+(\d{1,9})" + _NEXT + _NEXT + rb"\s")
_PNM_HEADER_BYTES = 4096
_ALL_DIGITS_ZERO = bytes(0x30 if 0x30 <= c <= 0x39 else 0x20 for c in range(256))


def _read_pnm(data: Buffer) -> Picture:
    kind = data[1] - 0x30
    pattern = _BITMAP_HEADER if kind in (1, 4) else _PIXMAP_HEADER
    header = pattern.match(data, 0, _PNM_HEADER_BYTES)
    if header is None:
        if len(data) < _PNM_HEADER_BYTES:
            raise IndexError
        raise UnreadablePicture("a PNM with a damaged header")
    width, height, *rest = (int(number) for number in header.groups())
    most = rest[0] if rest else 1
    # Decoders scale plain numbers to 0..255 but pass packed ones on as they are.
    if not (most in (255, 0xFFFF) if kind >= 5 else 1 <= most <= 0xFFFF):
        raise UnreadablePicture(f"a PNM of values up to {most}, where 255 or 65535 is read")
    channels = 3 if kind in (3, 6) else 1
    samples = width * height * channels
    if kind == 4:
        is_complete = len(data) - header.end() >= (width + 7) // 8 * height
    elif kind >= 5:
        is_complete = len(data) - header.end() >= samples * (1 if most < 256 else 2)
    else:
        is_complete = _count_numbers(bytes(data[header.end() :]), kind) >= samples
    return Picture("pnm", width, height, is_complete, channels)


def _count_numbers(text: bytes, kind: int) -> int:
    """Numbers of a plain PNM; each is followed by white space, so a last one without is cut."""
    if kind == 1:  # single digits, with or without space between them
        return text.count(b"0") + text.count(b"1")
    return text.translate(_ALL_DIGITS_ZERO).count(b"0 ")


_SIGNATURES: tuple[tuple[str, re.Pattern[bytes], Callable[[Buffer], Picture]], ...] = (
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), _read_png),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), _read_webp),
    ("GIF", re.compile(rb"GIF8[79]a"), _read_gif),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), _read_tiff),
    ("JPEG 2000", re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"), _read_jpeg2000),
    ("BMP", re.compile(rb"BM"), _read_bmp),
    ("PNM", re.compile(rb"P[1-6][\s#]"), _read_pnm),
)
