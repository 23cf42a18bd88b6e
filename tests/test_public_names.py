"""The names the package offers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import flowlang
from flowlang import diagnostics


def test_the_names_are_in_order_and_told_once() -> None:
    """`__all__` is sorted, so that a new name has one place."""
    assert flowlang.__all__ == sorted(set(flowlang.__all__))


@pytest.mark.parametrize("name", flowlang.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    """Each public name is there, and listed by `dir`."""
    assert getattr(flowlang, name) is not None
    assert name in dir(flowlang)


def test_every_exception_is_public() -> None:
    """Whatever flowlang raises can be caught by a public name."""
    raised = {
        name
        for name, kind in inspect.getmembers(diagnostics, inspect.isclass)
        if issubclass(kind, Exception)
    }
    assert raised <= set(flowlang.__all__)


def test_type_checkers_see_the_same_names() -> None:
    """What is imported for type checkers is what `__all__` promises."""
    tree = ast.parse(Path(flowlang.__file__).read_text("utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen | {"__version__"} == set(flowlang.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    """A misspelt name fails as it does for any module."""
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        flowlang.__getattr__("laod")
