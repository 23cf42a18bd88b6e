"""Turns the photographs inside the scikit-image wheel into picture files for tests and benchmarks.

`good` gives files every decoder must read and what they must show, `bad` files every decoder must
refuse and a word of why, `photographs` many distinct JPEGs of one size. All are the same bytes on
every call and need no network.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import skimage
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]

WHEEL = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)

# How the stored pixels are got from the upright ones, for each EXIF orientation.
_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True, eq=False)
class GoodPicture:
    """A file, and the upright RGB pixels it must show: uint8, height x width x 3.

    `tolerance` is the largest mean difference of a decoder's pixels from `rgb`, in steps of 256;
    0.0 where the file keeps every pixel. `stored` is the (width, height) before any EXIF turn.
    Alpha is dropped, not blended: `rgb` holds the colours under it as they are stored.
    """

    data: bytes
    rgb: Pixels
    tolerance: float
    stored: tuple[int, int]
    format: str
    channels: int | None

    @property
    def size(self) -> tuple[int, int]:
        """Upright (width, height)."""
        return self.rgb.shape[1], self.rgb.shape[0]


@dataclass(frozen=True, slots=True)
class BadPicture:
    """Bytes to refuse, and a word that the reason given must contain."""

    data: bytes
    word: str


@cache
def photograph(name: str) -> Image.Image:
    """One picture file of the wheel, as RGB."""
    with Image.open(WHEEL / name) as opened:
        return opened.convert("RGB")


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """The file Pillow writes for an image."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def write_tiff(pixels: NDArray[np.generic], **options: Any) -> bytes:
    """The file tifffile writes for an array, in layouts that Pillow does not write."""
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, metadata=None, **options)
    return out.getvalue()


def blurred_noise(seed: int, height: int, width: int) -> bytes:
    """A JPEG that decodes to something else for every seed, and has no hard edges."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image)[1].tobytes()


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """An image stored so that its EXIF orientation turns it upright, and that EXIF block."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = _STORED[orientation]
    return (image if turn is None else image.transpose(turn)), exif


@cache
def good() -> Mapping[str, GoodPicture]:
    """Files of every kind a decoder must read, by name."""
    return MappingProxyType({**_jpegs(), **_pngs(), **_webps(), **_tiffs(), **_others()})


def _subject() -> Image.Image:
    """A photograph whose width, height and odd sizes would show any mix-up of the two."""
    return photograph("coffee.png").resize((121, 83), Image.Resampling.LANCZOS)


def _shades(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _keep(
    image: Image.Image, data: bytes, form: str, channels: int | None, tolerance: float = 0.0
) -> GoodPicture:
    """A file of an image that is stored upright."""
    return GoodPicture(data, _shades(image), tolerance, image.size, form, channels)


def _jpegs() -> dict[str, GoodPicture]:
    image, gray = _subject(), _subject().convert("L")
    soft, sharp = 4.5, 2.5  # with halved and with full chroma

    def jpeg(tolerance: float, **options: Any) -> GoodPicture:
        return _keep(image, encode(image, "JPEG", quality=95, **options), "jpeg", 3, tolerance)

    made = {
        "jpeg-420": jpeg(soft),
        "jpeg-422": jpeg(soft, subsampling="4:2:2"),
        "jpeg-444": jpeg(sharp, subsampling="4:4:4"),
        "jpeg-rgb": jpeg(sharp, keep_rgb=True),
        "jpeg-progressive": jpeg(soft, progressive=True),
        "jpeg-restarts": jpeg(soft, restart_marker_blocks=3),
        "jpeg-gray": _keep(gray, encode(gray, "JPEG", quality=95), "jpeg", 1, sharp),
        "jpeg-cmyk": _keep(
            image, encode(image.convert("CMYK"), "JPEG", quality=95), "jpeg", 4, sharp
        ),
        "jpeg-thumbnail": jpeg(soft, exif=_exif_with_thumbnail(image)),
    }
    for orientation in _STORED:
        stored, exif = turned(image, orientation)
        data = encode(stored, "JPEG", quality=95, exif=exif)
        made[f"jpeg-exif-{orientation}"] = GoodPicture(
            data, _shades(image), soft, stored.size, "jpeg", 3
        )
    data = made["jpeg-420"].data + b"\0" * 7 + b"bytes after the end"
    made["jpeg-trailing-bytes"] = _keep(image, data, "jpeg", 3, soft)
    return made


def _exif_with_thumbnail(image: Image.Image) -> bytes:
    """A 64 KB EXIF block holding a whole JPEG, its end-of-image marker included."""
    thumbnail = encode(image.resize((48, 32)), "JPEG")
    exif = Image.Exif()
    exif[0x927C] = thumbnail + bytes(65_000 - len(thumbnail))
    return exif.tobytes()


def _pngs() -> dict[str, GoodPicture]:
    image = _subject()
    width, height = image.size
    gray, two = image.convert("L"), image.convert("1")
    palette, deep = image.quantize(64), _shades(image).astype(np.uint16) * 257
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))
    rgba, gray_alpha = image.copy(), gray.copy()
    rgba.putalpha(alpha)
    gray_alpha.putalpha(alpha)
    one = image.resize((1, 1))
    stored, exif = turned(image, 6)
    deep_rgb = cv2.imencode(".png", np.ascontiguousarray(deep[:, :, ::-1]))[1].tobytes()
    return {
        "png-rgb": _keep(image, encode(image, "PNG"), "png", 3),
        "png-rgba": _keep(image, encode(rgba, "PNG"), "png", 4),
        "png-palette": _keep(palette, encode(palette, "PNG"), "png", None),
        "png-palette-transparent": _keep(
            palette, encode(palette, "PNG", transparency=3), "png", None
        ),
        "png-gray": _keep(gray, encode(gray, "PNG"), "png", 1),
        "png-gray-alpha": _keep(gray, encode(gray_alpha, "PNG"), "png", 2),
        "png-gray-16": _keep(
            gray,
            encode(Image.fromarray(np.asarray(gray, dtype=np.uint16) * 257), "PNG"),
            "png",
            1,
        ),
        "png-rgb-16": _keep(image, deep_rgb, "png", 3),
        "png-1-bit": _keep(two, encode(two, "PNG"), "png", 1),
        "png-1x1": _keep(one, encode(one, "PNG"), "png", 3),
        "png-exif-6": GoodPicture(
            encode(stored, "PNG", exif=exif), _shades(image), 0.0, stored.size, "png", 3
        ),
    }


def _webps() -> dict[str, GoodPicture]:
    image = _subject()
    rgba = image.convert("RGBA")
    rgba.putalpha(image.convert("L"))
    stored, exif = turned(image, 8)
    film = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    still = encode(image, "WEBP", lossless=True)
    return {
        "webp-lossy": _keep(image, encode(image, "WEBP", quality=95), "webp", 3, 4.5),
        "webp-lossless": _keep(image, still, "webp", 3),
        "webp-alpha": _keep(image, encode(rgba, "WEBP", lossless=True, exact=True), "webp", 4),
        "webp-alpha-lossy": _keep(
            image, encode(rgba, "WEBP", quality=95, exact=True), "webp", 4, 4.5
        ),
        "webp-exif-8": GoodPicture(
            encode(stored, "WEBP", lossless=True, exif=exif),
            _shades(image),
            0.0,
            stored.size,
            "webp",
            3,
        ),
        "webp-animated": _keep(
            image,
            encode(image, "WEBP", lossless=True, save_all=True, append_images=film),
            "webp",
            4,
        ),
    }


def _tiffs() -> dict[str, GoodPicture]:
    image = _subject()
    gray, two, palette = image.convert("L"), image.convert("1"), image.quantize(64)
    stored, exif = turned(image, 6)
    rgb = _shades(image)
    planes = np.ascontiguousarray(np.moveaxis(rgb, 2, 0))

    def tiff(shown: Image.Image, channels: int, data: bytes) -> GoodPicture:
        return _keep(shown, data, "tiff", channels)

    def layout(**options: Any) -> bytes:
        return write_tiff(rgb, photometric="rgb", **options)

    separate = write_tiff(planes, photometric="rgb", planarconfig="separate")
    return {
        "tiff-raw": tiff(image, 3, encode(image, "TIFF")),
        "tiff-lzw": tiff(image, 3, encode(image, "TIFF", compression="tiff_lzw")),
        "tiff-deflate": tiff(image, 3, encode(image, "TIFF", compression="tiff_adobe_deflate")),
        "tiff-gray": tiff(gray, 1, encode(gray, "TIFF")),
        "tiff-1-bit": tiff(two, 1, encode(two, "TIFF")),
        "tiff-fax": tiff(two, 1, encode(two, "TIFF", compression="group4")),
        "tiff-palette": tiff(palette, 1, encode(palette, "TIFF")),
        "tiff-big-endian": tiff(image, 3, layout(byteorder=">")),
        "tiff-strips": tiff(image, 3, layout(rowsperstrip=5)),
        "tiff-tiles": tiff(image, 3, layout(tile=(32, 32))),
        "tiff-planes": tiff(image, 3, separate),
        "tiff-pages": tiff(
            image, 3, encode(image, "TIFF", save_all=True, append_images=[image.rotate(90)])
        ),
        "tiff-turned": GoodPicture(
            encode(stored, "TIFF", tiffinfo={0x0112: exif[0x0112]}),
            rgb,
            0.0,
            stored.size,
            "tiff",
            3,
        ),
    }


def _others() -> dict[str, GoodPicture]:
    image = _subject()
    gray, two, palette = image.convert("L"), image.convert("1"), image.quantize(64)
    rgba = image.convert("RGBA")
    plain = b"P3\n121 83\n255\n" + " ".join(map(str, _shades(image).ravel())).encode() + b"\n"
    film = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).quantize(64)]
    upended = bytearray(encode(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    struct.pack_into("<i", upended, 22, -image.height)
    return {
        "bmp-24": _keep(image, encode(image, "BMP"), "bmp", 3),
        "bmp-32": _keep(image, encode(rgba, "BMP"), "bmp", 4),
        "bmp-palette": _keep(palette, encode(palette, "BMP"), "bmp", None),
        "bmp-1-bit": _keep(two, encode(two, "BMP"), "bmp", None),
        "bmp-from-the-top": _keep(image, bytes(upended), "bmp", 3),
        "bmp-runs": _keep(palette, _write_run_length_bmp(palette), "bmp", None),
        "gif": _keep(palette, encode(palette, "GIF"), "gif", None),
        "gif-animated": _keep(
            palette, encode(palette, "GIF", save_all=True, append_images=film), "gif", None
        ),
        "jpeg2000": _keep(image, encode(image, "JPEG2000"), "jpeg2000", 3),
        "jpeg2000-bare": _keep(image, encode(image, "JPEG2000", no_jp2=True), "jpeg2000", 3),
        "pnm-rgb": _keep(image, encode(image, "PPM"), "pnm", 3),
        "pnm-gray": _keep(gray, encode(gray, "PPM"), "pnm", 1),
        "pnm-1-bit": _keep(two, encode(two, "PPM"), "pnm", 1),
        "pnm-plain": _keep(image, plain, "pnm", 3),
    }


def _write_run_length_bmp(palette: Image.Image) -> bytes:
    """An 8-bit BMP of runs one pixel long, which Pillow reads but does not write."""
    rows = np.asarray(palette)[::-1]
    runs = b"".join(b"".join(b"\1%c" % value for value in row) + b"\0\0" for row in rows) + b"\0\1"
    shades = bytes(palette.getpalette() or []).ljust(768, b"\0")
    colours = b"".join(shades[i : i + 3][::-1] + b"\0" for i in range(0, 768, 3))
    start = 54 + len(colours)
    head = struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start)
    size = struct.pack("<IiiHHIIiiII", 40, *palette.size, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return head + size + colours + runs


@cache
def bad() -> Mapping[str, BadPicture]:
    """Files to refuse, by name."""
    jpeg, png = photographs(1)[0], encode(_subject(), "PNG")
    progressive = encode(photograph("rocket.jpg"), "JPEG", progressive=True)
    scan = jpeg.index(b"\xff\xda")
    noise = np.random.default_rng(7).bytes(5000)
    made = {
        "empty": BadPicture(b"", "empty"),
        "text": BadPicture(b"This is not the picture you are looking for.\n", "not a picture"),
        "noise": BadPicture(noise, "not a picture"),
        "zip": BadPicture(b"PK\x05\x06" + bytes(18), "not a picture"),
        "html": BadPicture(b"<!DOCTYPE html><title>404</title>", "not a picture"),
        "heic": BadPicture(b"\0\0\0\x18ftypheic" + bytes(400), "HEIF"),
        "jpeg-half": BadPicture(jpeg[: len(jpeg) // 2], "truncated"),
        "jpeg-nine-tenths": BadPicture(jpeg[: len(jpeg) * 9 // 10], "truncated"),
        "jpeg-progressive-nine-tenths": BadPicture(
            progressive[: len(progressive) * 9 // 10], "truncated"
        ),
        "jpeg-header-only": BadPicture(jpeg[:scan], "cut"),
        "jpeg-start-only": BadPicture(jpeg[:4], "cut"),
        "jpeg-0x0": BadPicture(_claim_jpeg(jpeg, 0, 0), "0x0"),
        "jpeg-30000x30000": BadPicture(_claim_jpeg(jpeg, 30000, 30000), "30000"),
        "jpeg-12-bit": BadPicture(
            jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "12"
        ),
        "png-half": BadPicture(png[: len(png) // 2], "truncated"),
        "png-30000x30000": BadPicture(_claim_png(png, 30000, 30000), "30000"),
        "png-0x0": BadPicture(_claim_png(png, 0, 0), "0x0"),
    }
    for name in ("webp-lossless", "tiff-raw", "bmp-24", "gif", "jpeg2000", "pnm-rgb", "pnm-plain"):
        whole = good()[name].data
        made[f"{name}-half"] = BadPicture(whole[: len(whole) // 2], "truncated")
    return MappingProxyType(made)


def _claim_jpeg(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    claimed = bytearray(data)
    struct.pack_into(">HH", claimed, data.index(b"\xff\xc0\x00\x11") + 5, height, width)
    return bytes(claimed)


def _claim_png(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size, its checksum made to agree."""
    claimed = bytearray(data)
    struct.pack_into(">II", claimed, 16, width, height)
    struct.pack_into(">I", claimed, 29, zlib.crc32(claimed[12:29]))
    return bytes(claimed)


def photographs(
    count: int, width: int = 500, height: int = 375, seed: int = 0, quality: int = 90
) -> list[bytes]:
    """Distinct baseline 4:2:0 JPEGs of one size, about 65 KB each at the sizes given here.

    Each is a random crop of the next photograph, scaled at random and mirrored one time in two.
    """
    random = np.random.default_rng(seed)
    names = [PHOTOGRAPHS[index % len(PHOTOGRAPHS)] for index in range(count)]
    return [encode(_crop(name, width, height, random), "JPEG", quality=quality) for name in names]


def _crop(name: str, width: int, height: int, random: np.random.Generator) -> Image.Image:
    image = _sharpened(name)
    fit = min(image.width / width, image.height / height)
    wide, high = (round(side * fit * random.uniform(0.7, 1.0)) for side in (width, height))
    left = int(random.integers(image.width - wide + 1))
    top = int(random.integers(image.height - high + 1))
    box = (left, top, left + wide, top + high)
    scaled = image.resize((width, height), Image.Resampling.BICUBIC, box)
    return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.integers(2) else scaled


@cache
def _sharpened(name: str) -> Image.Image:
    """A photograph sharpened as cameras do, so that its crops cost what camera files cost."""
    return photograph(name).filter(ImageFilter.UnsharpMask(1, 60, 0))
