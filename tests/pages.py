"""Draws pages of text to read: what is written on them is known, and they need no network.

Their type is what Pillow and OpenCV carry, upright, bold, slanted and thin. `pages` gives the same
bytes on every call for the same versions of those two packages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tests.pictures import WHEEL, photograph

Pixels: TypeAlias = NDArray[np.uint8]
Shade: TypeAlias = tuple[int, int, int]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
PROSE = (
    "The harbour office opens at seven and closes when the",
    "last ferry has left. Tickets are sold at the counter,",
    "never on board; bicycles travel free of charge. Parcels",
    "heavier than 25 kg need a label, which costs 3.80 and is",
    "valid for one crossing. Between November and March the",
    "evening boat leaves at 18:45 instead of 20:15. Dogs are",
    "welcome on the upper deck, on a lead. Lost property is",
    "kept for ninety days in room 4, next to the lighthouse",
    "stairs. Questions? Write to the master of the port, or",
    "ring the bell twice. In heavy weather a red cone hangs",
    "from the mast: two cones mean that no boat will sail.",
    "Maps of the islands, tide tables and a list of the inns",
    "with vacant rooms lie on the table by the entrance.",
)


@dataclass(frozen=True, slots=True)
class Page:
    """A picture file, and the lines drawn on it from the top; none where others wrote them."""

    data: bytes
    lines: tuple[str, ...] = ()


Drawn: TypeAlias = tuple[Pixels, Sequence[str]]


def pages() -> Mapping[str, Page]:
    """Every page, by name."""
    return _pages()


@cache
def _pages() -> Mapping[str, Page]:
    made = {}
    for name, (draw, form, quality) in _DRAWERS.items():
        pixels, lines = draw()
        made[name] = Page(_encode(pixels, form, quality), tuple(lines))
    return MappingProxyType(made)


def _encode(pixels: Pixels, form: str, quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, quality=quality)
    return out.getvalue()


# Type. Places are of a line's left end and the middle of its height.


def _sheet(width: int, height: int, shade: Shade = WHITE) -> Pixels:
    return np.full((height, width, 3), shade, np.uint8)


def _set(
    sheet: Pixels,
    at: tuple[int, int],
    text: str,
    size: float,
    ink: Shade = BLACK,
    *,
    weight: int = 0,
) -> None:
    """Pillow's own face, its strokes thicker by `weight`."""
    image = Image.fromarray(sheet)
    face = ImageFont.load_default(size=size)
    ImageDraw.Draw(image).text(at, text, ink, face, anchor="lm", stroke_width=weight)
    sheet[:] = np.asarray(image)


def _write(
    sheet: Pixels,
    at: tuple[int, int],
    text: str,
    scale: float,
    ink: Shade = BLACK,
    *,
    face: int = cv2.FONT_HERSHEY_SIMPLEX,
) -> None:
    """One of OpenCV's own faces."""
    (_, height), _ = cv2.getTextSize(text, face, scale, 1)
    place = (at[0], at[1] + height // 2)
    cv2.putText(sheet, text, place, face, scale, ink, 1, cv2.LINE_AA)


def _label(text: str, scale: float, face: int, ink: Shade = BLACK, paper: Shade = WHITE) -> Pixels:
    """A line alone, on a strip of paper that just holds it."""
    (width, height), below = cv2.getTextSize(text, face, scale, 1)
    strip = _sheet(width + 24, height + below + 24, paper)
    _write(strip, (12, strip.shape[0] // 2), text, scale, ink, face=face)
    return strip


def _paste(sheet: Pixels, at: tuple[int, int], strip: Pixels) -> None:
    height, width = strip.shape[:2]
    sheet[at[1] : at[1] + height, at[0] : at[0] + width] = strip


def _column(
    sheet: Pixels,
    at: tuple[int, int],
    lines: Iterable[str],
    size: float,
    leading: int,
    **type_: Any,
) -> None:
    for number, line in enumerate(lines):
        _set(sheet, (at[0], at[1] + number * leading), line, size, **type_)


# What happens to a sheet


def _turn(sheet: Pixels, degrees: float, paper: Shade = WHITE) -> Pixels:
    """Turned about its middle, on a larger sheet that holds all of it."""
    height, width = sheet.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    cosine, sine = abs(matrix[0, 0]), abs(matrix[0, 1])
    to = (int(width * cosine + height * sine), int(width * sine + height * cosine))
    matrix[:, 2] += (to[0] - width) / 2, (to[1] - height) / 2
    turned = cv2.warpAffine(sheet, matrix, to, flags=cv2.INTER_CUBIC, borderValue=paper)
    return np.asarray(turned, np.uint8)


def _tilt(sheet: Pixels, corners: Sequence[tuple[float, float]], paper: Shade) -> Pixels:
    """As if photographed from the side: its corners moved to these shares of its sides."""
    height, width = sheet.shape[:2]
    sides = np.asarray([width, height], np.float32)
    start = np.asarray([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32) * sides
    matrix = cv2.getPerspectiveTransform(start, np.asarray(corners, np.float32) * sides)
    tilted = cv2.warpPerspective(
        sheet, matrix, (width, height), flags=cv2.INTER_CUBIC, borderValue=paper
    )
    return np.asarray(tilted, np.uint8)


def _shade(sheet: Pixels, least: float, noise: float, seed: int) -> Pixels:
    """Lit from one corner, and grainy."""
    height, width = sheet.shape[:2]
    light = np.linspace(1, least, width)[None, :] * np.linspace(1, least, height)[:, None]
    grain = np.random.default_rng(seed).normal(0, noise, sheet.shape)
    return np.clip(sheet * light[:, :, None] + grain, 0, 255).astype(np.uint8)


# Pages


def _article() -> Drawn:
    sheet = _sheet(900, 760)
    _set(sheet, (60, 70), "Notice to all passengers", 44, weight=1)
    _column(sheet, (60, 150), PROSE, 26, 44)
    return sheet, ("Notice to all passengers", *PROSE)


def _receipt() -> Drawn:
    items = (("2 x Oat bread", "7.40"), ("Butter 250 g", "2.95"), ("Coffee beans", "11.20"),
             ("Apples 1.4 kg", "4.06"), ("Bag", "0.15"), ("TOTAL EUR", "25.76"))  # fmt: skip
    sheet = _sheet(420, 620, (246, 244, 238))
    heads = ("CORNER SHOP", "12 Mill Lane", "Tel. 0473 815 2296")
    for number, head in enumerate(heads):
        _write(sheet, (90, 50 + number * 36), head, 0.7, (40, 40, 46))
    for number, (what, price) in enumerate(items):
        _write(sheet, (24, 200 + number * 48), what, 0.75, (40, 40, 46))
        _write(sheet, (320, 200 + number * 48), price, 0.75, (40, 40, 46))
    _write(sheet, (60, 560), "THANK YOU, COME AGAIN", 0.6, (40, 40, 46))
    lines = [part for item in items for part in item]
    return _shade(sheet, 0.9, 3, 1), (*heads, *lines, "THANK YOU, COME AGAIN")


def _two_columns() -> Drawn:
    sheet = _sheet(1400, 640)
    left, right = PROSE[:7], PROSE[6:]
    _column(sheet, (50, 60), left, 22, 40)
    _column(sheet, (740, 68), right, 22, 40)
    return sheet, [line for row in zip(left, right, strict=True) for line in row]


def _turned() -> Drawn:
    sheet = _sheet(820, 560)
    _column(sheet, (40, 50), PROSE[:11], 25, 46)
    return _turn(sheet, 3.5), PROSE[:11]


def _turned_back() -> Drawn:
    paper = (228, 236, 240)
    sheet = _sheet(900, 460, paper)
    for number, line in enumerate(PROSE[3:10]):
        place = (40, 50 + number * 58)
        _write(sheet, place, line, 0.9, (70, 30, 20), face=cv2.FONT_HERSHEY_DUPLEX)
    return _turn(sheet, -6, paper), PROSE[3:10]


def _faded() -> Drawn:
    sheet = _sheet(860, 620, (226, 216, 196))
    _column(sheet, (50, 60), PROSE[2:], 24, 50, ink=(110, 96, 80))
    return _shade(sheet, 0.62, 9, 2), PROSE[2:]


def _poster() -> Drawn:
    sheet = _sheet(800, 1000, (24, 32, 74))
    big = ("HARBOUR", "FESTIVAL")
    small = (
        "Friday 9 August, 17:00",
        "Brass band and fireworks",
        "Free entry",
        "www.quay-days.org",
    )
    for number, line in enumerate(big):
        _set(sheet, (70, 160 + number * 140), line, 118, (250, 206, 60), weight=3)
    for number, line in enumerate(small):
        _set(sheet, (80, 520 + number * 110), line, 44 - 4 * number, (236, 240, 250))
    return sheet, (*big, *small)


def _small() -> Drawn:
    sheet = _sheet(320, 180, (250, 250, 246))
    lines = ("Room 204", "Do not disturb", "Cleaning: 10 to 12", "Reception: dial 9")
    _column(sheet, (20, 30), lines, 17, 38)
    return sheet, lines


def _scan() -> Drawn:
    """As large as a scanner makes them."""
    sheet = _sheet(2500, 2100, (252, 252, 250))
    _set(sheet, (200, 160), "Standing orders of the port", 92, weight=2)
    _column(sheet, (200, 330), PROSE, 72, 124)
    return _shade(sheet, 0.97, 4, 3), ("Standing orders of the port", *PROSE)


def _strip() -> Drawn:
    sheet = _sheet(1500, 70)
    _set(sheet, (20, 34), PROSE[0] + " " + PROSE[1], 28)
    return sheet, (f"{PROSE[0]} {PROSE[1]}",)


def _upside_down() -> Drawn:
    sheet = _sheet(860, 480)
    for number, line in enumerate(PROSE[:8]):
        strip = _label(line, 0.85, cv2.FONT_HERSHEY_SIMPLEX)
        _paste(sheet, (30, 12 + number * 57), strip[::-1, ::-1] if number % 2 else strip)
    return sheet, PROSE[:8]


def _all_upside_down() -> Drawn:
    sheet, lines = _article()
    return np.ascontiguousarray(sheet[::-1, ::-1]), lines[::-1]


def _tall() -> Drawn:
    """Backs of books on a shelf: lines that run upwards."""
    titles = ("A HISTORY OF TIDES", "Knots and Splices", "The Lamp Keeper", "ATLAS OF ISLANDS",
              "Weather Signs")  # fmt: skip
    colours = ((120, 30, 30), (30, 90, 60), (40, 50, 120), (90, 70, 30), (60, 60, 60))
    sheet = _sheet(620, 640, (200, 190, 170))
    for number, (title, colour) in enumerate(zip(titles, colours, strict=True)):
        back = _sheet(620, 96, colour)
        face = cv2.FONT_HERSHEY_DUPLEX
        (width, _), _ = cv2.getTextSize(title, face, 1.2, 1)
        _write(back, (560 - width, 48), title, 1.2, (250, 246, 232), face=face)
        _paste(sheet, (20 + number * 118, 10), np.rot90(back))
    return sheet, titles


def _table() -> Drawn:
    random = np.random.default_rng(4)
    sheet, lines = _sheet(1000, 700), []
    for row in range(12):
        cells = [f"{random.integers(10**k, 10 ** (k + 1)):,}" for k in (2, 3, 4, 5, 6)]
        for column, cell in enumerate(cells):
            _set(sheet, (40 + column * 190, 48 + row * 54), cell, 24)
        cv2.line(sheet, (20, 75 + row * 54), (980, 75 + row * 54), (120, 120, 120), 1)
        lines += cells
    for column in range(6):
        cv2.line(sheet, (20 + column * 190, 20), (20 + column * 190, 669), (120, 120, 120), 1)
    return sheet, lines


def _captions() -> Drawn:
    sheet = np.array(photograph("coffee.png"))
    lines = ("Fresh every morning", "2.60 a cup", "No milk, no hurry")
    for number, line in enumerate(lines):
        for ink, step in ((BLACK, 2), ((255, 240, 120), 0)):
            place = (40 + step, 50 + number * 140 + step)
            _write(sheet, place, line, 1.3, ink, face=cv2.FONT_HERSHEY_DUPLEX)
    return sheet, lines


def _sign() -> Drawn:
    grass = np.array(photograph("grass.png"))
    if grass.ndim == 2:
        grass = np.repeat(grass[:, :, None], 3, 2)
    lines = ("North Pier 1.5 km", "Lighthouse 3 km", "Ferry 400 m")
    board = _sheet(620, 300, (20, 90, 50))
    for number, line in enumerate(lines):
        _set(board, (40, 60 + number * 90), line, 56, WHITE, weight=1)
    sheet = np.asarray(cv2.resize(grass, (820, 560)), np.uint8)
    sheet[120:420, 100:720] = board
    corners = ((0.08, 0.02), (0.98, 0.10), (0.92, 0.95), (0.03, 0.88))
    return _tilt(sheet, corners, (90, 120, 80)), lines


def _slanted() -> Drawn:
    sheet = _sheet(900, 420)
    faces = (cv2.FONT_HERSHEY_SCRIPT_COMPLEX, cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
             cv2.FONT_HERSHEY_SIMPLEX | cv2.FONT_ITALIC, cv2.FONT_HERSHEY_TRIPLEX)  # fmt: skip
    for number, line in enumerate(PROSE[5:12]):
        place = (30, 40 + number * 56)
        _write(sheet, place, line, 0.85, (30, 30, 90), face=faces[number % 4])
    return sheet, PROSE[5:12]


def _dense() -> Drawn:
    """A printed page of many lines close together."""
    sheet, lines = _sheet(1180, 1560), []
    for number in range(52):
        line = f"{number + 1}. {PROSE[number % 13]} {PROSE[(number * 5 + 3) % 13]}"
        _set(sheet, (40, 30 + number * 29), line, 19)
        lines.append(line)
    return sheet, lines


def _photograph(name: str) -> Callable[[], Drawn]:
    def draw() -> Drawn:
        with Image.open(WHEEL / name) as image:
            image.info = {}  # page.png carries a colour profile that is out of order
            return np.asarray(image.convert("RGB")), ()

    return draw


_DRAWERS: dict[str, tuple[Callable[[], Drawn], str, int]] = {
    "article": (_article, "PNG", 0),
    "receipt": (_receipt, "JPEG", 80),
    "two columns": (_two_columns, "PNG", 0),
    "turned": (_turned, "PNG", 0),
    "turned back": (_turned_back, "JPEG", 90),
    "faded": (_faded, "JPEG", 55),
    "poster": (_poster, "JPEG", 85),
    "small": (_small, "PNG", 0),
    "scan": (_scan, "JPEG", 85),
    "strip": (_strip, "PNG", 0),
    "upside-down lines": (_upside_down, "PNG", 0),
    "upside down": (_all_upside_down, "JPEG", 90),
    "tall": (_tall, "JPEG", 90),
    "table": (_table, "PNG", 0),
    "captions": (_captions, "JPEG", 85),
    "sign": (_sign, "JPEG", 85),
    "slanted": (_slanted, "PNG", 0),
    "dense": (_dense, "JPEG", 85),
    "book page": (_photograph("page.png"), "PNG", 0),
    "handwriting": (_photograph("text.png"), "PNG", 0),
    "no text": (_photograph("chelsea.png"), "JPEG", 90),
}
