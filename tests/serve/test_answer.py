"""Results as they go over the wire."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlang.serve.answer import to_json

TEXTS = st.text(st.characters())  # half a surrogate pair too
PARTS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    PARTS, lambda of: st.lists(of, max_size=4) | st.dictionaries(TEXTS, of, max_size=4)
)


def sent(value: Any) -> Any:
    """What a client reads of a value: no number that JSON has not, and no text that is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [sent(part) for part in value]
    if isinstance(value, dict):
        return {sent(name): sent(part) for name, part in value.items()}
    return value


@given(VALUES)
def test_any_value_is_read_as_it_was(value: Any) -> None:
    """Whichever library writes it: what one refuses the other can."""
    assert json.loads(to_json(value)) == sent(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"index": 1, "label": "größer", "score": 0.1}, '{"index":1,"label":"größer","score":0.1}'),
        ([1.0, float("nan"), float("-inf"), -0.5], "[1.0,null,null,-0.5]"),
        ([1 << 70, float("inf")], "[1180591620717411303424,null]"),
        ("\ud800 and \n", '"? and \\n"'),
        ({"of": {"depth": json.loads("[" * 300 + "]" * 300)}}, None),
        ({1: 2}, '{"1":2}'),
    ],
)
def test_json_is_compact(value: Any, text: str | None) -> None:
    """UTF-8, no blanks, null for what is no number."""
    assert to_json(value).decode() == (text or json.dumps(value, separators=(",", ":")))
