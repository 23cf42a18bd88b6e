"""Marks for operators in Python: what the checker cannot tell from annotations alone.

Layer 0. The checker looks for their names in the text of a file; calling them changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def batched(function: Function) -> Function:
    """Mark an operator that takes a list of items and gives a list of results.

    The items are of different requests; `batch=1..32` where it is mentioned bounds their number.
    Where a call fails, the items are tried one by one, so that only the guilty ones fail.
    """
    return function
