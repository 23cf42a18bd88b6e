"""Operators on all rows of a batch give what they give for each row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flowlang.diagnostics import StageFailed
from flowlang.plan.files import compile_file
from flowlang.plan.graph import Node
from flowlang.runtime.cpu import RowChain
from flowlang.runtime.host import row_work_of, work_of
from tests.standins import write_model

CHAINS = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "l2": "l2",
    "argmax": "argmax",
    "best": 'best(names="names.txt")',
    "top": "top(3)",
    "all": "top(7)",
    "too many": "top(9)",
    "named": 'softmax -> top(2, names="names.txt")',
    "worst": "l2 -> sigmoid -> argmax",
}
CLASSES = 7
ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.just(CLASSES)),
    # Few values, so that equals are common.
    elements=st.sampled_from([0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf")]),
)
SPREAD = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.just(CLASSES)),
    elements=st.floats(-50, 50, width=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    write_model(root / "net.onnx", [("data", "f32", ("N", 4))], [("scores", "f32", ("N", CLASSES))])
    (root / "names.txt").write_text("one\ntwo\nthree\n")
    return root


def nodes_of(folder: Path, chain: str) -> list[Node]:
    path = folder / "app.flow"
    path.write_text(f'trt("net.onnx") -> {chain}\n')
    flow = compile_file(path).flows[0]
    return [n for n in flow.nodes() if n is not flow.input and n.model is None]


def same(one: Any, other: Any) -> bool:
    return str(one) == str(other)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("rows", [ROWS, SPREAD], ids=["equals", "spread"])
def test_rows_together_give_what_each_gives_alone(folder: Path, name: str, rows: Any) -> None:
    """Whatever the scores: equals, NaN and infinities included."""
    nodes = nodes_of(folder, CHAINS[name])
    chain = RowChain(nodes, dict.fromkeys(nodes, ()), {})
    works = [work_of(n, {}) for n in nodes]

    @settings(max_examples=60)
    @given(rows)
    def check(values: Any) -> None:
        def alone(row: Any) -> Any:
            for work in works:
                row = work(row)
            return row

        with np.errstate(all="ignore"):
            together = chain.of_rows(values, [None] * len(values))
            assert len(together) == len(values)
            for found, row in zip(together, values, strict=True):
                assert same(found, alone(row))

    check()


def test_what_needs_the_item_is_done_singly(folder: Path) -> None:
    """Operators whose parameters come with requests, or that sort lists, have no work for rows."""
    path = folder / "live.flow"
    path.write_text('export flow f(k: int) = trt("net.onnx") -> top(k)\n')
    flow = compile_file(path).flows[0]
    (node,) = [n for n in flow.nodes() if n.op == "top"]
    assert row_work_of(node) is None


def test_items_that_are_no_rows_are_done_singly(folder: Path) -> None:
    """Where a model gives matrices each gets what it gets alone, an error of its own included."""
    nodes = nodes_of(folder, "softmax -> top(2)")
    chain = RowChain(nodes, dict.fromkeys(nodes, ()), {})
    values = np.zeros((2, 3, CLASSES), np.float32)
    outcomes = chain.of_rows(values, [None, None])
    assert [str(o) for o in outcomes] == [str(chain.through(v, None)) for v in values]
    assert all(isinstance(o, StageFailed) for o in outcomes)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "l2"])
def test_a_number_an_item_has_no_row_to_share(folder: Path, name: str) -> None:
    """Of a model that gives each item one number, no item's is held against another's."""
    nodes = nodes_of(folder, name)
    chain = RowChain(nodes, dict.fromkeys(nodes, ()), {})
    values = np.asarray([0.5, 1.5, 2.5], np.float32)
    assert chain.of_rows(values, [None] * 3) == [chain.through(v, None) for v in values]
