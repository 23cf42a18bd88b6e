"""What the tests of the wire protocols serve, and a server of one face for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serve.server import Server, running, write, write_flows

OPERATORS = """
import time
from typing import Annotated, NamedTuple, Optional, TypedDict

import numpy as np

Pairs = Annotated[np.ndarray, "tensor<u8, ?x2>"]
Levels = Annotated[np.ndarray, "tensor<u8, 3>"]

class Facts(NamedTuple):
    size: int
    start: str
    ratio: float
    is_long: bool

def double(number: int) -> int:
    return 2 * number

def half(number: float) -> float:
    return number / 2

def shout(text: str) -> str:
    return text.upper()

def negate(flag: bool) -> bool:
    return not flag

def slow(data: bytes) -> bytes:
    time.sleep(0.5)
    return data

def fail(data: bytes) -> bytes:
    raise RuntimeError("a secret of the server")

def facts(data: bytes) -> Facts:
    return Facts(len(data), data[:3].decode(), len(data) / 8, len(data) > 10)

def zeros(rows: int) -> Pairs:
    return np.zeros((rows, 2), np.uint8)

def total(numbers: list[float]) -> float:
    return sum(numbers)

def joined(one: bytes, other: bytes) -> bytes:
    return one + b"+" + other

def reversed_rows(rows: Pairs) -> Pairs:
    return rows[::-1]

def levels(given: Levels) -> Levels:
    return given

def told(data: bytes, *, item: int, sequence_id: int, headers: str) -> str:
    return f"{item} {sequence_id} {headers}"

class Hinted(TypedDict):
    data: bytes
    hint: Optional[bytes]

def parts(data: list[bytes]) -> bytes:
    return b"+".join(data)

def hinted(given: Hinted) -> bytes:
    return given["data"] + b"?" + (given["hint"] or b"none")
"""

TYPES = """
use "operators.py" as ops
export flow double = ops.double
export flow half = ops.half
export flow shout = ops.shout
export flow negate = ops.negate
export flow slow = ops.slow
export flow fail = ops.fail
export flow facts = ops.facts
export flow zeros = ops.zeros
export flow total = ops.total
export flow reversed = ops.reversed_rows
export flow levels = ops.levels
export flow told(item: int = 1, sequence_id: int = 2, headers: str = "none"): bytes -> str =
  ops.told(item=item, sequence_id=sequence_id, headers=headers)
export flow parts = ops.parts
export flow hinted = ops.hinted
export flow joined(other: bytes): bytes -> bytes { return { one: in, other: other } -> ops.joined }
export flow classes(k: int = 2): bytes -> list<label> =
  decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("classifier.onnx") -> softmax -> top(k)
export flow narrow = ops.slow
schedule { narrow(queue=1) }
"""

# One face with nothing beside it. It says what `flowlang serve` says, which the tests wait for.
PROGRAM = """
import asyncio, os, signal, sys
import flowlang, uvloop
from flowlang.serve.inference import Inference
from flowlang.serve.setup import Setup
from flowlang.serve.{module} import {name} as Face

async def main(gate, *paths):
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    inference = Inference()
    setup = Setup(host="127.0.0.1", port=0, grace_s=10.0, max_body_bytes=1 << 20)
    face = Face(inference, setup, port=0)
    print("loading, on http://127.0.0.1:%d" % await face.start(), flush=True)
    while gate and not os.path.exists(gate):
        await asyncio.sleep(0.01)
    app = flowlang.load(*paths)
    inference.let_in(app)
    print("serving", *inference.models, flush=True)
    await stopped.wait()
    inference.refuse()
    in_time = await face.stop(setup.grace_s)
    app.close(1.0)
    return 0 if in_time else 1

sys.exit(uvloop.run(main(*sys.argv[1:])))
"""
FACES = {"grpc": "GrpcServer", "thrift": "ThriftServer"}


def write_types(folder: Path) -> Path:
    """`all.flow` with its models, and `types.flow`, whose flows take and give every type."""
    write_flows(folder)
    write(folder / "operators.py", OPERATORS)
    return write(folder / "types.flow", TYPES)


@contextmanager
def facing(folder: Path, face: str, *files: str, gate: Path | None = None) -> Iterator[Server]:
    """A server with one face, `grpc` or `thrift`; with `gate` it loads once that file is there."""
    program = PROGRAM.format(module=face, name=FACES[face])
    paths = [str(folder / file) for file in files]
    with running(folder, "-c", program, str(gate or ""), *paths) as server:
        yield server
