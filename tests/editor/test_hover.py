"""What is said of the thing under the cursor."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.editor.hover import hover
from tests.editor.programs import TEXT, at, opened


def said(folder: Path, marked: str, inside: int = 1, text: str = TEXT) -> str:
    document = opened(folder, text)
    found = hover(document, at(document, marked, inside))
    return found[0] if found else ""


def test_an_operator_is_explained_with_what_it_gives_here(folder: Path) -> None:
    """Its signature, its parameters, and the type of this very stage."""
    text = said(folder, "resize(size)")
    assert "resize(size, h=..., w=..., fit=stretch" in text
    assert "bilinear" in text
    assert "gives\n```flow\nimage<undecided, u8, hwc, 224x224>\n```" in text


def test_parameters_words_and_settings_are_explained(folder: Path) -> None:
    """Each by its own line of the tables."""
    text = TEXT + "flow z = decode -> resize(224, fit=letterbox) x2\n"
    assert "how the picture fills the size" in said(folder, "fit=letterbox", 1, text)
    assert "`letterbox`: fit of `resize`" in said(folder, "fit=letterbox", 6, text)
    assert "what the engine computes in" in said(folder, "fp16")
    assert "items an instance takes at once" in said(folder, "batch=1..4")


def test_flows_params_types_and_values_are_shown_as_declared(folder: Path) -> None:
    """With their documentation, and the type that was inferred."""
    text = said(folder, "net -> top")
    assert "flow net" in text
    assert "The model." in text
    assert "tensor<f32, 1000>" in text
    assert "flow classify(k: int = 5): bytes -> list<label>" in said(folder, "classify(k")
    assert "param size: int = 224" in said(folder, "resize(size)", 8)
    assert "Two pictures." in said(folder, "pair = ")
    assert "image<undecided, u8, hwc>" in said(folder, "img -> resize")
    assert "k: int = 5" in said(folder, "top(k)", 4)
    assert "image<undecided, u8, hwc>" in said(folder, "let img", 5)


def test_a_param_says_what_the_environment_made_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that the file does not have is told with where it came from."""
    monkeypatch.setenv("WIDTH", "640")
    text = 'param width: int = env("WIDTH", 320)\nflow z = decode -> resize(width)'
    assert "# 640, from environment" in said(folder, "width: int", 1, text)


def test_a_model_is_told_by_its_inputs_and_outputs(folder: Path) -> None:
    """The string that names a model shows what is in the file."""
    text = said(folder, '"resnet50.onnx"', 4)
    assert "in   data: tensor<f32, 3x224x224>" in text
    assert "out  logits: tensor<f32, 1000>" in text
    assert "batches of 4 only" in said(folder, '"fixed.onnx"', 4, 'flow z = trt("fixed.onnx")')
    assert not said(folder, '"keys.txt"', 4, 'flow z = trt("rec.onnx") -> ctc("keys.txt")')


def test_an_arrow_tells_what_passes(folder: Path) -> None:
    """Between two stages is the type that the first gives."""
    assert "image<undecided, u8, hwc, 224x224>" in said(folder, "-> rgb -> normalize(unit)")


def test_fields_tell_their_type(folder: Path) -> None:
    """A field of a record in braces, and one taken out."""
    assert "label = {\n  index: int," in said(folder, "first: first")
    text = TEXT + "flow z = views -> .first\n"
    assert "label = {" in said(folder, ".first", 2, text)


def test_other_files_are_looked_into(folder: Path) -> None:
    """A Python operator and a flow of another file are shown as they are there."""
    text = TEXT + "flow z = common.prepared -> net\nflow y = post.shout(times=3)\n"
    assert "Ready for a model." in said(folder, "common.prepared", 9, text)
    assert "Say it louder." in said(folder, "post.shout", 6, text)
    assert "`times` of `post.shout`" in said(folder, "times=3", 1, text)
    assert 'use "post.py" as post' in said(folder, "post.shout", 1, text)
    assert not (folder / "executed").exists()


def test_a_flow_mentioned_twice_gives_two_types(folder: Path) -> None:
    """A part that is used on different things says all that it gives, up to a few."""
    text = """flow part = resize(8)
export flow a = decode -> rgb -> part
export flow b = decode -> gray -> part
"""
    found = said(folder, "resize(8)", 1, text)
    assert "image<rgb, u8, hwc, 8x8>\nimage<gray, u8, hwc, 8x8>" in found


def test_a_broken_declaration_still_knows_its_words(folder: Path) -> None:
    """Where there is no tree, a word is looked up by itself."""
    text = TEXT + "flow z = decode -> ( resize net batch\n"
    assert "bilinear" in said(folder, "( resize", 3, text)
    assert "The model." in said(folder, "resize net", 8, text)
    assert "items an instance takes" in said(folder, "net batch", 5, text)


@pytest.mark.parametrize("marked", ["flowlang 1", "224", "# nothing", " = trt"])
def test_of_other_things_nothing_is_said(folder: Path, marked: str) -> None:
    """Numbers, keywords and comments speak for themselves."""
    assert not said(folder, marked, 1, f"{TEXT}# nothing\n")


def test_the_thing_that_is_told_about_is_marked(folder: Path) -> None:
    """The place that goes with the text is the word, the string or the arrow."""
    document = opened(folder)
    for marked in ("resize", '"resnet50.onnx"', "img", "->"):
        start, inside = document.text.index(marked), 1
        found = hover(document, start + inside)
        assert found is None or document.text[found[1] : found[2]] == marked


def test_every_place_can_be_asked_about(folder: Path) -> None:
    """No offset of a program with all constructs makes it fail."""
    programs = Path(__file__).parents[1] / "programs"
    for file in sorted(programs.glob("*.flow")):
        document = opened(folder, file.read_text("utf-8"))
        for offset in range(len(document.text) + 1):
            found = hover(document, offset)
            assert found is None or 0 <= found[1] <= found[2] <= len(document.text)
