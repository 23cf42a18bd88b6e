"""Programs with a cursor in them, for the tests of what an editor asks."""

from __future__ import annotations

from pathlib import Path

from flowlang.editor.document import Document

CURSOR = "\N{FULL BLOCK}"
TEXT = """\
flowlang 1
use "post.py" as post
use "common.flow" as common
param size: int = 224
param models = "models"
## Two pictures.
type pair = { left: image, right: image }
## The model.
flow net = trt("resnet50.onnx", fp16)
## Classes, best first.
export flow classify(k: int = 5): bytes -> list<label> = decode -> resize(size) -> rgb
  -> normalize(imagenet) -> net -> top(k)
export flow views {
  let img = in -> decode
  let first = img -> resize(224) -> rgb -> normalize(unit) -> net -> best
  return { img, first: first }
}
schedule { net(batch=1..4) x2 }
"""
POST = '''\
"""What is done in Python."""
from typing import TypedDict

open("executed", "w").close()


class Face(TypedDict):
    age: int
    name: str


def shout(text: str, times: int = 1) -> str:
    """Say it louder."""
    return text.upper() * times


def face(text: str) -> Face:
    return {"age": len(text), "name": text}
'''
COMMON = """\
## Ready for a model.
flow prepared = resize(224) -> rgb -> normalize(imagenet)
"""


def write_used(folder: Path) -> None:
    """Write the files that TEXT uses."""
    (folder / "post.py").write_text(POST)
    (folder / "common.flow").write_text(COMMON)


def opened(folder: Path, text: str = TEXT) -> Document:
    """A document that has been checked."""
    document = Document(str(folder / "app.flow"), text)
    document.accept(*document.check())
    return document


def typed(folder: Path, end: str, text: str = TEXT) -> tuple[Document, int]:
    """A document that was checked before `end` was typed behind its text, and the cursor in it."""
    document = opened(folder, text)
    whole = f"{text}{end}"
    offset = whole.index(CURSOR)
    document.change(whole.replace(CURSOR, ""))
    return document, offset


def at(document: Document, marked: str, inside: int = 1) -> int:
    """The offset some characters into the first place where a text stands."""
    return document.text.index(marked) + inside
