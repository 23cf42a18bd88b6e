"""What single steps cost, for pytest-benchmark: `python -m pytest benchmarks/test_overhead.py`.

They are no part of `make test`: what a step costs is compared between two runs of one machine
(`--benchmark-save`, `--benchmark-compare`), never against a fixed number.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from examples.models import resnet
from flowlang import App, load
from flowlang.diagnostics import Source
from flowlang.plan.check import Plan, check_source, compile_source
from flowlang.plan.explain import explain_physical
from flowlang.plan.physical import Machine, lower
from flowlang.syntax.format import format_program
from flowlang.syntax.parse import parse, read_source
from tests.pictures import photographs

STREET = Path(__file__).parents[1] / "tests" / "programs" / "p10_street.flow"
ONE_LINER = 'decode -> resize(224) -> rgb -> trt("resnet50.onnx", fp16, batch=1..4) x4\n'
IN_FLIGHT = 64


@pytest.fixture(scope="module")
def one_liner(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The smallest program, beside a model of ResNet-50's shape."""
    folder = tmp_path_factory.mktemp("one-liner")
    resnet(folder / "resnet50.onnx", depth=50, width=16)
    (folder / "main.flow").write_text(ONE_LINER)
    return read_source(folder / "main.flow")


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """A running flow whose only stage returns its input."""
    path = tmp_path_factory.mktemp("echo") / "echo.flow"
    path.write_text("flow echo: bytes -> bytes = pass\n")
    with load(path, device="cpu") as app:
        yield app


def test_parse_one_liner(benchmark: BenchmarkFixture, one_liner: Source) -> None:
    """Text to tree, for the smallest program."""
    assert benchmark(parse, one_liner).pipeline is not None


def test_parse_street(benchmark: BenchmarkFixture) -> None:
    """Text to tree, for the longest program of the tests."""
    source = read_source(STREET)
    assert len(benchmark(parse, source).items) > 10


def test_format_street(benchmark: BenchmarkFixture) -> None:
    """Tree to canonical text, for the longest program of the tests."""
    program = parse(read_source(STREET))
    assert "flow street" in benchmark(format_program, program)


def test_check_one_liner(benchmark: BenchmarkFixture, one_liner: Source) -> None:
    """Text to typed plan, reading the header of a real model."""
    plan, _ = benchmark(check_source, one_liner)
    assert isinstance(plan, Plan)


def test_explain_one_liner(benchmark: BenchmarkFixture, one_liner: Source) -> None:
    """Typed plan to stages, and stages to text."""
    plan = compile_source(one_liner)
    assert "ONNX Runtime" in benchmark(lambda: explain_physical(lower([plan], Machine(2))))


def test_blocking_call(benchmark: BenchmarkFixture, echo: App) -> None:
    """There and back for one caller that waits."""
    assert benchmark(echo, b"x") == b"x"


def test_future_call(benchmark: BenchmarkFixture, echo: App) -> None:
    """There and back through a Future."""
    assert benchmark(lambda: echo.submit(b"x").result()) == b"x"


def test_many_in_flight(benchmark: BenchmarkFixture, echo: App) -> None:
    """64 Futures at once: divide by 64 for the cost of one."""

    def burst() -> list[Any]:
        futures: list[Future[Any]] = [echo.submit(b"x") for _ in range(IN_FLIGHT)]
        return [future.result() for future in futures]

    assert benchmark(burst) == [b"x"] * IN_FLIGHT


@pytest.mark.parametrize("operators", ["decode", "decode -> resize(224) -> rgb"])
def test_picture(benchmark: BenchmarkFixture, tmp_path: Path, operators: str) -> None:
    """A JPEG of 500x375 through the operators on the CPU, a call at a time."""
    path = tmp_path / "picture.flow"
    path.write_text(f"{operators}\n")
    picture = photographs(1)[0]
    with load(path, device="cpu") as app:
        assert benchmark(app, picture).ndim == 3
