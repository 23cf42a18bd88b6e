"""Pages of text read by `examples/read_text.flow` and by rapidocr itself, with the same models.

    python -m benchmarks.read_text [--rounds 5] [--laps 3] [--only agreement,throughput]

First what both read, on every page of `tests.pages`: lines that are equal, and the character error
rate between the two, the edit distance over the number of characters. Then how many pages a second,
from the first request to the last answer, the variants taking turns as in `benchmarks.cpu`. Needs
`pip install --no-deps rapidocr` and the `bench` extra.

Where flowlang's time goes: 97 % is in ONNX Runtime, 57 % recognition, 39 % detection, 1 %
orientation. Of recognition 86 %, of detection 75 % are convolutions and matrix products, most at
100 to 115 GFLOPS where a product of large square matrices reaches 101. Were all else free, flowlang
would thus be less than 1.4 times as fast as rapidocr tuned: more takes other kernels, or fewer
bits. As it comes, rapidocr loses more: it runs a model on two threads, pads lines to the longest of
six (27 % more for recognition) and gives memory back after every run (22 to 30 % more for
detection).

What was tried on the models alone, in CPU time on one thread of an AVX-512 core, with ONNX Runtime
1.32. Others worked on the machine meanwhile, so variants took turns and the least of seven to ten
runs counts (of pairs and two threads, the first quartile and the least); steps of 1 % are noise.
None is worth what it costs:

| change | detection | recognition |
|---|---|---|
| denormals as zero; memory pattern or reuse off | 0 to +1 % | -1 to +1 % |
| prepacking off | 0 | +1 %, short lines +4 % |
| huge pages | -1 % | -1 % |
| shapes fixed when the session is made | 0 | -1 % |
| no blocked layout (optimised up to `extended`) | +41 % | +15 % |
| `Gelu` not fused | +12 % | +10 % |
| two threads, not spinning | +21 % | +39 % |
| another run of it on the other core | +3 % | +1 % |
| 6 lines of one width a batch, 1008 or 320 wide | | +5 %, 0 |
| widths that are multiples of 8, 16 or 32 | | 0 |
| `Identity` nodes left out | 0 | 0 |
| x + x * s as x * (1 + s), the `Add` behind `ConvTranspose` as its bias | -2 % | |
| besides, channels padded to whole blocks of the layout | -2.5 % | |
| the classes' `MatMul` and `Add` as one `Gemm` | | -1 % |

The last three are 1.5 % of a page together, and every start on a CPU would have to load the package
onnx, parse the model and write it anew. Not tried: `Softmax` in front of `ctc`, 1.5 % of
recognition, left out where the text alone is wanted; Winograd's convolutions.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from difflib import SequenceMatcher
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.cpu import QUIET_CORES, Run, middle, rates, spread, summary, write
from benchmarks.load import PoolSampler, Result, Sampler, fastest_loop, percentile
from flowlang import Flow, load
from tests.pages import Page, pages

CLIENTS = 8
MOST_ERRORS = 0.02  # between the two; beyond it, speeds would be of different work
PATIENCE_S = 120.0
EXAMPLE = Path(__file__).parents[1] / "examples" / "read_text.flow"
RESULTS = Path(__file__).parent / "results" / "read_text.json"
# The longest first: at the end, where fewer are outstanding, little is left to do.
MEASURED = ("article", "faded", "turned back", "receipt", "poster", "small", "captions", "sign")

Read: TypeAlias = Callable[[bytes], Sequence[str]]


# rapidocr


def engine(threads: int | None = None) -> Read:
    """rapidocr on the example's models: as it comes, or with this many threads a model.

    Where threads are given, lines are also read one by one, not padded to the longest of six, and
    ONNX Runtime keeps its memory: on one thread both save work.
    """
    from rapidocr import RapidOCR

    models = EXAMPLE.parent / "models"
    settings: dict[str, Any] = {
        "Global.log_level": "error",
        "Det.model_path": str(models / "text_detection.onnx"),
        "Cls.model_path": str(models / "text_orientation.onnx"),
        "Rec.model_path": str(models / "text_recognition.onnx"),
    }
    if threads is not None:
        settings["EngineConfig.onnxruntime.intra_op_num_threads"] = threads
        settings["EngineConfig.onnxruntime.enable_cpu_mem_arena"] = True
        settings["Rec.rec_batch_num"] = 1
    made: Any = RapidOCR(params=settings)

    def read(picture: bytes) -> Sequence[str]:
        return list(made(picture).txts or ())

    return read


def several(count: int, threads: int) -> Read:
    """Engines that callers take turns at."""
    free: queue.SimpleQueue[Read] = queue.SimpleQueue()
    for _ in range(count):
        free.put(engine(threads))

    def read(picture: bytes) -> Sequence[str]:
        mine = free.get()
        try:
            return mine(picture)
        finally:
            free.put(mine)

    return read


_OWN: list[Read] = []  # the engine of a process of the pool


def _start() -> None:
    _OWN.append(engine(1))


def _read_here(picture: bytes) -> Sequence[str]:
    return _OWN[0](picture)


@contextmanager
def processes(count: int) -> Iterator[tuple[Read, Callable[[], Sampler]]]:
    """An engine of one thread in each of several processes, and what measures their use."""
    with ProcessPoolExecutor(count, get_context("spawn"), _start) as pool:
        list(pool.map(time.sleep, [0.1] * count))  # a worker starts when there is work for it

        def read(picture: bytes) -> Sequence[str]:
            return pool.submit(_read_here, picture).result()

        yield read, lambda: PoolSampler(list(pool._processes))


# What is read


def lines_of(answer: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of the flow's answer; rapidocr leaves out blank ones."""
    return [line["text"] for line in answer if line["text"].strip()]


def edit_distance(text: str, other: str) -> int:
    """Characters to insert, delete or replace (Levenshtein) to make one text the other."""
    wanted = np.asarray([ord(character) for character in other])
    steps = np.arange(len(other) + 1)
    before = steps
    for row, character in enumerate(text, 1):
        now = np.empty_like(steps)
        now[0] = row
        now[1:] = np.minimum(before[1:] + 1, before[:-1] + (wanted != ord(character)))
        # An insertion costs one on top of the place before: the least of all places before.
        before = np.minimum.accumulate(now - steps) + steps
    return int(before[-1])


def compare(page: Page, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, int]:
    """How two readings of a page differ, and, where it is known, each from what is written."""
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    our_text, their_text, written = ("\n".join(t) for t in (ours, theirs, page.lines))
    found = {
        "lines": len(theirs),
        "equal_lines": sum(block.size for block in blocks),
        "characters": len(their_text),
        "errors": edit_distance(our_text, their_text),
    }
    if page.lines:
        found["written"] = len(written)
        found["our_misreadings"] = edit_distance(our_text, written)
        found["their_misreadings"] = edit_distance(their_text, written)
    return found


def agreement(run: Run) -> None:
    """Every page read by both. Raises RuntimeError where they agree too little."""
    theirs = engine()
    with the_app() as flow:
        found = {
            name: compare(page, lines_of(flow(page.data)), theirs(page.data))
            for name, page in pages().items()
        }
    total = {key: sum(f.get(key, 0) for f in found.values()) for key in found["article"]}
    shares = {
        "character error rate between the two": total["errors"] / total["characters"],
        "equal lines": total["equal_lines"] / total["lines"],
        "flowlang's own error rate": total["our_misreadings"] / total["written"],
        "rapidocr's own error rate": total["their_misreadings"] / total["written"],
    }
    print(
        "\n### agreement\n\n| page | lines | equal | characters | errors |\n|---|---|---|---|---|"
    )
    for name, f in found.items():
        print(f"| {name} | {f['lines']} | {f['equal_lines']} | {f['characters']} | {f['errors']} |")
    print()
    for what, share in shares.items():
        print(f"- {what}: **{share:.2%}**", flush=True)
    run.found["jobs"]["agreement"] = {
        "shares": {what: round(share, 5) for what, share in shares.items()},
        "pages": found,
    }
    if total["errors"] > MOST_ERRORS * total["characters"]:
        raise RuntimeError("flowlang and rapidocr read different texts")


@contextmanager
def the_app() -> Iterator[Flow]:
    with load(EXAMPLE, device="cpu") as loaded:
        yield loaded.flows["read_text"]


# How fast


class Tally:
    """The answers to a list of requests, each asked once: every variant has the same to do."""

    def __init__(self, what: str, clients: int) -> None:
        self._what, self._clients = what, clients
        self._latencies: list[float] = []
        self._failures = 0
        self._start_s = time.perf_counter()

    @contextmanager
    def request(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        except Exception:
            self._failures += 1
        self._latencies.append(time.perf_counter() - began_s)

    def result(self, usage: dict[str, float]) -> Result:
        count, ordered = len(self._latencies), sorted(self._latencies)
        seconds = time.perf_counter() - self._start_s
        p50, p90, p99 = (round(percentile(ordered, s) * 1e3, 1) for s in (0.5, 0.9, 0.99))
        outstanding = round(sum(ordered) / seconds, 2)
        return Result(
            self._what, self._clients, round(count / seconds, 3), p50, p90, p99, count,
            self._failures, outstanding, usage,
        )  # fmt: skip


def asyncio_clients(what: str, flow: Flow, items: Sequence[bytes]) -> Result:
    """Coroutines on one event loop."""
    source, tally = iter(items), Tally(what, CLIENTS)

    async def client() -> None:
        for item in source:
            with tally.request():
                await flow.acall(item)

    async def everyone() -> None:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    with Sampler() as usage:
        fastest_loop()(everyone())
    return tally.result(usage.report())


def thread_clients(
    what: str,
    read: Read,
    items: Sequence[bytes],
    clients: int = CLIENTS,
    sampler: Callable[[], Sampler] = Sampler,
) -> Result:
    """Threads, each blocked on its own request."""
    source, tally = iter(items), Tally(what, clients)

    def client() -> None:
        for item in source:
            with tally.request():
                read(item)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    with sampler() as usage:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tally.result(usage.report())


def throughput(run: Run, laps: int) -> None:
    """So many pages, eight of them outstanding, against rapidocr however it is fastest."""
    distinct = [pages()[name].data for name in MEASURED]
    items = distinct * laps
    default, each = engine(), several(run.cores, 1)
    with ExitStack() as stack:
        pool, sampler = stack.enter_context(processes(run.cores))
        flow = stack.enter_context(the_app())
        for read in (default, each, pool, flow):
            for item in distinct:
                read(item)

        def threads(what: str, read: Read, **options: Any) -> Callable[[], Result]:
            return partial(thread_clients, f"rapidocr, {what}", read, items, **options)

        theirs = {
            "one caller": threads("as it comes, one caller", default, clients=1),
            "eight callers": threads("as it comes, a pool of threads", default),
            "engines": threads("tuned, an engine on every core", each),
            "processes": threads("tuned, a process on every core", pool, sampler=sampler),
        }
        ours = partial(asyncio_clients, "flowlang, asyncio", flow, items)
        found = run.measure({**theirs, "flowlang": ours})
    best = [max(found[name][number].qps for name in theirs) for number in range(run.rounds)]
    ratios = {
        "flowlang over the best of rapidocr": [
            r.qps / most for r, most in zip(found["flowlang"], best, strict=True)
        ]
    }
    ratios |= {f"flowlang over rapidocr, {n}": rates(found, "flowlang", n) for n in theirs}
    keep(run, found, ratios)


def keep(run: Run, found: Mapping[str, list[Result]], ratios: Mapping[str, list[float]]) -> None:
    """Note all rounds, and print the median one of each variant and the ratios of rounds."""
    others = statistics.median(r.usage["others"] for results in found.values() for r in results)
    run.found["jobs"]["throughput"] = {
        "ratios": {what: summary(values) for what, values in ratios.items()},
        "others_cores": round(others, 2),
        "is_noisy": others > QUIET_CORES,
        "rounds": {name: [r.as_json() for r in results] for name, results in found.items()},
    }
    print("\n### throughput\n\n| | outstanding | pages a second | p50 s | cores |")
    print("|---|---|---|---|---|")
    for r in map(middle, found.values()):
        seconds, cores = r.p50_ms / 1e3, r.usage["cores"]
        print(f"| {r.what} | {r.clients} | {r.qps:.2f} | {seconds:.2f} | {cores:.2f} |")
    print()
    for what, values in ratios.items():
        print(f"- {what}: **{spread(values)}**", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--laps", type=int, default=3, help="through eight pages, a variant's turn")
    parser.add_argument("--only", default="agreement,throughput", help="jobs, with commas between")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE_S, help="seconds to wait for a quiet machine"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    jobs: dict[str, Callable[[Run], None]] = {
        "agreement": agreement,
        "throughput": partial(throughput, laps=options.laps),
    }
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), options.rounds, 0.0, options.patience)
        run.found["machine"]["rapidocr"] = version("rapidocr")
        for name in options.only.split(","):
            jobs[name](run)
    write(options.out, run.found)


if __name__ == "__main__":
    main()
