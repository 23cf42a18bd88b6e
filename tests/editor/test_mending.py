"""Quick fixes: the help of a diagnostic as an edit, and never one that leaves it standing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.diagnostics import Diagnostic
from flowlang.editor.mending import Mend, mend
from tests.cases import Case, all_cases, check
from tests.standins import furnish

CASES = [c for c in all_cases() if c.slug not in ("too-large", "too-deep")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnish(tmp_path))


def mended(text: str, edit: Mend) -> str:
    return text[: edit.span.start] + edit.text + text[edit.span.end :]


def told(text: str, slug: str) -> Diagnostic:
    return next(d for d in check(text) if d.slug == slug)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fix_mends_what_it_is_for(case: Case) -> None:
    """After the edit, the same is not said at the same place again."""
    for found in check(case.text, case.options):
        edit = mend(found)
        if edit is None or found.span.source.text != case.text:
            continue
        after = check(mended(case.text, edit), case.options)
        assert (found.slug, found.message, found.span.start) not in {
            (d.slug, d.message, d.span.start) for d in after
        }


@pytest.mark.parametrize(
    ("text", "slug", "right"),
    [
        ("decode -> resise(3)", "unknown-operator", "decode -> resize(3)"),
        ("decode -> .hight", "unknown-field", "decode -> .height"),
        ("decode -> resize(3, ft=pad)", "unknown-parameter", "decode -> resize(3, fit=pad)"),
        ('decode -> trt("model.onnx", fp61)', "unknown-word", 'decode -> trt("model.onnx", fp16)'),
        ('decode -> trt("modle.onnx")', "missing-file", 'decode -> trt("model.onnx")'),
        (
            'param models = "models"\nflow f = trt("{models}/resnet5.onnx")',
            "missing-file",
            'param models = "models"\nflow f = trt("{models}/resnet50.onnx")',
        ),
        (
            'param models = "models"\nflow f = trt("{model}/resnet50.onnx")',
            "unknown-name",
            'param models = "models"\nflow f = trt("{models}/resnet50.onnx")',
        ),
        ("decode rgb", "missing-arrow", "decode -> rgb"),
        (
            'decode -> trt("model.onnx")',
            "type-mismatch",
            'decode -> resize(224) -> rgb -> trt("model.onnx")',
        ),
        ('trt("fixed.onnx", batch=8)', "fixed-batch", 'trt("fixed.onnx", batch=4)'),
        ("flow f: imag -> image = pass", "unknown-type", "flow f: image -> image = pass"),
        ("flow f: lst<int> -> int = pass", "unknown-type", "flow f: list<int> -> int = pass"),
        ("decode -> resize(fit)", "unknown-word", "decode -> resize(fit=shorter)"),
        ("net = decode", "unexpected-token", "flow net = decode"),
    ],
)
def test_the_edit_is_the_one_that_is_meant(text: str, slug: str, right: str) -> None:
    """A name, a part of a path, a missing stage: each goes where it belongs."""
    edit = mend(told(text, slug))
    assert edit is not None
    assert mended(text, edit) == right


def test_help_that_only_explains_is_no_edit() -> None:
    """Words for people are not put into the program."""
    assert mend(told('decode -> trt("a\\qb")', "bad-escape")) is None
    assert mend(told("flow f = rgb\nflow f = rgb", "duplicate-name")) is None
    assert mend(told("decode -> resize(size)", "unknown-word")) is None


def test_hints_are_not_applied_unasked() -> None:
    """A sure mend of an error is preferred; taking up a hint is a choice."""
    hint = mend(told('decode -> resize(224) -> rgb -> trt("model.onnx")', "unscaled-input"))
    assert hint is not None
    assert not hint.is_preferred
    error = mend(told("decode -> resise(3)", "unknown-operator"))
    assert error is not None
    assert error.is_preferred
    assert error.title == "write `resize`"
