"""The page at `/`: one file, and a form that works in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings

from flowlang.serve.routes import Service
from tests.pictures import bad, good
from tests.serve.browser import Browser
from tests.serve.page import (
    ANSWER,
    ANYTHING,
    BARS,
    CAPTIONS,
    CARDS,
    COMMAND,
    DENIED,
    DRAWN,
    ERROR,
    LIT,
    LIT_OUTLINE,
    PASTE,
    ROWS,
    STATUS,
    ask,
    choose,
    colours,
    contrast,
    corners,
    furnish,
)
from tests.serve.server import Server, running, serving, write

SHIFT = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server serves, and pictures to send it."""
    return furnish(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, str(folder / "page.flow")) as server:
        yield server.wait_ready()


@pytest.fixture
def page(chromium: Browser, server: Server) -> Browser:
    """The page, opened anew, with the flows to choose from."""
    chromium.open(server.url)
    chromium.wait_for("!document.querySelector('#choice').hidden")
    return chromium


def test_the_page_needs_nothing_else(server: Server) -> None:
    """The page is one HTML document that names no other resource, and may load none."""
    response = server.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = response.text
    assert page.startswith("<!doctype html>")
    assert re.findall(r"""(?:https?:)?//[a-z]|\bsrc=|@import|url\(|\bimport\b""", page) == []
    head = server.client.head("/")
    assert head.content == b""
    assert int(head.headers["content-length"]) == len(response.content)


def test_colours_can_be_read() -> None:
    """Text has a contrast of 4.5 to 1 at least (WCAG 2 AA): in light, in dark and on captions."""
    pairs = colours(Service()._page.decode())
    assert len(pairs) == 28
    assert [pair for pair in pairs if contrast(*pair) < 4.5] == []


def test_every_control_has_a_name(page: Browser, folder: Path) -> None:
    """Whoever cannot see the page is told what each of its controls is for, answers included."""
    assert page.nameless() == []
    choose(page, "told")
    assert page.nameless() == []
    ask(page, "street", folder / "0.jpg", folder / "1.jpg")
    assert page.nameless() == []


def test_a_picture_is_sent_and_its_answer_shown(
    page: Browser, server: Server, folder: Path
) -> None:
    """A chosen picture is shown with its answer as bars and as JSON, and the time it took."""
    answer = ask(page, "classify", folder / "1.jpg")
    content = (folder / "1.jpg").read_bytes()
    assert answer == server.client.post("/flows/classify", content=content).json()
    assert page.evaluate(BARS) == [
        [label["label"], f"{100 * label['score']:.1f} %"] for label in answer
    ]
    assert re.fullmatch(r"[\d.]+ m?s", page.evaluate(STATUS))
    assert page.evaluate("document.querySelector('#picture').naturalWidth") == 500
    view_box = page.evaluate("document.querySelector('#marks').getAttribute('viewBox')")
    assert view_box == "0 0 500 375"
    assert not page.evaluate("document.querySelector('#raw').open")
    assert page.complaints() == []
    assert {url.removeprefix(server.url) for url in page.requested()} - {"data:,"} == {
        "/",
        "/flows",
        "/flows/classify",
        page.evaluate("document.querySelector('#picture').src"),
    }


def test_the_page_asks_for_the_token(chromium: Browser, folder: Path) -> None:
    """Where the server asks for a token it is typed once, kept in the tab, and sent with all."""
    shown = "!document.querySelector('#access').hidden"
    with serving(
        folder, str(folder / "page.flow"), environment={"FLOWLANG_TOKEN": "open-sesame"}
    ) as server:
        server.wait_ready()
        chromium.open(server.url)
        chromium.wait_for(shown)
        assert chromium.nameless() == []
        for token, told in (("no", "it is not the one sent"), ("open-sesame", "")):
            chromium.type("#token", token)
            chromium.click("#access button")
            if told:
                chromium.wait_for(f"{shown} && {DENIED} == {told!r}")
        chromium.wait_for("!document.querySelector('#choice').hidden")
        assert not chromium.evaluate(shown)
        assert "label" in ask(chromium, "classify", folder / "0.jpg")[0]
        assert '-H "Authorization: Bearer $FLOWLANG_TOKEN"' in chromium.evaluate(COMMAND)
        chromium.open(server.url)
        chromium.wait_for("typeof flows != 'undefined' && flows.length > 1")
        assert "open-sesame" not in chromium.evaluate("document.documentElement.outerHTML")
        assert chromium.evaluate("localStorage.length") == 0
        assert {url for url in chromium.requested() if "open-sesame" in url} == set()


def test_another_flow_gets_the_same_picture(page: Browser, folder: Path) -> None:
    """Choosing another flow sends the picture to it, and shows its types."""
    (folder / "cat.png").write_bytes(good()["png-rgb"].data)
    ask(page, "classify", folder / "cat.png")
    choose(page, "two")
    answer = json.loads(page.wait_for(ANSWER))
    assert {name: len(values) for name, values in answer.items()} == {"scores": 10, "embedding": 16}
    assert page.evaluate("document.querySelector('#types').textContent").startswith("two: bytes")


def test_what_a_detector_finds_is_drawn_over_the_picture(page: Browser, folder: Path) -> None:
    """Each detection is an outline where it was found, a row of a list, and a caption."""
    found = ask(page, "detect", folder / "1.jpg")
    assert len(found) > 3
    drawn, rows = page.evaluate(DRAWN), page.evaluate(ROWS)
    by_size = sorted(found, key=lambda d: -np.prod(np.subtract(d["box"][2:], d["box"][:2])))
    assert sorted(drawn) == sorted(corners(d["box"]) for d in found)
    assert drawn[0] == corners(by_size[0]["box"])
    assert rows == [[d["label"], f"{100 * d['score']:.1f} %"] for d in found]
    said = {f"{d['label']} {100 * d['score']:.0f} %" for d in found}
    captions = page.evaluate(CAPTIONS)
    assert captions
    assert {text for text, *_ in captions} <= said


def test_outlines_lie_on_the_upright_picture(page: Browser, folder: Path) -> None:
    """Outlines keep their places on a picture that its EXIF turns, and in a narrow window."""
    (folder / "turned.jpg").write_bytes(good()["jpeg-exif-6"].data)
    answer = ask(page, "street", folder / "turned.jpg")
    size = answer["size"]
    for width in (1100, 400):
        page.resize(width, 800)
        left, top, right, bottom, *image = page.evaluate(
            "['#marks .edge', '#picture'].flatMap(s => (b => [b.left, b.top, b.right, b.bottom])"
            "(document.querySelector(s).getBoundingClientRect()))"
        )
        scale = (image[2] - image[0]) / size["width"]
        assert scale == pytest.approx((image[3] - image[1]) / size["height"], rel=0.02)
        where = np.subtract([left, top, right, bottom], [*image[:2], *image[:2]]) / scale
        np.testing.assert_allclose(where, answer["cars"][0]["box"], atol=0.5)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_row_and_its_outline_light_up_together(page: Browser, folder: Path) -> None:
    """Pointing at a row or an outline, or walking the rows by keys, shows which belong together."""
    answer = ask(page, "street", folder / "0.jpg")
    bus = answer["cars"][0]
    page.point_at(".rows li:nth-child(1)")
    assert page.evaluate(LIT_OUTLINE) == " ".join(
        "{:g},{:g}".format(*p) for p in corners(bus["box"])
    )
    assert [text for text, *_ in page.evaluate(CAPTIONS)] == ["bus 90 %"]
    smallest = f"#marks g:nth-child({len(page.evaluate(DRAWN))}) .edge"
    page.point_at(smallest)
    assert page.evaluate(LIT) == "ZH 1"
    page.click(smallest)
    page.point_at("h1")
    assert page.evaluate(LIT) == "ZH 1"
    page.press("ArrowUp", 38)
    assert page.evaluate(LIT) == "car"
    page.press("Home", 36)
    assert page.evaluate(LIT) == "bus"
    page.press("Tab", 9, SHIFT)
    assert page.evaluate(LIT) is None
    assert len(page.evaluate(CAPTIONS)) == 4


def test_many_boxes_stay_readable(page: Browser, folder: Path) -> None:
    """Captions never cover each other: where there is no room, they wait to be asked for."""
    found = ask(page, "street", folder / "0.jpg")["cars"]
    page.evaluate(
        "{ const input = document.querySelector('#parameter-count'); input.value = 60; "
        "document.querySelector('#run').click(); }"
    )
    page.wait_for("document.querySelectorAll('#marks g').length == 120")
    assert len(found) == 2
    captions = page.evaluate(CAPTIONS)
    assert 5 < len(captions) < 60
    for one, other in combinations(captions, 2):
        _, left, top, right, bottom = one
        _, from_left, from_top, to_right, to_bottom = other
        assert right <= from_left or to_right <= left or bottom <= from_top or to_bottom <= top
    page.point_at(".rows li:nth-child(118)")
    assert [text for text, *_ in page.evaluate(CAPTIONS)] == ["ZH 58 80 %"]


def test_an_answer_is_shown_by_its_parts(page: Browser, folder: Path) -> None:
    """Of a record, labels are bars, finds are rows however deep, and the rest stands in words."""
    ask(page, "street", folder / "0.jpg")
    assert page.evaluate(ROWS) == [
        ["bus", "90.0 %", "maker Saurer"],
        ["ZH 0", "80.0 %"],
        ["car", "80.0 %"],
        ["ZH 1", "80.0 %"],
    ]
    indents = page.evaluate(
        "[...document.querySelectorAll('.rows li')].map(li => li.style.paddingLeft)"
    )
    assert indents == ["0.625rem", "1.875rem"] * 2
    assert page.evaluate(BARS) == [["street", "75.0 %"]]
    assert page.evaluate("document.querySelector('dl').innerText").split("\n") == [
        *("size", "height 375, width 500", "day", "true", "shades", "100 numbers")
    ]
    assert page.evaluate("document.querySelector('table').innerText").split() == [
        *("what", "price", "tea", "3.5", "cake", "6")
    ]
    titles = page.evaluate("[...document.querySelectorAll('#answered h3')].map(e => e.innerText)")
    assert titles == ["kind", "prices", "cars, 2 in the picture"]


def test_read_text_is_one_block_in_reading_order(
    page: Browser, server: Server, folder: Path
) -> None:
    """Pieces beside each other are one line, lines follow from top to bottom, and all is copied."""
    ask(page, "read", folder / "0.jpg")
    block = "The first line\n<b>2</b>\nlast"
    assert page.evaluate("document.querySelector('#words').innerText") == block
    page.call(
        "Browser.grantPermissions",
        origin=server.url,
        permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
    )
    page.click("#copy")
    page.wait_for("document.querySelector('#copy').textContent == 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == block
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.evaluate(
        "document.addEventListener('copy', () => { window.copied = String(getSelection()); })"
    )
    page.click("#copy")
    assert page.wait_for("window.copied") == block


def test_what_is_wrong_with_a_picture_is_said(page: Browser, folder: Path) -> None:
    """A file that is no picture gives the server's reason and the request's id, and no answer."""
    choose(page, "classify")
    page.choose_files("#file", folder / "half.jpg")
    said = page.wait_for(ERROR)
    assert bad()["jpeg-half"].word in said
    assert re.search(r"400 bad-request, request [0-9a-f]{16}$", said)
    assert not page.evaluate(ANSWER)


def test_a_full_queue_refuses_those_it_has_no_room_for(page: Browser, folder: Path) -> None:
    """Of more pictures than may wait, the first are answered, and each of the rest says why not."""
    ask(page, "narrow", *[folder / "0.jpg"] * 12)
    cards = page.evaluate(CARDS)
    assert cards[0][1].startswith("seen ")
    page.click("#gallery li:nth-child(12) button")
    told, which = page.evaluate(ERROR).split("\n")[::2]
    assert (told, which.split(",")[0]) == (cards[11][1], "overloaded")


@pytest.mark.parametrize(("flow", "status"), [("late", 504), ("classify", 413)])
def test_errors_are_worded_by_the_server(
    page: Browser, server: Server, folder: Path, flow: str, status: int
) -> None:
    """What took too long or is too large is told beside the picture in the server's own words."""
    path = folder / "0.jpg"
    if status == 413:
        path = folder / "large.jpg"
        path.write_bytes((folder / "0.jpg").read_bytes() + bytes(33 << 20))
    with path.open("rb") as file:
        refused = server.client.post(f"/flows/{flow}", content=file.read())
    assert refused.status_code == status
    choose(page, flow)
    page.choose_files("#file", path)
    said = page.wait_for(ERROR).split("\n")
    assert said[0] == refused.json()["error"]["message"]
    assert said[-1].startswith(f"{status} {refused.json()['error']['code']}, ")
    page.wait_for("!document.querySelector('#shown').hidden")


def test_several_pictures_are_a_gallery(page: Browser, server: Server, folder: Path) -> None:
    """All go in one form; each has its answer or error, and that of the one chosen is shown."""
    files = [folder / "0.jpg", folder / "half.jpg", folder / "1.jpg"]
    first = ask(page, "detect", *files)
    third = server.client.post("/flows/detect", content=files[2].read_bytes()).json()
    cards = page.evaluate(CARDS)
    assert [name for name, _ in cards] == [path.name for path in files]
    assert [cards[0][1], cards[2][1]] == [f"{len(first)} found", f"{len(third)} found"]
    assert bad()["jpeg-half"].word in cards[1][1]
    assert page.evaluate(
        "document.querySelectorAll('#gallery li:nth-child(3) polygon').length"
    ) == (len(third))
    assert re.fullmatch(r"3 pictures, [\d.]+ m?s", page.evaluate(STATUS))
    assert [url for url in page.requested() if url.endswith("detect")] == [
        server.url + "/flows/detect"
    ]
    page.click("#gallery li:nth-child(2) button")
    assert bad()["jpeg-half"].word in page.evaluate(ERROR)
    assert page.evaluate(DRAWN) == []
    page.click("#gallery li:nth-child(3) button")
    assert json.loads(page.evaluate(ANSWER)) == third
    assert sorted(page.evaluate(DRAWN)) == sorted(corners(d["box"]) for d in third)
    assert page.evaluate("document.querySelector('#answer-title').innerText") == "Answer to 1.jpg"
    assert page.complaints() == []


def test_pictures_can_be_dropped_and_pasted(page: Browser, folder: Path) -> None:
    """A picture that is dropped on the page or pasted is sent; one that is answered is shown."""
    choose(page, "echo")
    page.drop("#drop", folder / "0.jpg")
    page.wait_for("document.querySelector('#answered img')?.naturalWidth == 500")
    assert page.evaluate("document.querySelector('#name').textContent").startswith("0.jpg, ")
    page.evaluate("document.querySelector('#answered').replaceChildren()")
    page.evaluate(PASTE)
    page.wait_for("document.querySelector('#answered img')?.naturalWidth == 77")
    assert page.complaints() == []


def test_parameters_go_with_the_picture(page: Browser, server: Server, folder: Path) -> None:
    """Fields follow the types of a flow's parameters, and those left alone keep their defaults."""
    answer = ask(page, "spell", folder / "0.jpg")
    assert answer == {"mark": "-", "loud": True}
    assert page.evaluate("document.querySelector('#parameter-loud').indeterminate")
    page.type("#parameter-mark", "a&b='ü'")
    page.click("#parameter-loud")
    page.click("#parameter-loud")
    page.press("Enter", 13)
    page.click("#run")
    page.wait_for("document.querySelector('dl')?.innerText.endsWith('false')")
    assert json.loads(page.evaluate(ANSWER)) == {"mark": "a&b='ü'", "loud": False}
    assert page.requested()[-1] == server.url + "/flows/spell?mark=a%26b%3D%27%C3%BC%27&loud=false"
    assert page.evaluate(COMMAND) == f"curl --data-binary @picture.jpg '{page.requested()[-1]}'"
    page.click("#parameter-loud")
    assert page.evaluate("document.querySelector('#parameter-loud').indeterminate")
    page.click("#run")
    page.wait_for("document.querySelector('dl')?.innerText.endsWith('true')")


def test_files_are_parameters_too(page: Browser, folder: Path) -> None:
    """Nothing is sent before what is required is there; a file goes in a form with all the rest."""
    write(folder / "it's.txt", "of a file")
    choose(page, "told")
    kinds = page.evaluate("[...document.querySelectorAll('#fields input')].map(e => e.type)")
    assert kinds == ["file", "number", "number", "text", "checkbox"]
    page.choose_files("#file", folder / "0.jpg")
    assert page.wait_for(STATUS) == "this flow needs mask, times"
    page.click("#run")
    page.choose_files("#parameter-mask", folder / "it's.txt")
    page.type("#parameter-times", "3")
    page.type("#parameter-least", ".25")
    page.click("#run")
    size = (folder / "0.jpg").stat().st_size
    assert json.loads(page.wait_for(ANSWER)) == {
        "size": size,
        "mask": "of a file",
        "told": "3 0.25 - False",
    }
    assert page.evaluate(COMMAND).startswith(
        "curl -F 'mask=@it'\\''s.txt' --form-string times=3 --form-string least=0.25 "
        "-F item_=@picture.jpg "
    )
    page.type("#parameter-least", "")
    page.choose_files("#file", folder / "0.jpg", folder / "1.jpg")
    page.wait_for("document.querySelectorAll('#gallery .outcome').length == 2 && !sending")
    assert [line.split(", ")[1:] for _, line in page.evaluate(CARDS)] == [
        ["mask of a file", "told 3 0.5 - False"]
    ] * 2
    assert page.complaints() == []


def test_numbers_are_sent_as_json(page: Browser) -> None:
    """A flow that takes no picture offers a field for JSON instead."""
    choose(page, "same")
    assert page.evaluate("document.querySelector('label[for=json]').innerText") == (
        "JSON tensor<f32, 3>"
    )
    page.type("#json", "[1, 2, NaN]")
    page.press("Enter", 13, modifiers=2)
    assert page.wait_for(ANSWER) == "[1, 2, null]"
    assert page.evaluate("document.querySelector('#answered').innerText") == "1, 2, –"


def test_a_record_of_files_is_sent_by_its_fields(page: Browser, folder: Path) -> None:
    """Each field has a control of its type; what is required is asked for, the rest may be left."""
    choose(page, "between")
    kinds = page.evaluate("[...document.querySelectorAll('#record input')].map(e => e.type)")
    assert kinds == ["file", "file", "checkbox", "text"]
    assert page.evaluate("document.querySelector('#as-json').hidden")
    assert page.evaluate(COMMAND).startswith(
        "curl --form-string far=false -F one=@one -F other=@other "
    )
    page.choose_files("#field-one", folder / "0.jpg")
    page.click("#run")  # which asks for the other
    assert page.evaluate("document.querySelector('#form').checkValidity()") is False
    page.choose_files("#field-other", folder / "1.jpg")
    page.click("#field-far")
    page.click("#run")
    sizes = [(folder / name).stat().st_size for name in ("0.jpg", "1.jpg")]
    assert json.loads(page.wait_for(ANSWER)) == {"sizes": sizes, "told": "1 True None"}
    page.type("#field-note", "a&b")
    page.type("#parameter-times", "3")
    page.click("#run")
    page.wait_for("document.querySelector('#answer').textContent.includes('3 True a&b')")
    assert page.evaluate(COMMAND).startswith(
        "curl --form-string times=3 -F one=@0.jpg -F other=@1.jpg --form-string far=true "
        "--form-string 'note=a&b' "
    )
    assert page.nameless() == []
    choose(page, "classify")
    assert page.evaluate("document.querySelector('#as-record').hidden")
    assert page.complaints() == []


def test_names_are_shown_as_text(page: Browser, folder: Path) -> None:
    """A class name that is HTML is shown as it stands, and scores that are no shares as numbers."""
    answer = ask(page, "odd", folder / "0.jpg")
    bars = dict(page.evaluate(BARS))
    assert page.evaluate("document.querySelectorAll('.bars img').length") == 0
    odd = next(label for label in answer if label["index"] == 0)
    shown = np.format_float_positional(odd["score"], 4, fractional=False, unique=False)
    assert bars["<img src=x onerror=alert(1)>"] == shown


def test_whatever_a_flow_answers_is_shown(page: Browser, folder: Path) -> None:
    """Any JSON at all is shown without an exception, as its outlines and rows agree."""
    ask(page, "classify", folder / "0.jpg")

    @settings(max_examples=40)
    @given(ANYTHING)
    @example([{}])
    def shows(value: Any) -> None:
        text = json.dumps(json.dumps(value))
        page.evaluate(f"settle(pictures[0], {{result: JSON.parse({text})}})")
        assert page.evaluate(ANSWER)
        assert page.evaluate("marks.every(mark => mark.row)")
        assert page.evaluate(
            "document.querySelector('#answered').innerText.trim() != '' || !$('read').hidden"
        )

    shows()
    page.evaluate(f"settle(pictures[0], {{result: {'[' * 300}1{']' * 300}}})")
    assert page.complaints() == []


def test_the_flow_as_a_picture_is_fetched_when_it_is_opened(page: Browser, server: Server) -> None:
    """It is drawn in the colours of the page, and follows the choice of a flow."""
    assert not [url for url in page.requested() if url.endswith(".svg")]
    page.click("#plan summary")
    drawing = "document.querySelector('#drawing').shadowRoot?.querySelector('svg')?.outerHTML"
    assert "classifier.onnx" in page.wait_for(drawing)
    ink, stroke = page.evaluate(
        "[document.body, document.querySelector('#drawing').shadowRoot.querySelector('rect')]"
        ".map((e, i) => getComputedStyle(e)[i ? 'stroke' : 'color'])"
    )
    assert ink == stroke
    choose(page, "two")
    page.wait_for(f"{drawing}?.includes('two_heads.onnx')")
    assert [u.removeprefix(server.url) for u in page.requested() if u.endswith(".svg")] == [
        "/flows/classify/plan.svg",
        "/flows/two/plan.svg",
    ]
    assert page.complaints() == []


def test_live_numbers_are_counted_while_they_are_open(page: Browser, folder: Path) -> None:
    """Flows and stages, as `/metrics` has them, with the rates of the last seconds."""
    ask(page, "two", folder / "0.jpg")
    page.click("#live summary")
    row = (
        "[...document.querySelectorAll('#numbers tr')].map(r => [...r.children].map(c =>"
        " c.innerText)).find(r => r[0] == 'two')"
    )
    asked = int(page.wait_for(row)[1])
    assert asked >= 1
    page.evaluate("run().then(pollNumbers)")
    later = page.wait_for(f"({row})[1] == {asked + 1} && {row}")
    assert later[2:4] == ["0", "0"]
    assert float(later[4]) > 0
    assert re.fullmatch(r"[\d.]+ ms", later[5])
    stages = page.evaluate("[...document.querySelectorAll('#numbers td')].map(c => c.innerText)")
    assert any(re.fullmatch(r"\d+ two", cell) for cell in stages)
    page.click("#live summary")
    assert page.complaints() == []


def test_the_page_waits_for_the_models(chromium: Browser, folder: Path) -> None:
    """Opened while the flows load, the page says so, and works once they are there."""
    gate = folder / "gate"
    flow = write(folder / "echo.flow", "pass\n")
    code = f"""
import os, sys, time, flowlang
from flowlang.serve import serve
def load():
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.01)
    return flowlang.load({str(flow)!r})
sys.exit(serve(load, "127.0.0.1", 0))
"""
    with running(folder, "-c", code) as server:
        chromium.open(server.url)
        chromium.wait_for(f"{STATUS}.startsWith('loading')")
        gate.touch()
        server.wait_ready()
        types = chromium.wait_for("document.querySelector('#types').textContent")
        assert types == "main: unknown → unknown"
        assert chromium.evaluate("document.querySelector('#choice').hidden")


def test_the_page_is_in_the_package() -> None:
    """The page is package data: an application finds it wherever the package is installed."""
    assert Service()._page.startswith(b"<!doctype html>")
