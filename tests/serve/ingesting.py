"""Servers with `--ingest`: their flows, and what their engine has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serve.server import (
    Server,
    serving,
    write,
    write_flows,
)

OPERATORS = """
import ctypes, time

from flowlang import BadRequest

class Word(str):
    pass

class NotFunny(BadRequest):
    code = "not-funny"
    http_status = 422

def judge(joke: bytes) -> bytes:
    raise NotFunny("that joke is old")

def slow(seconds: bytes) -> bytes:
    time.sleep(float(seconds))
    return seconds

def hold(seconds: bytes) -> bytes:
    ctypes.PyDLL(None).sleep(int(seconds))  # with the lock of the interpreter
    return seconds

def word(data: bytes) -> str:
    return Word(data.decode()) if data.startswith(b"odd") else data.decode()
"""
FLOWS = """
use "operators.py" as ops
export flow echo = pass
export flow slow = ops.slow
export flow hold = ops.hold
export flow word = ops.word
export flow judge = ops.judge
schedule { echo(queue=1000) }
"""
HOLDING = FLOWS + 'export flow held = trt("identity.onnx", batch=1..64, wait=60s)\n'
TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
INFERENCE = json.dumps({"inputs": [TENSOR]}).encode()


def write_ingested(folder: Path) -> Path:
    """Models, `light.flow` of operators, and `holding.flow`, which has one more that waits."""
    write_flows(folder)
    write(folder / "operators.py", OPERATORS)
    write(folder / "light.flow", FLOWS)
    write(folder / "holding.flow", HOLDING)
    return folder


@contextmanager
def ingesting(folder: Path, *options: str, file: str = "light.flow") -> Iterator[Server]:
    command = ("--ingest", "2", "--device", "cpu", *options, str(folder / file))
    with serving(folder, *command) as server:
        yield server.wait_ready()


def inside(server: Server, flow: str) -> int:
    """How many requests of a flow the engine has."""
    metrics = server.client.get("/metrics").text
    found = re.search(f'^flowlang_requests_inside{{flow="{flow}"}} (.+)', metrics, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))
