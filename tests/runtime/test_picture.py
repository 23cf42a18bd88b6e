"""What picture files say of themselves, held against what Pillow and OpenCV make of them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flowlang.runtime.picture import (
    MAX_STEPS,
    Picture,
    UnreadablePicture,
    plain_jpeg_size,
    read_picture,
)
from tests.pictures import Pixels, bad, encode, good, photographs, write_tiff

SMALL_ENOUGH_TO_DECODE = 4_000_000

# Cut just short of whole, OpenCV refuses a GIF (it wants the trailer), shows a run-length BMP (it
# does without the end mark) and shows a TIFF of planes with whatever the last one lacks.
OPENCV_DIFFERS = {"gif", "gif-animated", "bmp-runs", "tiff-planes"}


def decode(data: bytes | memoryview) -> Pixels | None:
    """The upright RGB pixels OpenCV shows; None where it shows none."""
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if shown is None else np.ascontiguousarray(shown[:, :, ::-1])


def look(data: bytes | memoryview) -> Picture | None:
    """What the file says of itself; None where it cannot be read."""
    try:
        return read_picture(data)
    except UnreadablePicture:
        return None


def complain(data: bytes) -> str:
    """Why a file is refused, or its size where it is truncated; empty for a whole one."""
    try:
        picture = read_picture(data)
    except UnreadablePicture as refusal:
        return str(refusal)
    return "" if picture.is_complete else f"truncated, {picture.width}x{picture.height}"


def is_whole(data: bytes | memoryview) -> bool:
    picture = look(data)
    return picture is not None and picture.is_complete


@pytest.mark.parametrize("name", good())
def test_a_good_file_tells_its_format_size_and_components(name: str) -> None:
    """The header of every good file is read as it was written, and its pixels are all there."""
    wanted = good()[name]
    picture = read_picture(wanted.data)
    assert picture == Picture(
        wanted.format,
        *wanted.stored,
        is_complete=True,
        channels=wanted.channels,
        stores_rgb=name == "jpeg-rgb",
        tile_pixels=128 * 96 if name == "tiff-tiles" else 0,
    )


@pytest.mark.parametrize("name", good())
def test_an_everyday_jpeg_is_known_by_the_short_look_only_where_the_long_one_agrees(
    name: str,
) -> None:
    """The short look gives the size of a whole JPEG in the usual colours, and of no other file."""
    data = good()[name].data
    picture = read_picture(data)
    is_usual = picture.format == "jpeg" and not picture.stores_rgb and picture.channels in (1, 3)
    is_plain = is_usual and data.endswith(b"\xff\xd9")
    assert plain_jpeg_size(data, 1 << 26) == ((picture.height, picture.width) if is_plain else None)
    assert plain_jpeg_size(data, picture.width * picture.height - 1) is None


@pytest.mark.parametrize("name", bad())
def test_no_bad_file_passes_the_short_look(name: str) -> None:
    """What `read_picture` or the limits refuse is never let through by the short look."""
    assert plain_jpeg_size(bad()[name].data, 64 << 20) is None


@given(st.data())
def test_the_short_look_stands_damaged_headers(choice: st.DataObject) -> None:
    """Whatever the bytes are, it answers, and yes only where the long look reads the same size."""
    data = bytearray(good()["jpeg-420"].data[:2000] + b"\0" * 4000 + b"\xff\xd9")
    for _ in range(choice.draw(st.integers(1, 8))):
        data[choice.draw(st.integers(2, 700))] = choice.draw(st.integers(0, 255))
    size = plain_jpeg_size(bytes(data), 1 << 26)
    if size is not None:
        try:
            picture = read_picture(bytes(data))
        except UnreadablePicture:
            return
        assert size == (picture.height, picture.width)
        assert picture.width * picture.height <= 1 << 26


@pytest.mark.parametrize("name", good())
def test_a_good_file_shows_what_the_corpus_says(name: str) -> None:
    """OpenCV shows every good file upright, with its pixels within the stated tolerance."""
    wanted = good()[name]
    shown = decode(wanted.data)
    assert shown is not None
    assert (shown.shape[1], shown.shape[0]) == wanted.size
    assert np.abs(shown.astype(int) - wanted.rgb).mean() <= wanted.tolerance


@pytest.mark.parametrize("name", bad())
def test_a_bad_file_is_refused_or_known_to_be_cut(name: str) -> None:
    """Every bad file is refused with its word, is seen to be cut, or tells its absurd size."""
    wanted = bad()[name]
    assert wanted.word in complain(wanted.data)


# Pillow warns of a tag that lies behind the pixels, in the part that is cut off.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("name", good())
def test_a_file_cut_anywhere_is_whole_only_with_all_its_pixels(name: str) -> None:
    """There is one length from which a file counts as whole, and it shows all pixels there."""
    whole = memoryview(good()[name].data)
    shortest = next(n for n in range(len(whole), 0, -1) if not is_whole(whole[: n - 1]))
    head = set(range(min(1500, shortest)))
    for length in head | set(range(0, shortest, 61)) | set(range(max(0, shortest - 80), shortest)):
        assert not is_whole(whole[:length])
    with Image.open(io.BytesIO(whole[:shortest])) as shown, Image.open(io.BytesIO(whole)) as all_:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(all_.convert("RGB")))


@pytest.mark.parametrize("name", sorted(set(good()) - OPENCV_DIFFERS))
def test_the_length_a_file_is_whole_from_is_exact(name: str) -> None:
    """OpenCV shows a file cut to the shortest whole length, and nothing one byte below that."""
    whole = memoryview(good()[name].data)
    shortest = next(n for n in range(len(whole), 0, -1) if not is_whole(whole[: n - 1]))
    shown, wanted = decode(whole[:shortest]), decode(whole)
    assert shown is not None
    assert wanted is not None
    assert np.array_equal(shown, wanted)
    assert decode(whole[: shortest - 1]) is None


def test_a_cut_photograph_with_a_whole_thumbnail_is_cut() -> None:
    """The end-of-image marker of a thumbnail inside EXIF does not end the picture around it."""
    data = good()["jpeg-thumbnail"].data
    assert data.index(b"\xff\xd9") < data.index(b"\xff\xda", 60_000)
    assert not read_picture(data[:-2]).is_complete


def test_an_end_marker_does_not_excuse_missing_pixels() -> None:
    """A JPEG with too few bits for the blocks it claims is cut, even where it ends properly."""
    data = photographs(1)[0]
    scan = data.index(b"\xff\xda") + 14
    assert read_picture(data[:scan] + bytes(3000) + b"\xff\xd9").is_complete
    assert not read_picture(data[:scan] + bytes(500) + b"\xff\xd9").is_complete


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_the_emptiest_jpeg_that_can_be_written_is_whole(options: dict[str, int]) -> None:
    """One colour with the shortest codes there are still has the bits its blocks need."""
    plain = Image.new("RGB", (2001, 1003), (255, 255, 255))
    assert read_picture(encode(plain, "JPEG", optimize=True, **options)).is_complete
    assert read_picture(encode(plain.convert("L"), "JPEG", optimize=True)).is_complete


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "I;16"])
def test_the_emptiest_png_that_can_be_written_is_whole(mode: str) -> None:
    """A PNG of one colour at the best compression holds the bytes its pixels need."""
    assert read_picture(encode(Image.new(mode, (4001, 3003)), "PNG", compress_level=9)).is_complete


@pytest.mark.parametrize("name", good())
@pytest.mark.parametrize("view", [bytearray, memoryview])
def test_any_buffer_is_read_alike(name: str, view: Callable[[bytes], memoryview]) -> None:
    """A bytearray, and a view into a larger buffer, say what the same bytes say."""
    data = good()[name].data
    assert read_picture(view(b"before" + data)[6:]) == read_picture(data)
    assert look(view(b"before" + data[:-1])[6:]) == look(data[:-1])


def test_a_view_with_gaps_or_of_numbers_is_read() -> None:
    """A memoryview need not be contiguous, nor of unsigned bytes."""
    data = good()["bmp-24"].data
    assert read_picture(memoryview(data[::-1])[::-1]) == read_picture(data)
    gif = good()["gif"].data
    assert read_picture(memoryview(gif).cast("b")) == read_picture(gif)
    padded = data + bytes(-len(data) % 4)
    assert read_picture(memoryview(padded).cast("I")) == read_picture(padded)


def test_a_gif_needs_neither_its_trailer_nor_its_later_images() -> None:
    """A GIF is whole once its first image is, as GIFs without a trailer are about."""
    still, film = good()["gif"].data, good()["gif-animated"].data
    assert read_picture(still[:-1]).is_complete
    assert read_picture(film[: len(film) * 3 // 4]).is_complete


def _tiff(*entries: tuple[int, int, int, int]) -> bytes:
    """A gray 64x64 TIFF of one strip, with further tags: each its type, count and value."""
    own = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    rows = [*own, (273, 4, 1, 400), (277, 3, 1, 1), (278, 4, 1, 64), (279, 4, 1, 4096), *entries]
    tags = b"".join(struct.pack("<HHII", *row) for row in rows)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(rows)) + tags + bytes(4)
    return head.ljust(400, b"\0") + bytes(4096)


def test_a_tiff_made_by_hand_is_read() -> None:
    """What the tests below add to is a picture."""
    assert read_picture(_tiff()) == Picture("tiff", 64, 64, True, 1)
    assert decode(_tiff()) is not None


def test_tiles_larger_than_their_picture_are_told() -> None:
    """A decoder makes all tiles whole, so their pixels count however few of them are shown."""
    tiled = write_tiff(np.zeros((16, 16), np.uint8), tile=(512, 256))
    assert read_picture(tiled).tile_pixels == 512 * 256
    wide = write_tiff(np.zeros((1, 1025), np.uint8), tile=(256, 512))
    assert read_picture(wide).tile_pixels == 3 * 512 * 256
    assert read_picture(good()["tiff-strips"].data).tile_pixels == 0


def _jpeg_frame(marker: int, size: bytes, rest: bytes) -> bytes:
    return b"\xff\xd8\xff" + bytes([marker]) + size + rest + b"\xff\xda\0\x02\xff\xd9"


MADE_WRONG = {
    "jpeg-no-height": (_jpeg_frame(0xC0, b"\0\x0b", b"\x08\0\0\0\x10\1\1\x11\0"), "16x0 pixels"),
    "jpeg-hierarchical": (_jpeg_frame(0xC5, b"\0\x0b", b"\x08\0\1\0\1\1\1\x11\0"), "hierarchical"),
    "jpeg-no-components": (_jpeg_frame(0xC0, b"\0\x08", b"\x08\0\1\0\1\0"), "frame header"),
    "jpeg-sampling": (_jpeg_frame(0xC0, b"\0\x0b", b"\x08\0\1\0\1\1\1\x01\0"), "sampling"),
    "jpeg-no-frame": (b"\xff\xd8\xff\xda\0\x02\xff\xd9", "before its frame header"),
    "jpeg-no-scan": (b"\xff\xd8\xff\xe0\0\x02\xff\xd9\0\0", "ends before its pixels"),
    "jpeg-two-frames": (
        _jpeg_frame(0xC0, b"\0\x0b", b"\x08\0\1\0\1\1\1\x11\0\xff\xc0\0\x0b" + bytes(9)),
        "two frame headers",
    ),
    "png-apple": (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI" + bytes(30), "first chunk"),
    "png-colour": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\5" + bytes(9),
        "colour type",
    ),
    "gif-empty": (b"GIF89a\1\0\1\0\0\0\0;", "without an image"),
    "gif-block": (b"GIF89a\1\0\1\0\0\0\0abc", "damaged block"),
    "bmp-header": (b"BMW builds cars and motorcycles.", "BMP with a header"),
    "bmp-jpeg": (
        b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 9, 9, 1, 0, 4) + bytes(20),
        "packing 4",
    ),
    "webp-chunk": (b"RIFF\x20\0\0\0WEBPICCP" + bytes(30), "ICCP"),
    "tiff-big": (b"II\x2b\0\x08\0\0\0" + bytes(20), "BigTIFF"),
    "tiff-nothing": (b"II*\0\x08\0\0\0\0\0", "where its pixels are"),
    "tiff-width-twice": (_tiff((256, 4, 1, 30000)), "a tag twice"),
    "tiff-width-of-two": (_tiff((322, 3, 2, 16 << 16 | 32)), "tag 322 has several"),
    "tiff-signed-tile": (_tiff((322, 9, 1, 8192), (323, 9, 1, 8192)), "tag 322 is of type 9"),
    "jpeg2000-box": (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\4free", "damaged box"),
    "pnm-values": (b"P5 4 1 100\n1234", "values up to 100"),
    # OpenCV ends a comment at the return, and takes the mark after a number for its end.
    "pnm-return": (b"P5 #a\r200 100 255 \n64 64 255\n" + bytes(5000), "damaged header"),
    "pnm-mark": (b"P5 64#3000 \n64 255\n" + bytes(5000), "damaged header"),
    "pnm-words": (b"P5 is a Norwegian radio station." + bytes(5000), "damaged header"),
    "avif": (b"\0\0\0\x20ftypavif" + bytes(30), "AVIF"),
}


def test_comments_of_a_pnm_end_with_their_line() -> None:
    """After any white space, and at a line's end in either way of writing it."""
    for end in (b"\n", b"\r\n"):
        data = b"P5 # a" + end + b"30 #b" + end + b"#c" + end + b" 20" + end + b"255\n" + bytes(600)
        assert read_picture(data) == Picture("pnm", 30, 20, True, 1)
        shown = decode(data)
        assert shown is not None
        assert shown.shape == (20, 30, 3)


@pytest.mark.parametrize("name", MADE_WRONG)
def test_a_wrong_header_is_named(name: str) -> None:
    """What is wrong with a header is said in words."""
    data, words = MADE_WRONG[name]
    with pytest.raises(UnreadablePicture, match=words):
        read_picture(data)


_MANY = MAX_STEPS + 10
LONG_WALKS = {
    "jpeg-segments": b"\xff\xd8" + b"\xff\xe0\0\2" * _MANY,
    "jpeg-fill": b"\xff\xd8" + b"\xff" * _MANY,
    "png-chunks": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2"
    + bytes(7)
    + b"\0\0\0\0tEXt\0\0\0\0" * _MANY,
    "gif-extensions": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * _MANY,
    "gif-blocks": b"GIF89a\1\0\1\0\0\0\0" + (b"!\xfe" + b"\1a" * 60_000 + b"\0") * 2,
    "webp-chunks": b"RIFF\0\0\x10\0WEBPVP8X\x0a\0\0\0" + bytes(10) + b"junk\0\0\0\0" * 2 * _MANY,
    "jpeg2000-boxes": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * _MANY,
    "jpeg2000-segments": b"\xff\x4f\xff\x51\0\x29"
    + bytes(2)
    + struct.pack(">IIII", 9, 9, 0, 0)
    + bytes(21)
    + b"\xff\x64\0\2" * _MANY,
    "tiff-strips": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 273, 4, _MANY, 8) + bytes(8),
}


@pytest.mark.parametrize("name", LONG_WALKS)
def test_a_file_made_to_be_walked_for_ever_is_refused(name: str) -> None:
    """No walk over the parts of a file takes more than a bounded number of steps."""
    with pytest.raises(UnreadablePicture, match=f"over {MAX_STEPS}"):
        read_picture(LONG_WALKS[name])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with bytes changed, cut out, put in or cut off, mostly near its start."""
    data = bytearray(good()[draw(st.sampled_from(sorted(good())))].data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([32, 700, 10**6])))))
        kind = draw(st.sampled_from(["change", "remove", "insert", "cut"]))
        if kind == "change":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "remove":
            del data[at : at + draw(st.sampled_from([1, 2, 4, 20, 2000]))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=12))
        else:
            del data[at:]
    return bytes(data)


@settings(max_examples=600)
@given(damaged())
def test_a_damaged_file_never_shows_another_size_than_it_tells(data: bytes) -> None:
    """A damaged file is refused, or OpenCV shows nothing or the size told, one way or turned."""
    picture = look(data)
    if picture is None or picture.width * picture.height > SMALL_ENOUGH_TO_DECODE:
        return
    shown = decode(data)
    if shown is not None:
        assert {shown.shape[0], shown.shape[1]} == {picture.width, picture.height}


_STARTS = [picture.data[:length] for picture in good().values() for length in (4, 12, 30)]


@settings(max_examples=600)
@given(st.sampled_from([b"", *_STARTS]), st.binary(max_size=300))
@example(b"", b"")
@example(b"BM", b"\xff" * 60)
@example(b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\1free" + b"\xff" * 30)
def test_random_bytes_are_read_or_refused(start: bytes, rest: bytes) -> None:
    """Whatever follows the first bytes of a picture, the answer is a picture or a refusal."""
    picture = look(start + rest)
    assert picture is None or min(picture.width, picture.height) > 0


def test_photographs_are_distinct_and_the_same_every_time() -> None:
    """The benchmark's pictures are distinct JPEGs of one size, about 65 KB, and reproducible."""
    made = photographs(60)
    assert made == photographs(60)
    assert len(set(made)) == 60
    assert {read_picture(data) for data in made} == {Picture("jpeg", 500, 375, True, 3)}
    assert 60_000 < sum(map(len, made)) / len(made) < 70_000
    assert made != photographs(60, seed=1)
