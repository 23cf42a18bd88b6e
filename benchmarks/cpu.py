"""The tables of the README on a CPU, each number beside the limit measured in the same rounds.

    python -m benchmarks.cpu [--rounds 5] [--seconds 4] [--only classify,overhead,batching,startup]

The variants of a job take turns, round after round, and ratios are taken within a round: a machine
that is slow for a minute is slow for all of them. What other processes used meanwhile is noted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.classifier import prepare, session
from benchmarks.load import (
    Result,
    Sampler,
    asyncio_clients,
    fastest_loop,
    machine_cpu_seconds,
    table,
    thread_clients,
)
from examples.models import mlp, resnet
from flowlang import Flow, load
from tests.pictures import photographs

CLIENTS, MANY = 10, 64
QUIET_CORES = 0.15  # what others may use without the machine counting as noisy
RESULTS = Path(__file__).parent / "results" / "cpu.json"
PACKAGES = ("numpy", "opencv-python-headless", "onnxruntime", "onnx", "lark", "click", "uvloop")

Variants: TypeAlias = Mapping[str, Callable[[], Result]]


class Run:
    """One run: its folder of models and flows, how long it measures, what it found."""

    def __init__(self, folder: Path, rounds: int, seconds: float, patience_s: float) -> None:
        self.folder = folder
        self.rounds = rounds
        self.seconds = seconds
        self.patience_s = patience_s
        self.cores = len(os.sched_getaffinity(0))
        self.found: dict[str, Any] = {"machine": machine(), "jobs": {}}

    def flow(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.flow"
        path.write_text(text + "\n")
        return path

    def wait_for_quiet(self) -> None:
        """Wait until others leave the machine alone, as long as there is patience left."""
        while self.patience_s > 0:
            start_s, busy_s = time.perf_counter(), machine_cpu_seconds()
            time.sleep(0.5)
            passed_s = time.perf_counter() - start_s
            if (machine_cpu_seconds() - busy_s) / passed_s < QUIET_CORES:
                return
            self.patience_s -= passed_s

    def measure(self, variants: Variants, rounds: int | None = None) -> dict[str, list[Result]]:
        """Every variant once a round, each round starting with another one."""
        found: dict[str, list[Result]] = {name: [] for name in variants}
        order = list(variants)
        for number in range(rounds or self.rounds):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                self.wait_for_quiet()
                found[name].append(variants[name]())
        return found

    def note(
        self, job: str, found: Mapping[str, list[Result]], ratios: Mapping[str, list[float]]
    ) -> None:
        """Keep a job's findings: the median round of each variant, and the ratios of rounds."""
        print(f"\n### {job}\n\n{table([middle(r) for r in found.values()])}\n")
        for what, values in ratios.items():
            print(f"- {what}: **{spread(values)}**", flush=True)
        others = [r.usage["others"] for results in found.values() for r in results]
        self.found["jobs"][job] = {
            "ratios": {what: summary(values) for what, values in ratios.items()},
            "others_cores": round(statistics.median(others), 2),
            "is_noisy": statistics.median(others) > QUIET_CORES,
            "rounds": {name: [r.as_json() for r in results] for name, results in found.items()},
        }


def machine() -> dict[str, Any]:
    """Processor and versions, to stand beside every number."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "flowlang": version("flowlang"),
        **{name: version(name) for name in PACKAGES},
    }


def middle(results: Sequence[Result]) -> Result:
    """The round of the median rate."""
    return sorted(results, key=lambda r: r.qps)[len(results) // 2]


def summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def rates(found: Mapping[str, list[Result]], name: str, over: str) -> list[float]:
    """A variant's rate over another's, round by round."""
    return [a.qps / b.qps for a, b in zip(found[name], found[over], strict=True)]


def latencies(found: Mapping[str, list[Result]], name: str, over: str) -> list[float]:
    """A variant's median latency over another's, round by round."""
    return [a.p50_ms / b.p50_ms for a, b in zip(found[name], found[over], strict=True)]


# A classifier: JPEG to logits


def independent_loops(run: Run, model: Path, inputs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A call for as many threads as cores, each with an ONNX Runtime of one thread to itself."""
    own = threading.local()
    turns = itertools.cycle([session(model, 1) for _ in range(run.cores)])

    def call(item: Any) -> Any:
        if not hasattr(own, "session"):
            own.session = next(turns)
        return own.session.run(None, {"data": inputs(item)})

    return call


def behind_a_lock(model: Path) -> Callable[[bytes], Any]:
    """Client threads prepare their pictures, and share one ONNX Runtime one at a time."""
    shared, lock = session(model), threading.Lock()

    def call(picture: bytes) -> Any:
        values = prepare(picture)
        with lock:
            return shared.run(None, {"data": values})

    return call


def classify(run: Run) -> None:
    """ResNet-50 from JPEG to logits, against loops that have nothing to schedule."""
    model = resnet(run.folder / "resnet50.onnx", depth=50, width=64)
    pictures = photographs(64)
    text = 'decode -> resize(224) -> rgb -> normalize(imagenet) -> trt("resnet50.onnx"{})'
    default = session(model)

    def loop_alone(picture: bytes) -> Any:
        return default.run(None, {"data": prepare(picture)})

    def threads(call: Callable[[bytes], Any], clients: int, what: str) -> Callable[[], Result]:
        return partial(thread_clients, what, call, pictures, clients, run.seconds)

    def coroutines(flow: Flow, what: str) -> Callable[[], Result]:
        return partial(asyncio_clients, what, flow.acall, pictures, CLIENTS, run.seconds)

    with ExitStack() as apps:
        plain = apps.enter_context(app(run, "plain", text.format("")))
        batched = apps.enter_context(app(run, "batched", text.format(", batch=1..4")))
        check_answers(plain, loop_alone, pictures[0])
        loops = independent_loops(run, model, prepare)
        found = run.measure(
            {
                "limit": threads(loops, run.cores, "limit: an independent loop on every core"),
                "baseline": threads(
                    behind_a_lock(model), CLIENTS, "baseline: ONNX Runtime behind a lock, threads"
                ),
                "asyncio": coroutines(plain, "flowlang, asyncio"),
                "threads": threads(plain, CLIENTS, "flowlang, threads"),
                "batched asyncio": coroutines(batched, "flowlang batch=1..4, asyncio"),
                "batched threads": threads(batched, CLIENTS, "flowlang batch=1..4, threads"),
                "loop alone": threads(loop_alone, 1, "one loop, ONNX Runtime's default threads"),
                "alone": threads(plain, 1, "flowlang, one caller"),
            }
        )
    ours = ("asyncio", "threads", "batched asyncio", "batched threads")
    ratios = {f"{n} over the limit": rates(found, n, "limit") for n in ours}
    ratios |= {f"{n} over the baseline": rates(found, n, "baseline") for n in ("limit", *ours)}
    ratios["p50 of one caller over the loop's"] = latencies(found, "alone", "loop alone")
    run.note("classify", found, ratios)


def check_answers(flow: Flow, reference: Callable[[bytes], Any], picture: bytes) -> None:
    """A benchmark of wrong answers would be worth nothing."""
    expected = reference(picture)[0][0]
    if not np.allclose(flow(picture), expected, rtol=1e-3, atol=1e-3):
        raise RuntimeError("flowlang and the loop it is measured against give different logits")


@contextmanager
def app(run: Run, name: str, text: str) -> Iterator[Flow]:
    with load(run.flow(name, text), device="cpu") as loaded:
        yield next(iter(loaded.flows.values()))


# What the runtime itself costs


class BareLoop:
    """The least that can group calls of an event loop: a queue, a thread, and Futures.

    Each batch costs one `call_soon_threadsafe`. It knows no deadline, no limit and no cancelling.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.Future[Any], asyncio.AbstractEventLoop, Any]] = deque()
        self._bell = threading.Semaphore(0)
        self._is_idle = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    async def call(self, item: Any) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((future, loop, item))
        if self._is_idle:
            self._is_idle = False
            self._bell.release()
        return await future

    def _work(self) -> None:
        while True:
            if not self._waiting:
                self._is_idle = True
                if not self._waiting:
                    self._bell.acquire()
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if batch:
                loop = batch[0][1]
                loop.call_soon_threadsafe(self._answer, batch)

    @staticmethod
    def _answer(batch: Sequence[tuple[asyncio.Future[Any], Any, Any]]) -> None:
        for future, _, item in batch:
            if not future.done():
                future.set_result(item)


def overhead(run: Run) -> None:
    """A flow that does nothing: what a request costs besides its work."""
    seconds, items = run.seconds / 2, [b"x"]

    def calls(what: str, call: Callable[[Any], Any], runner: Any) -> Callable[[], Result]:
        return partial(asyncio_clients, what, call, items, MANY, seconds, run=runner)

    bare, fast, own = BareLoop().call, fastest_loop(), asyncio.run
    with app(run, "pass", "flow echo: bytes -> bytes = pass") as flow:
        found = run.measure(
            {
                "blocking": partial(
                    thread_clients, "flowlang, one blocking caller", flow, items, 1, seconds
                ),
                "uvloop": calls("flowlang, uvloop", flow.acall, fast),
                "bare uvloop": calls("bare queue, uvloop", bare, fast),
                "asyncio": calls("flowlang, asyncio's own loop", flow.acall, own),
                "bare asyncio": calls("bare queue, asyncio's own loop", bare, own),
            }
        )
    ratios = {
        "p50 of one blocking caller, microseconds": [r.p50_ms * 1e3 for r in found["blocking"]],
        "requests a second, uvloop": [r.qps for r in found["uvloop"]],
        "requests a second, asyncio's own loop": [r.qps for r in found["asyncio"]],
        "uvloop over the bare queue": rates(found, "uvloop", "bare uvloop"),
        "asyncio over the bare queue": rates(found, "asyncio", "bare asyncio"),
    }
    run.note("overhead", found, ratios)


# What batching is for


def batching(run: Run) -> None:
    """A model whose time goes into reading its weights, in batches of 1 and of up to 8."""
    mlp(run.folder / "mlp.onnx", inputs=2048, hidden=4096, layers=4, outputs=1000)
    random = np.random.default_rng(0)
    items = list(random.standard_normal((64, 2048), dtype=np.float32))
    text = 'flow main: tensor<f32, 2048> -> tensor<f32, 1000> = trt("mlp.onnx", batch={})'
    model, seconds = run.folder / "mlp.onnx", run.seconds / 2
    loops = independent_loops(run, model, lambda item: item[None])
    with ExitStack() as apps:
        one, eight = (
            apps.enter_context(app(run, f"mlp{most}", text.format(f"1..{most}"))) for most in (1, 8)
        )
        found = run.measure(
            {
                "loops": partial(
                    thread_clients,
                    "an independent loop on every core, batch 1",
                    loops,
                    items,
                    run.cores,
                    seconds,
                ),
                "batch=1": partial(
                    asyncio_clients, "flowlang batch=1", one.acall, items, 16, seconds
                ),
                "batch=1..8": partial(
                    asyncio_clients, "flowlang batch=1..8", eight.acall, items, 16, seconds
                ),
            }
        )
    ratios = {
        "batch=1..8 over batch=1": rates(found, "batch=1..8", "batch=1"),
        "batch=1 over the loops": rates(found, "batch=1", "loops"),
    }
    run.note("batching", found, ratios)


# Start-up


def startup(run: Run) -> None:
    """A whole `flowlang explain` of the one-liner, beside the interpreter alone."""
    resnet(run.folder / "resnet50.onnx", depth=50, width=64)
    path = run.flow(
        "one-line", 'decode -> resize(224) -> rgb -> trt("resnet50.onnx", fp16, batch=1..4) x4'
    )
    # Compiled modules are part of an installation, whatever is set for this process.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(run.folder / "compiled")
    commands = {
        "interpreter": ["-c", "pass"],
        "import": ["-c", "import flowlang"],
        # lark takes along `interegular` where it finds it, which only the tests install.
        "explain": [
            "-c",
            "import sys; sys.modules['interegular'] = None; sys.argv[0] = 'flowlang'; "
            "from flowlang.cli import main; main()",
            *("explain", str(path)),
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    run.wait_for_quiet()
    with Sampler() as usage:
        for number in range(4 * run.rounds + 1):
            for name, arguments in commands.items():
                command = [sys.executable, *arguments]
                start_s = time.perf_counter()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                if number:  # the first one fills the caches
                    times[name].append((time.perf_counter() - start_s) * 1e3)
    times["explain beyond the interpreter"] = [
        a - b for a, b in zip(times["explain"], times["interpreter"], strict=True)
    ]
    print("\n### startup\n")
    for name, values in times.items():
        print(f"- {name}, ms: **{spread(values)}**")
    others = usage.report()["others"]
    run.found["jobs"]["startup"] = {
        "milliseconds": {name: summary(values) for name, values in times.items()},
        "others_cores": others,
        "is_noisy": others > QUIET_CORES,
    }


JOBS: dict[str, Callable[[Run], None]] = {
    "classify": classify,
    "overhead": overhead,
    "batching": batching,
    "startup": startup,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loop of the classifier")
    parser.add_argument("--only", default=",".join(JOBS), help="jobs, with commas between them")
    parser.add_argument("--models", type=Path, help="folder to keep the models in")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait for a quiet machine, in all"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, options.rounds, options.seconds, options.patience)
        for name in options.only.split(","):
            JOBS[name](run)
    write(options.out, run.found)


def write(path: Path, found: dict[str, Any]) -> None:
    """Write what was found; jobs not run this time stay, if this machine measured them."""
    if path.is_file():
        before = json.loads(path.read_text())
        if before["machine"] == found["machine"]:
            found["jobs"] = before["jobs"] | found["jobs"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
