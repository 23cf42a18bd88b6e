"""Serving over HTTP, flowlang beside other servers, all on the cores of one machine.

    python -m benchmarks.serve [--rounds 5] [--seconds 4] [--only size,classify,corrupt]

`size` answers pictures with their length, which is what the serving itself costs. `classify`
decodes, resizes and runs a model of about 3 ms, beside as many bare loops as there are cores.
`corrupt` sends one broken picture among eight at once. wrk, which is to be installed, is the load,
and takes its part of the cores. Each peer is tried with several settings first, and measured with
the best of them for that many clients. Peers that are not installed are left out; `make bench`
installs them into an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import wrk
from benchmarks.classifier import Classifier, best_class, prepare
from benchmarks.cpu import Run, independent_loops, rates, spread, summary, write
from benchmarks.load import Result, Sampler, percentile, thread_clients
from benchmarks.servers import (
    PACKAGES,
    PATHS,
    ROOT,
    Server,
    Setting,
    interpreter_of,
    started,
    versions,
)
from examples.models import resnet
from tests.pictures import bad, photographs

RESULTS = Path(__file__).parent / "results" / "serve.json"
PEERS = ROOT / ".venv" / "peers" / "bin" / "python"
PICTURES, CHECKED = 64, 8
SIZE_CLIENTS, CLASSIFY_CLIENTS = 32, (1, 10, 32)
WARM_S = TUNING_S = 1.0
TRIES = 3  # of each setting, the best of which counts: one unlucky second must not decide
TOGETHER, VOLLEYS = 8, 4
SIZE = """\
from flowlang import batched


@batched
def size(pictures: list[bytes]) -> list[int]:
    return [len(picture) for picture in pictures]
"""
FLOWS = {
    "size": 'use "size.py" as python\nflow main = python.size',
    "classify": (
        "flow main = decode -> resize(224) -> rgb -> normalize(imagenet) "
        '-> trt("classifier.onnx", batch=1..4) x2 -> softmax -> best'
    ),
    "corrupt": (
        "flow main = decode -> resize(224) -> rgb -> normalize(imagenet) "
        '-> trt("classifier.onnx", batch=1..8, wait=100ms) -> softmax -> best'
    ),
}
# What is tried of each peer.
SETTINGS: Mapping[str, Mapping[str, Sequence[Mapping[str, int]]]] = {
    "size": {
        "uvicorn": [{}],
        "mosec": [{}, {"workers": 2}, {"batch": 16}, {"workers": 2, "batch": 16}],
        "litserve": [{}, {"front": 2}, {"workers": 2, "front": 2}, {"front": 2, "batch": 16}],
    },
    "classify": {
        "mosec": [
            {"threads": 2},
            {"workers": 2},
            {"workers": 2, "threads": 2},
            {"workers": 2, "batch": 4},
            {"threads": 2, "batch": 8},
            {"decoders": 2, "threads": 2, "batch": 8},
        ],
        "litserve": [
            {"threads": 2},
            {"workers": 2},
            {"workers": 2, "front": 2},
            {"workers": 2, "threads": 2},
            {"workers": 2, "batch": 4},
            {"threads": 2, "batch": 8},
        ],
    },
    "corrupt": {
        "mosec": [
            {},
            {"batch": 8, "batch-wait-ms": 100},
            {"decoders": 1, "batch": 8, "batch-wait-ms": 100},
        ],
        "litserve": [{}, {"batch": 8, "batch-wait-ms": 100}],
    },
}

Best: TypeAlias = dict[int, Setting]  # by number of clients
Tried: TypeAlias = dict[str, dict[str, dict[int, float]]]  # answers a second


class Bench:
    """One run: the pictures and the model, which servers there are, and how each is started."""

    def __init__(self, run: Run, servers: Sequence[str], peers: Path) -> None:
        self.run = run
        self.peers = peers
        self.model = resnet(run.folder / "classifier.onnx")
        self.pictures = photographs(PICTURES)
        self.files = [run.folder / f"{number:02}.jpg" for number in range(PICTURES)]
        for file, picture in zip(self.files, self.pictures, strict=True):
            file.write_bytes(picture)
        (run.folder / "size.py").write_text(SIZE)
        self.silent: list[str] = []
        self.servers = ["flowlang"]
        run.found["machine"]["peers"] = {}
        for name in [name for name in PACKAGES if name in servers]:
            found = versions(name, peers)
            if found is None:
                print(f"{name} is left out: it is not installed for {peers}", file=sys.stderr)
            else:
                run.found["machine"]["peers"][name] = found
                self.servers.append(name)

    def settings(self, job: str) -> dict[str, list[Setting]]:
        """By server, how it is to be tried at a job."""
        found = {"flowlang": [Setting("flowlang", {"flow": FLOWS[job]})]}
        for name, options in SETTINGS[job].items():
            if name in self.servers:
                found[name] = [Setting(name, each) for each in options]
        return found

    def started(self, job: str, setting: Setting) -> AbstractContextManager[Server]:
        """A server that does a job."""
        name = setting.server
        log = self.run.folder / f"{name}.log"
        return started(
            partial(self._command, job, setting), PATHS.get(name, "/"), self.pictures[0], log
        )

    def _command(self, job: str, setting: Setting, port: int) -> list[str]:
        if setting.server == "flowlang":
            flow = self.run.flow(f"flow-{job}", str(setting.options["flow"]))
            given = ["serve", str(flow), "--device", "cpu", "--port", str(port)]
            return [sys.executable, "-m", "flowlang", *given]
        interpreter = interpreter_of(setting.server, self.peers)
        module = "bare_uvicorn" if setting.server == "uvicorn" else f"{setting.server}_server"
        options = [word for n, v in setting.options.items() for word in (f"--{n}", str(v))]
        work = "size" if job == "size" else "classify"
        given = ["--port", str(port), "--job", work, "--model", str(self.model), *options]
        return [interpreter, "-m", f"benchmarks.peers.{module}", *given]

    def load(self, job: str, setting: Setting, clients: int, seconds: float) -> Result:
        """A server started, asked by so many clients, and ended.

        mosec was seen to fall silent once clients had hung up on it: that is noted, and it is
        started anew, once.
        """
        try:
            return self._load(job, setting, clients, seconds)
        except wrk.Silent as silent:
            print(f"{silent}; it is started anew", file=sys.stderr)
            self.silent.append(str(silent))
        return self._load(job, setting, clients, seconds)

    def _load(self, job: str, setting: Setting, clients: int, seconds: float) -> Result:
        what = setting.server if setting.server == "flowlang" else setting.label
        with self.started(job, setting) as server:
            self.check(job, setting, server)
            wrk.load(what, server.url, self.files, clients, WARM_S)
            return wrk.load(what, server.url, self.files, clients, seconds, server.processes())

    def check(self, job: str, setting: Setting, server: Server) -> None:
        """A benchmark of wrong answers would be worth nothing. Raises RuntimeError."""
        for picture in self.pictures[:CHECKED]:
            status, body = server.ask(picture)
            if status != 200 or answer_of(job, body) != self.expected(job, picture):
                raise RuntimeError(f"{setting.label} answered {job} with {status}, {body[:200]!r}")

    def expected(self, job: str, picture: bytes) -> int:
        if job == "size":
            return len(picture)
        if not hasattr(self, "_classifier"):
            self._classifier = Classifier(self.model)
        index: int = self._classifier([prepare(picture)])[0]["index"]
        return index

    def tuned(self, job: str, clients: Sequence[int]) -> tuple[dict[str, Best], Tried]:
        """By server and number of clients the setting that answers most, and what all did."""
        best: dict[str, Best] = {}
        tried: Tried = {}
        tries = min(TRIES, self.run.rounds)
        for name, settings in self.settings(job).items():
            if len(settings) == 1:
                best[name] = dict.fromkeys(clients, settings[0])
                continue
            tried[name] = {}
            for setting in settings:
                tried[name][setting.label] = {
                    c: max(self.load(job, setting, c, TUNING_S).qps for _ in range(tries))
                    for c in clients
                }
            labels = {s.label: s for s in settings}
            best[name] = {
                c: labels[max(tried[name], key=lambda label: tried[name][label][c])]
                for c in clients
            }
        return best, tried


def answer_of(job: str, body: bytes) -> int:
    """What an answer says: the size, or the class."""
    said = json.loads(body)
    found: int = said if job == "size" else said["index"]
    return found


# The jobs


def size(bench: Bench) -> None:
    """What serving costs: the answer is the length of the body."""
    run = bench.run
    best, tried = bench.tuned("size", [SIZE_CLIENTS])
    found = run.measure(
        {
            n: partial(bench.load, "size", s[SIZE_CLIENTS], SIZE_CLIENTS, run.seconds)
            for n, s in best.items()
        }
    )
    least = {"uvicorn": 0.6, "mosec": 1.5, "litserve": 10.0}
    ratios = {f"flowlang over {n}": rates(found, "flowlang", n) for n in least if n in found}
    run.note("size", found, ratios)
    run.found["jobs"]["size"] |= {"tuning": tried, "fell_silent": bench.silent}
    judge(run, "size", ratios, {f"flowlang over {n}": (">=", m) for n, m in least.items()})


def classify(bench: Bench) -> None:
    """A model of about 3 ms, beside loops that serve nobody."""
    run = bench.run
    best, tried = bench.tuned("classify", CLASSIFY_CLIENTS)
    logits = independent_loops(run, bench.model, prepare)
    variants: dict[str, Callable[[], Result]] = {
        "loops in threads": partial(
            thread_clients,
            "no server: a loop on every core, threads",
            lambda picture: best_class(logits(picture)[0][0]),
            bench.pictures,
            run.cores,
            run.seconds,
        ),
        "loops in processes": partial(loops_in_processes, bench),
    }
    for clients in CLASSIFY_CLIENTS:
        for name, settings in best.items():
            load = partial(bench.load, "classify", settings[clients], clients, run.seconds)
            variants[f"{name}, C={clients}"] = load
    found = run.measure(variants)
    ratios, targets = classify_ratios(found, list(best))
    run.note("classify", found, ratios)
    run.found["jobs"]["classify"] |= {"tuning": tried, "fell_silent": bench.silent}
    judge(run, "classify", ratios, targets)


def classify_ratios(
    found: Mapping[str, Sequence[Result]], servers: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, tuple[str, float]]]:
    """flowlang over the stronger loops, and over the best other server of each round."""
    ratios: dict[str, list[float]] = {}
    targets: dict[str, tuple[str, float]] = {}
    others = [name for name in servers if name != "flowlang"]
    loops = ("loops in threads", "loops in processes")
    limit = max((found[n] for n in loops), key=lambda r: statistics.median(x.qps for x in r))
    for clients in CLASSIFY_CLIENTS:
        ours = found[f"flowlang, C={clients}"]
        what = f"flowlang over the loops, C={clients}"
        ratios[what] = [a.qps / b.qps for a, b in zip(ours, limit, strict=True)]
        if clients > 1:  # one client leaves a core idle while it asks
            targets[what] = (">=", 0.93)
        for measure in ("p50_ms", "p99_ms") if others else ():
            what = f"flowlang's {measure[:3]} over the best other's, C={clients}"
            ratios[what] = [
                getattr(mine, measure)
                / min(getattr(found[f"{n}, C={clients}"][number], measure) for n in others)
                for number, mine in enumerate(ours)
            ]
            targets[what] = ("<=", 1.0)
    return ratios, targets


def loops_in_processes(bench: Bench) -> Result:
    """As many processes as cores, each decoding and classifying in a loop of its own."""
    run, seconds = bench.run, bench.run.seconds
    module = [sys.executable, "-m", "benchmarks.peers.bare_loop", str(bench.model), str(seconds)]
    command = [*module, *map(str, bench.files)]
    with Sampler() as usage, ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(run.cores)
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        turns = [json.loads(said) for said in told_to_begin(processes)]
    ordered = sorted(turn for each in turns for turn in each)
    p50, p90, p99 = (round(percentile(ordered, s) * 1e3, 4) for s in (0.5, 0.9, 0.99))
    return Result(
        "no server: a loop on every core, processes", run.cores, round(len(ordered) / seconds, 1),
        p50, p90, p99, len(ordered), 0, round(sum(ordered) / seconds, 2), usage.report(),
    )  # fmt: skip


def told_to_begin(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What processes print after a line that all of them get at once."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("begin\n")
        process.stdin.flush()
    return [process.communicate()[0] for process in processes]


def corrupt(bench: Bench) -> None:
    """Eight requests at once, one of them broken: what comes of it and of the seven others."""
    rows: list[dict[str, Any]] = []
    for name, settings in bench.settings("corrupt").items():
        for setting in settings:
            what = name if name == "flowlang" else setting.label
            with bench.started("corrupt", setting) as server:
                bench.check("corrupt", setting, server)
                volleys = [volley(bench, server) for _ in range(VOLLEYS * bench.run.rounds)]
            good = [count for count, _ in volleys]
            rows.append(
                {
                    "what": what,
                    "volleys": len(volleys),
                    "others_right": {**summary(good), "of": TOGETHER - 1},
                    "corrupt_statuses": sorted({status for _, status in volleys}),
                }
            )
    print("\n### corrupt\n\n| | of 7 others, 200 and right | the corrupt one |\n|---|---|---|")
    for row in rows:
        right = row["others_right"]
        print(
            f"| {row['what']} | {right['least']} to {right['most']} | {row['corrupt_statuses']} |"
        )
    bench.run.found["jobs"]["corrupt"] = {"servers": rows, "date": date.today().isoformat()}
    least = [rows[0]["others_right"]["least"]]
    judge(bench.run, "corrupt", {OTHERS: least}, {OTHERS: (">=", TOGETHER - 1)})


OTHERS = "good pictures of seven that flowlang answers beside a corrupt one"


def volley(bench: Bench, server: Server) -> tuple[int, int]:
    """How many of the good ones were answered rightly, and the status of the corrupt one."""
    broken = bad()["jpeg-start-only"].data
    bodies = [*bench.pictures[: TOGETHER - 1], broken]
    answers: dict[int, tuple[int, bytes]] = {}
    together = threading.Barrier(TOGETHER)

    def ask(number: int) -> None:
        together.wait()
        answers[number] = server.ask(bodies[number])

    threads = [threading.Thread(target=ask, args=[number]) for number in range(TOGETHER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = sum(
        answers[number][0] == 200
        and answer_of("corrupt", answers[number][1]) == bench.expected("corrupt", bodies[number])
        for number in range(TOGETHER - 1)
    )
    return good, answers[TOGETHER - 1][0]


def judge(
    run: Run,
    job: str,
    ratios: Mapping[str, Sequence[float]],
    targets: Mapping[str, tuple[str, float]],
) -> None:
    """Say of each target whether the median holds it, and keep that beside the numbers."""
    kept = {}
    print()
    for what, (relation, wanted) in targets.items():
        if what in ratios:
            median = statistics.median(ratios[what])
            holds = median >= wanted if relation == ">=" else median <= wanted
            kept[what] = {"wanted": f"{relation} {wanted:g}", "holds": holds}
            verdict = "holds" if holds else "MISSED"
            print(f"- {what}: {spread(ratios[what])}, target {relation} {wanted:g}: {verdict}")
    run.found["jobs"][job] |= {"targets": kept, "date": date.today().isoformat()}


JOBS: Mapping[str, Callable[[Bench], None]] = {
    "size": size,
    "classify": classify,
    "corrupt": corrupt,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn of a server")
    parser.add_argument("--only", default=",".join(JOBS), help="jobs, with commas between them")
    parser.add_argument("--servers", default=",".join(PACKAGES), help="those beside flowlang")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the interpreter that has them")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait for a quiet machine, in all"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    wrk.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), options.rounds, options.seconds, options.patience)
        run.found["machine"]["wrk"] = wrk.version()
        bench = Bench(run, options.servers.split(","), options.peers)
        for name in options.only.split(","):
            bench.silent = []
            JOBS[name](bench)
    write(options.out, run.found)


if __name__ == "__main__":
    main()
