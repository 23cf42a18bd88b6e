"""Ctrl-C, alarms and whatever else interrupts a caller between any two steps of a call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATORS = """
from flowlang import batched

@batched
def length(items: list[bytes]) -> list[int]:
    return [len(item) for item in items]
"""
FLOWS = """
use "lengths.py" as lengths
export flow length = lengths.length(batch=1..8) x2
"""

INTERRUPTED = """
import faulthandler, random, signal, sys, time
import flowlang

class Interrupt(BaseException): ...

def interrupt(number, frame):
    raise Interrupt

faulthandler.dump_traceback_later(60, exit=True)
numbers = random.Random(7)
"""

STORM = """
def call():
    while True:
        flow(b"x")

items = [b"x"] * 300
with flowlang.load(sys.argv[1], device="cpu") as app:
    flow = app["length"]
    ways = [
        call,
        lambda: list(flow.map(items, ahead=16)),
        lambda: list(flow.map(iter(items), ahead=16)),
        lambda: list(flow.map(items, ahead=16, deadline_s=9.0)),
    ]
    signal.signal(signal.SIGALRM, interrupt)
    count = 0
    end_s = time.monotonic() + 3.0
    while time.monotonic() < end_s:
        try:
            signal.setitimer(signal.ITIMER_REAL, numbers.uniform(2e-5, 1e-3))
            numbers.choice(ways)()
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        except Interrupt:
            count += 1
        assert flow(b"abc", deadline_s=5.0) == 3
    until_s = time.monotonic() + 5.0
    while app.scheduler.outstanding:
        assert time.monotonic() < until_s, app.scheduler.outstanding
        time.sleep(0.001)
print(count)
"""

GIVING_UP = """
with flowlang.load(sys.argv[1], device="cpu") as app:
    signal.signal(signal.SIGALRM, interrupt)
    count = 0
    end_s = time.monotonic() + 1.0
    while time.monotonic() < end_s:
        try:
            signal.setitimer(signal.ITIMER_REAL, numbers.uniform(2e-5, 2e-4))
            while True:
                app.scheduler.give_up([])
        except Interrupt:
            count += 1
        assert app["length"].submit(b"abc").result(5.0) == 3
print(count)
"""

ENDLESS = """
import signal, sys, flowlang

signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells put behind ignores it
with flowlang.load(sys.argv[1], device="cpu") as app:
    print("ready", flush=True)
    while True:
        for answer in app["length"].map([b"x"] * 1000):
            pass
"""


@pytest.fixture(scope="module")
def app_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupt")
    (folder / "lengths.py").write_text(OPERATORS)
    path = folder / "app.flow"
    path.write_text(FLOWS)
    return path


def test_interrupted_callers_leave_an_app_whole(app_file: Path) -> None:
    """Wherever it comes: no request stays inside, no instance sleeps beside work."""
    command = [sys.executable, "-c", INTERRUPTED + STORM, str(app_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_one_that_is_interrupted_at_giving_up_keeps_no_lock(app_file: Path) -> None:
    """As a map does at its end: nobody else could go on."""
    command = [sys.executable, "-c", INTERRUPTED + GIVING_UP, str(app_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_ctrl_c_ends_a_program_at_once(app_file: Path) -> None:
    """It does not wait for requests that were counted and never sent."""
    command = [sys.executable, "-c", ENDLESS, str(app_file)]
    for number in range(4):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.02 + 0.013 * number)
            os.kill(process.pid, signal.SIGINT)
            try:
                _, errors = process.communicate(timeout=20)
            finally:
                process.kill()
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
        assert process.returncode == -signal.SIGINT
