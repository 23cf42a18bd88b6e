"""The page at `/`: one file, and a form that works in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flowlang.serve import asgi
from tests.pictures import bad, good, photographs
from tests.serve.browser import Browser, find_chromium
from tests.serve.server import Server, running, serving, write, write_flows

ANSWER = "!document.querySelector('#raw').hidden && document.querySelector('#answer').textContent"
ERROR = "!document.querySelector('#error').hidden && document.querySelector('#error').innerText"
STATUS = "document.querySelector('#status').textContent"
BARS = "[...document.querySelectorAll('.bars li')].map(li => li.innerText.split('\\n'))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_flows(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, str(folder / "all.flow")) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests; each opens the page anew."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the path")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


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


def test_every_control_has_a_label(browser: Browser, server: Server) -> None:
    """Whoever cannot see the page is told what each of its controls is for."""
    browser.open(server.url)
    browser.wait_for("document.querySelector('#flow')?.options.length > 1")
    nameless = browser.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')].filter("
        "e => !e.labels?.[0]?.textContent.trim() && !e.textContent.trim()).map(e => e.id)"
    )
    assert nameless == []


def test_a_picture_is_sent_and_its_answer_shown(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    """A chosen picture is shown with its answer as bars and as JSON, and the time it took."""
    path = tmp_path / "cat.jpg"
    path.write_bytes(photographs(1)[0])
    browser.open(server.url)
    browser.wait_for("!document.querySelector('#choice').hidden")
    browser.choose_file("#file", path)
    answer = json.loads(browser.wait_for(ANSWER))
    assert answer == server.client.post("/flows/classify", content=path.read_bytes()).json()
    assert browser.evaluate(BARS) == [
        [label["label"], f"{100 * label['score']:.1f} %"] for label in answer
    ]
    assert re.fullmatch(r"[\d.]+ m?s", browser.evaluate(STATUS))
    browser.wait_for("!document.querySelector('#shown').hidden")
    assert browser.evaluate("document.querySelector('#picture').naturalWidth") == 500
    assert browser.evaluate("document.querySelector('#marks').getAttribute('viewBox')") == (
        "0 0 500 375"
    )
    assert browser.complaints() == []
    assert {url.removeprefix(server.url) for url in browser.requested()} - {"data:,"} == {
        "/",
        "/flows",
        "/flows/classify",
        browser.evaluate("document.querySelector('#picture').src"),
    }


def test_another_flow_gets_the_same_picture(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    """Choosing another flow sends the picture to it, and shows its types."""
    path = tmp_path / "cat.png"
    path.write_bytes(good()["png-rgb"].data)
    browser.open(server.url)
    browser.wait_for("!document.querySelector('#choice').hidden")
    browser.choose_file("#file", path)
    browser.wait_for(ANSWER)
    browser.evaluate(
        "{ const flow = document.querySelector('#flow'); flow.value = 'two';"
        " flow.dispatchEvent(new Event('change')); }"
    )
    answer = json.loads(browser.wait_for(ANSWER))
    assert {name: len(values) for name, values in answer.items()} == {"scores": 10, "embedding": 16}
    assert browser.evaluate("document.querySelector('#types').textContent").startswith("two: bytes")


def test_what_is_wrong_with_a_picture_is_said(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    """A file that is no picture gives the server's reason and the request's id, and no answer."""
    path = tmp_path / "half.jpg"
    path.write_bytes(bad()["jpeg-half"].data)
    browser.open(server.url)
    browser.wait_for("!document.querySelector('#choice').hidden")
    browser.choose_file("#file", path)
    said = browser.wait_for(ERROR)
    assert bad()["jpeg-half"].word in said
    assert re.search(r"bad-request, request [0-9a-f]{16}$", said)
    assert not browser.evaluate(ANSWER)


def test_numbers_are_sent_as_json(browser: Browser, server: Server) -> None:
    """A flow that takes no picture offers a field for JSON instead."""
    browser.open(server.url)
    browser.wait_for("!document.querySelector('#choice').hidden")
    browser.evaluate(
        "{ const flow = document.querySelector('#flow'); flow.value = 'same';"
        " flow.dispatchEvent(new Event('change'));"
        " const json = document.querySelector('#json'); json.value = '[1, 2, NaN]';"
        " json.dispatchEvent(new Event('input')); document.querySelector('#run').click(); }"
    )
    assert browser.wait_for(ANSWER) == "[1, 2, null]"


def test_names_are_shown_as_text(browser: Browser, folder: Path) -> None:
    """A class name that is HTML is shown as it stands, and scores that are no shares as numbers."""
    write(folder / "odd.txt", "<img src=x onerror=alert(1)>\n" + "plain\n" * 9)
    flow = write(
        folder / "odd.flow",
        'decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("classifier.onnx")\n'
        '-> top(10, names="odd.txt")\n',
    )
    picture = folder / "cat.jpg"
    picture.write_bytes(photographs(1)[0])
    with serving(folder, str(flow)) as server:
        server.wait_ready()
        browser.open(server.url)
        browser.wait_for("document.querySelector('#types').textContent")
        browser.choose_file("#file", picture)
        answer = json.loads(browser.wait_for(ANSWER))
        bars = dict(browser.evaluate(BARS))
    assert browser.evaluate("document.querySelectorAll('.bars img').length") == 0
    odd = next(label for label in answer if label["index"] == 0)
    assert bars["<img src=x onerror=alert(1)>"] == _four_digits(odd["score"])


def _four_digits(value: float) -> str:
    return np.format_float_positional(value, 4, fractional=False, unique=False)


def test_the_page_waits_for_the_models(browser: Browser, folder: Path) -> None:
    """Opened while the flows load, the page says so, and works once they are there."""
    gate = folder / "gate"
    flow = write(folder / "echo.flow", "pass\n")
    code = f"""
import os, sys, time, flowlang
from flowlang.serve import serve
def load():
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.01)
    return [flowlang.load({str(flow)!r})]
sys.exit(serve(load, "127.0.0.1", 0))
"""
    with running(folder, "-c", code) as server:
        browser.open(server.url)
        browser.wait_for(f"{STATUS}.startsWith('loading')")
        gate.touch()
        server.wait_ready()
        types = browser.wait_for("document.querySelector('#types').textContent")
        assert types == "main: unknown → unknown"
        assert browser.evaluate("document.querySelector('#choice').hidden")


def test_the_page_is_in_the_package() -> None:
    """The page is package data: an application finds it wherever the package is installed."""
    assert asgi()._page.startswith(b"<!doctype html>")
