"""What the tests of the page look at: flows to serve, and where the page shows what they answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from examples import models
from tests.pictures import bad, photographs
from tests.serve.browser import Browser
from tests.serve.server import write

FLOWS = """
use "see.py" as see
## Three best classes of one picture.
export flow classify: bytes -> list<label> =
  decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("classifier.onnx") -> softmax
  -> top(3, names="classes.txt")
export flow two = decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("two_heads.onnx")
export flow odd = decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("classifier.onnx")
  -> top(10, names="odd.txt")
export flow detect(conf: float = 0.5) = decode -> resize(96, fit=letterbox) -> rgb
  -> normalize(unit) -> trt("detector.onnx") -> boxes(yolov8, conf=conf, iou=0.2)
export flow street(count: int = 2) = decode -> see.street(count=count)
export flow read = decode -> see.read
export flow told(mask: bytes, times: int, least: float = 0.5, item: str = "-", loud: bool = false) =
  see.tell(mask=mask, times=times, least=least, mark=item, loud=loud)
export flow spell(mark: str = "-", loud: bool = true): bytes -> see.Spelling =
  see.spell(mark=mark, loud=loud)
export flow narrow = see.dwell x1
export flow late = decode -> see.wait
export flow echo = pass
export flow same = trt("identity.onnx")
export flow between(times: int = 1) = see.between(times=times)
schedule { late(slo=50ms) narrow(queue=1) }
"""
OPERATORS = '''
import time
from typing import Annotated, TypedDict
import numpy as np

class Spelling(TypedDict):
    mark: str
    loud: bool

def spell(item: bytes, *, mark: str = "", loud: bool = False) -> Spelling:
    return {"mark": mark, "loud": loud}

def dwell(content: bytes) -> str:
    time.sleep(0.2)  # longer than a browser takes to send all that it sends at once
    return f"seen {len(content)}"

def tell(content: bytes, *, mask: bytes = b"", times: int = 0, least: float = 0, mark: str = "",
         loud: bool = False) -> Annotated[dict, "{ size: int, mask: str, told: str }"]:
    return {"size": len(content), "mask": mask.decode(), "told": f"{times} {least} {mark} {loud}"}

Pair = Annotated[dict, "{ one: bytes, other: bytes, far: bool, note: str? }"]

def between(pair: Pair, *, times: int = 0) -> Annotated[dict, "{ sizes: list<int>, told: str }"]:
    sizes = [len(pair["one"]), len(pair["other"])]
    return {"sizes": sizes, "told": f"{times} {pair['far']} {pair['note']}"}

def street(image: np.ndarray, *, count: int = 2) -> Annotated[dict, """{
    size: { height: int, width: int }, day: bool, kind: list<label>, shades: tensor<f32, 100>,
    prices: list<{ what: str, price: float }>,
    cars: list<{ box: box, label: str, score: float, maker: str?,
                 plates: list<{ quad: quad, text: { text: str, score: float } }> }> }"""]:
    height, width = image.shape[:2]
    cars = []
    for number in range(count):
        left, right = width * (number + 0.1) / count, width * (number + 0.9) / count
        plate = [[left + 9, 60.0], [left + 29, 58.0], [left + 29, 68.0], [left + 9, 70.0]]
        cars.append({
            "box": [left, 20.0, right, 80.0], "label": "car" if number % 2 else "bus",
            "score": 0.9 - number / 10, "maker": None if number else "Saurer",
            "plates": [{"quad": plate, "text": {"text": f"ZH {number}", "score": 0.8}}],
        })
    kind = [{"index": 1, "label": "street", "score": 0.75}]
    prices = [{"what": "tea", "price": 3.5}, {"what": "cake", "price": 6.0}]
    shades = np.linspace(-1, 2, 100, dtype=np.float32)
    return {"size": {"height": height, "width": width}, "day": True, "kind": kind,
            "shades": shades, "prices": prices, "cars": cars}

def read(image: np.ndarray) -> Annotated[list, "list<{ quad: quad, text: str, score: float }>"]:
    def at(left, top, text):
        quad = [[left, top], [left + 90, top + 4], [left + 90, top + 24], [left, top + 20]]
        return {"quad": quad, "text": text, "score": 0.5}
    return [at(9, 80, "last"), at(200, 13, "first line"), at(9, 10, "The"), at(9, 40, "<b>2</b>")]

def wait(image: np.ndarray) -> int:
    time.sleep(0.2)
    return 1
'''
ANSWER = "!document.querySelector('#raw').hidden && document.querySelector('#answer').textContent"
ERROR = "!document.querySelector('#error').hidden && document.querySelector('#error').innerText"
STATUS = "document.querySelector('#status').textContent"
BARS = "[...document.querySelectorAll('.bars li')].map(li => li.innerText.split('\\n'))"
ROWS = "[...document.querySelectorAll('.rows li')].map(li => li.innerText.split('\\n'))"
DRAWN = (
    "[...document.querySelectorAll('#marks .edge')].map(e => e.getAttribute('points').split(' ')"
    ".map(p => p.split(',').map(Number)))"
)
CAPTIONS = (  # those to be seen: what they say, and where they are
    "[...document.querySelectorAll('#captions span')].filter("
    "e => getComputedStyle(e).visibility == 'visible').map(e => [e.textContent,"
    " ...(b => [b.left, b.top, b.right, b.bottom])(e.getBoundingClientRect())])"
)
LIT = "document.querySelector('.rows [aria-selected=true]')?.innerText.split('\\n')[0]"
LIT_OUTLINE = "document.querySelector('#marks .on .edge')?.getAttribute('points')"
CARDS = "[...document.querySelectorAll('#gallery button')].map(b => b.innerText.split('\\n'))"
PASTE = (  # a picture 77 pixels wide, as the clipboard would bring it
    "new Promise(done => { const canvas = document.createElement('canvas'); canvas.width = 77;"
    " canvas.toBlob(blob => { const clipboardData = new DataTransfer();"
    " clipboardData.items.add(new File([blob], 'image.png', {type: 'image/png'}));"
    " document.dispatchEvent(new ClipboardEvent('paste', {clipboardData})); done(); }); })"
)
DENIED = "document.querySelector('#denied').textContent"
COMMAND = "document.querySelector('#command code').textContent"
# Any JSON, with much that is nearly, and some that is, what the page looks for.
TOKENS = st.sampled_from(["box", "quad", "label", "text", "score", "index", "a", "__proto__"])
BOXES = st.lists(st.floats(-9, 9) | st.none(), min_size=3, max_size=5)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TOKENS, inner | BOXES, max_size=5) | BOXES
    ),
    max_leaves=20,
)


def furnish(folder: Path) -> Path:
    """Write the flows with all they name, three photographs and half a one."""
    models.resnet(folder / "classifier.onnx", width=8, size=64, classes=10)
    models.labels(folder / "classes.txt", 10)
    models.two_heads(folder / "two_heads.onnx")
    models.identity(folder / "identity.onnx", ("N", 3))
    models.detector(folder / "detector.onnx", side=96)
    write(folder / "odd.txt", "<img src=x onerror=alert(1)>\n" + "plain\n" * 9)
    write(folder / "see.py", OPERATORS)
    write(folder / "page.flow", FLOWS)
    for number, content in enumerate(photographs(3)):
        (folder / f"{number}.jpg").write_bytes(content)
    (folder / "half.jpg").write_bytes(bad()["jpeg-half"].data)
    return folder


def choose(page: Browser, flow: str) -> None:
    page.evaluate(
        f"(e => {{ e.value = {flow!r}; e.dispatchEvent(new Event('change')); }})"
        "(document.querySelector('#flow'))"
    )


def ask(page: Browser, flow: str, *pictures: Path) -> Any:
    """Choose a flow and pictures, wait for the answer and the outlines, and give the answer."""
    choose(page, flow)
    page.choose_files("#file", *pictures)
    answer = json.loads(page.wait_for(ANSWER))
    page.wait_for("!sending && !document.querySelector('#shown').hidden")
    return answer


def corners(box: list[float]) -> list[list[float]]:
    left, top, right, bottom = box
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def colours(page: str) -> list[tuple[str, str]]:
    """Each colour of text on each ground it stands on: in light, in dark, and on captions."""
    pairs = [("#ffffff", ground) for ground in json.loads(re.findall(r"COLOURS = (.*);", page)[0])]
    inks = [(ink, ground) for ink in ("ink", "soft") for ground in ("ground", "sheet", "lit")]
    inks += [("ink", "bar"), ("bad", "bad-ground"), ("bad", "sheet"), ("accent", "sheet")]
    for part in page.split("prefers-color", 1):
        named = dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        pairs += [(named[ink], named[ground]) for ink, ground in inks]
    return pairs


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)
