"""The example that reads pages: what is drawn on them, where, and in which order."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples import models
from flowlang import Flow, load
from tests.pages import pages

FLOW = Path(models.__file__).parent / "read_text.flow"


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    """The flow with its models, loaded."""
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("needs rapidocr")
    folder = tmp_path_factory.mktemp("read_text")
    models.text(folder / "models")
    with load(shutil.copy(FLOW, folder), device="cpu") as app:
        yield app.flows["read_text"]


@pytest.mark.parametrize("name", ["receipt", "poster", "small", "strip", "tall", "sign"])
def test_a_page_is_read_letter_for_letter(read: Flow, name: str) -> None:
    """Print on paper, on a photograph, aslant, running upwards, in one long line: all in order."""
    page = pages()[name]
    assert tuple(line["text"] for line in read(page.data)) == page.lines


def test_lines_are_where_they_were_drawn(read: Flow) -> None:
    """A quad is clockwise from a line's top left corner, in whole pixels of the page."""
    quads = np.asarray([line["quad"] for line in read(pages()["small"].data)])
    middles = quads.mean(1)
    np.testing.assert_allclose(middles[:, 1], [30, 68, 106, 144], atol=3)
    np.testing.assert_allclose(quads[:, 0, 0], 20, atol=3)
    assert (quads[:, 1, 0] > quads[:, 0, 0]).all()
    assert (quads[:, 3, 1] > quads[:, 0, 1]).all()
    assert (quads == quads.round()).all()


def test_a_page_without_text_has_no_lines(read: Flow) -> None:
    """Nothing that is legible: an empty list."""
    assert read(pages()["handwriting"].data) == []


def test_lines_are_sure(read: Flow) -> None:
    """What the recogniser itself is not sure of is left out."""
    assert all(line["score"] >= 0.5 for line in read(pages()["no text"].data))
