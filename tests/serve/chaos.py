"""A server under all at once: clients good and bad, killed processes, files that change.

`python -m tests.serve.chaos` is the long form of tests/serve/test_chaos.py. What each client does
follows from the seed and the number of its request; when it does it does not.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import flowlang
from flowlang.serve.answer import encode
from tests.serve.chaos_clients import BAD, GOOD, PICTURES, Asked, Ports, version_of
from tests.serve.processes import kill, memory_bytes, open_files, processes, wait_gone
from tests.serve.server import Server, free_port, serving, wait_until

CLIENTS = 16
GROWTH_BYTES = 64 << 20  # what glibc keeps of the memory that large bodies have used
GROWTH_FILES = 4
RETRY_S = 0.2
SLACK_S = 3.0  # until clients have connected again: those of gRPC pause between their tries

OPERATORS = """
import time
import zlib
from typing import TypedDict

class Told(TypedDict):
    number: str
    sum: int
    version: int

def _note(data: bytes) -> None:
    with open({log!r}, "ab", buffering=0) as file:
        file.write(data[:12])

def tell(data: bytes) -> Told:
    _note(data)
    return {{"number": data[:12].decode(), "sum": zlib.crc32(data), "version": {version}}}

def nap(data: bytes) -> bytes:
    _note(data)
    time.sleep(0.02)
    return data

def same(data: bytes) -> bytes:
    _note(data)
    return data
"""
FLOW = """
use "operators.py" as ops
export flow tell = ops.tell
export flow nap = ops.nap
export flow same = ops.same
export flow narrow = ops.nap
export flow small = decode -> resize(8) -> rgb
schedule { tell(queue=2000) same(queue=2000) narrow(queue=1) }
"""
BROKEN = (
    "export flow tell = no.such\n",
    "export flow",
    FLOW.replace("resize(8)", "resise(8)"),
    "\0\1\2",
)


@dataclass
class Storm:
    """One run: what was asked, what was told, and what was done to the server meanwhile."""

    folder: Path
    server: Server
    ports: Ports
    seed: int
    told: list[Asked] = field(default_factory=list)
    kills: list[tuple[str, float, float]] = field(default_factory=list)  # role, from, until
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    version: int = 0

    # What clients do

    def ask(self, requests: int, meanwhile: Callable[[], None]) -> None:
        """Ask so many, and on until what is done `meanwhile` is done."""
        is_done = threading.Event()
        stop_at = len(self.told) + requests

        def ask_on() -> None:
            while not (is_done.is_set() and len(self.told) >= stop_at):
                self.told.append(asked := self._ask_one(next(self.numbers)))
                if asked.outcome in ("503", "unavailable"):
                    time.sleep(RETRY_S)  # as a client should

        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask_on) for _ in range(CLIENTS)]
            try:
                meanwhile()
            finally:
                is_done.set()
            for asked in asking:
                asked.result()

    def _ask_one(self, number: int) -> Asked:
        dice = random.Random(f"{self.seed} {number}")
        kinds = GOOD if dice.random() < 0.7 else BAD
        name = dice.choice(list(kinds))
        began_s = time.monotonic()
        try:
            outcome = kinds[name](self.ports, f"{number:012d}", dice)
        except Exception as error:  # an answer that is none
            outcome = f"wrong: {error!r}"
        return Asked(number, name, outcome, began_s, time.monotonic())

    # What is done to the server

    def write_good(self) -> None:
        """A new version, which is to take over."""
        self.version += 1
        write_version(self.folder, self.version)

    def take_over(self) -> None:
        self.write_good()
        self._wait_version()

    def _wait_version(self) -> None:
        wait_until(lambda: version_of(self.ports.http) == self.version)

    def write_broken(self, which: int) -> None:
        """A version that does not check: the one before stays."""
        told = self.server.errors.count("kept as it was")
        (self.folder / "all.flow").write_text(BROKEN[which % len(BROKEN)])
        wait_until(lambda: self.server.errors.count("kept as it was") > told)

    def kill_front(self, which: int) -> None:
        began_s = time.monotonic()
        kill(processes(self.server).fronts[which % 2])
        processes(self.server)
        self.kills.append(("front", began_s, time.monotonic() + SLACK_S))

    def kill_engine(self) -> None:
        self._kill_engine(lambda: None)

    def kill_engine_while_broken(self, which: int) -> None:
        """It cannot be started again until the file is right again."""

        def mend() -> None:
            told = self.server.errors.count("the engine ended with status 1")
            wait_until(lambda: self.server.errors.count("the engine ended with status 1") > told)
            self.write_good()

        self.write_broken(which)
        self._kill_engine(mend)

    def _kill_engine(self, mend: Callable[[], None]) -> None:
        began_s = time.monotonic()
        kill(processes(self.server).engine)
        mend()
        self._wait_version()
        self.kills.append(("engine", began_s, time.monotonic() + SLACK_S))

    def rage(self, requests: int) -> None:
        """Do it all, again and again until so many have been asked; once at least."""
        for which in itertools.count():
            self.take_over()
            self.kill_front(which)
            self.kill_engine()
            self.write_broken(which)
            self.kill_front(which + 1)
            self.take_over()
            self.kill_engine_while_broken(which)
            if len(self.told) >= requests:
                return

    def calm(self, requests: int) -> dict[int, tuple[int, int]]:
        """Ask while nothing dies. What each process has then: bytes, and open files."""
        self.ask(requests, self.take_over)
        while self.ports.kept:
            self.ports.kept.pop().close()
        self.server.wait_inside(0)
        return {pid: (memory_bytes(pid), open_files(pid)) for pid in processes(self.server).all}

    # What must be so

    def check_answers(self) -> None:
        """Good requests were answered right, or it is known why not. Bad ones were refused."""
        wrong = [asked for asked in self.told if not self._is_explained(asked)]
        assert not wrong, f"seed {self.seed}: {wrong[:10]} and {len(wrong) - 10} more"
        good = [asked for asked in self.told if asked.kind in GOOD]
        right = sum(asked.outcome == "right" for asked in good)
        assert right > 0.5 * len(good), Counter(asked.outcome for asked in good)

    def _is_explained(self, asked: Asked) -> bool:
        if asked.outcome in ("right", "refused", "429", "504"):
            return True
        if asked.outcome == "cut" and asked.kind in BAD:
            return True
        roles = {"cut": ("front",), "503": ("engine", "front"), "unavailable": ("engine",)}
        return any(
            role in roles.get(asked.outcome, ())
            and asked.began_s < until_s
            and from_s < asked.ended_s
            for role, from_s, until_s in self.kills
        )

    def check_none_worked_twice(self) -> None:
        worked = (self.folder / "worked").read_bytes()
        counted = Counter(worked[at : at + 12] for at in range(0, len(worked), 12))
        del counted[b"version".ljust(12)]
        twice = [number for number, count in counted.items() if count > 1]
        assert not twice, f"seed {self.seed}: {twice[:10]}"

    def check_flat(
        self, before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]
    ) -> None:
        assert before.keys() == after.keys(), "a process ended by itself"
        for pid, (memory, files) in after.items():
            assert memory - before[pid][0] < GROWTH_BYTES, (before, after)
            assert files - before[pid][1] <= GROWTH_FILES, (before, after)


def storm(folder: Path, requests: int, seed: int) -> Storm:
    """Run one, and look whether all is as it should be."""
    grpc_port, thrift_port = free_port(), free_port()
    options = ["--ingest", "2", "--watch", "--device", "cpu", "--thrift-flow", "tell"]
    options += ["--grpc-port", str(grpc_port), "--thrift-port", str(thrift_port)]
    write_version(folder, 0)
    file = folder / "all.flow"
    with flowlang.load(file, device="cpu") as app:
        small = [encode(app["small"](picture))[1] for picture in PICTURES]
    with serving(folder, *options, str(file)) as server:
        server.outlast(120 + requests / 10)
        server.wait_ready()
        found = Storm(folder, server, Ports(server.port, grpc_port, thrift_port, small), seed)
        found.ask(requests, lambda: found.rage(requests))
        calm = [found.calm(requests // 10) for _ in range(2)]
        found.check_answers()
        found.check_none_worked_twice()
        found.check_flat(*calm)
        inside = processes(server)
        server.signal()
        assert server.wait() == 0
    wait_gone(*inside.all)
    return found


def write_version(folder: Path, version: int) -> None:
    operators = OPERATORS.format(log=str(folder / "worked"), version=version)
    (folder / "operators.py").write_text(operators)
    (folder / "all.flow").write_text(FLOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"{given.requests} requests, seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = storm(Path(folder), given.requests, given.seed)
    counted = Counter((asked.kind, asked.outcome) for asked in found.told)
    for (kind, outcome), count in sorted(counted.items()):
        print(f"{kind:20} {outcome:12} {count:7}")
    killed = Counter(role for role, _, _ in found.kills)
    print(f"{len(found.told)} in all; killed: {dict(killed)}; versions: {found.version}")


if __name__ == "__main__":
    main()
