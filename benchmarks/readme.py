"""The tables of the README, made from what the benchmarks wrote: `python -m benchmarks.readme`.

Every number stands in `benchmarks/results`; a test holds the README against them.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"


def _found(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _middle(rounds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The round of the median rate."""
    return sorted(rounds, key=lambda r: float(r["qps"]))[len(rounds) // 2]


def cpu_table() -> str:
    """What a CPU reaches, each number with the limit that was measured in the same rounds."""
    found = _found("cpu")
    machine, jobs = found["machine"], found["jobs"]
    ratios = jobs["classify"]["ratios"] | jobs["overhead"]["ratios"] | jobs["batching"]["ratios"]
    rows = []
    for job in ("classify", "overhead", "batching"):
        for rounds in jobs[job]["rounds"].values():
            best = _middle(rounds)
            p50 = statistics.median(float(r["p50_ms"]) for r in rounds)
            row = (best["what"], str(best["clients"]), _number(best["qps"]), _number(p50))
            rows.append(row)
    said = [
        f"- {name}: {ratio['median']:.3g} ({ratio['least']:.3g} to {ratio['most']:.3g})"
        for name, ratio in ratios.items()
        if "over the bare queue" not in name
    ]
    noise = " Other programs were at work on it." if jobs["classify"]["is_noisy"] else ""
    head = (
        f"On {machine['cores']} cores of an {machine['processor']} (Python {machine['python']}, "
        f"ONNX Runtime {machine['onnxruntime']}, OpenCV {machine['opencv-python-headless']}), "
        "closed loops of C requests; `make bench` repeats it. The ratios are of one round each: "
        f"median, least and most.{noise}"
    )
    table = _table(("job", "C", "a second", "p50 ms"), rows)
    return f"{head}\n\n{table}\n\n" + "\n".join(said)


def text_table() -> str:
    """The text reader against rapidocr's own pipeline on the same models."""
    found = _found("read_text")
    rows = [
        (what, _number(_middle(rounds)["qps"]))
        for rounds in found["jobs"]["throughput"]["rounds"].values()
        for what in [rounds[0]["what"]]
    ]
    shares = found["jobs"]["agreement"]["shares"]
    ratios = found["jobs"]["throughput"]["ratios"]
    errors = shares["character error rate between the two"]
    alone, threads, best = (
        ratios[f"flowlang over {name}"]["median"]
        for name in ("rapidocr, one caller", "rapidocr, eight callers", "the best of rapidocr")
    )
    head = (
        "`examples/read_text.flow` against rapidocr's own pipeline on the same models, on 2 cores: "
        f"the two differ in {errors:.2%} of the characters of 21 pages, and flowlang reads "
        f"{alone:.2f} times as many pages a second as rapidocr called in a loop, {threads:.2f} "
        f"times as many as eight threads that share it, and {best:.2f} times as many as the best "
        "it can be tuned to, round by round."
    )
    table = _table(("reading pages, 8 outstanding", "pages a second"), rows)
    return f"{head}\n\n{table}"


def serve_table() -> str:
    """Serving over HTTP beside other servers, and what a corrupt picture does to others."""
    found = _found("serve")
    machine, jobs = found["machine"], found["jobs"]
    versions = ", ".join(f"{n} {of[n]}" for n, of in machine["peers"].items())
    noise = " Other programs were at work on it." if jobs["classify"]["is_noisy"] else ""
    head = (
        f"On {machine['cores']} cores of an {machine['processor']}, wrk {machine['wrk']} with C "
        f"connections taking its part of them: {versions}, each with the best of the settings "
        f"tried for that C. A picture has about 65 KB.{noise}"
    )
    rows = [
        (
            f"{job}: {_middle(rounds)['what']}",
            str(rounds[0]["clients"]),
            _number(_middle(rounds)["qps"]),
            *(_number(statistics.median(r[n] for r in rounds)) for n in ("p50_ms", "p99_ms")),
        )
        for job in ("size", "classify")
        for rounds in jobs[job]["rounds"].values()
    ]
    said = [
        f"- {name}: {ratio['median']:.3g} ({ratio['least']:.3g} to {ratio['most']:.3g})"
        for job in ("size", "classify")
        for name, ratio in jobs[job]["ratios"].items()
    ]
    corrupt = [_corrupt_row(server) for server in jobs["corrupt"]["servers"]]
    tables = (
        _table(("job", "C", "a second", "p50 ms", "p99 ms"), rows),
        "\n".join(said),
        _table(("one corrupt picture among eight", "of the others, answered", "it got"), corrupt),
    )
    return "\n\n".join((head, *tables))


def _corrupt_row(server: Mapping[str, Any]) -> tuple[str, str, str]:
    right = server["others_right"]
    counts = sorted({right["least"], right["most"]})
    statuses = ", ".join(map(str, server["corrupt_statuses"]))
    return server["what"], f"{' to '.join(map(str, counts))} of {right['of']}", statuses


def gpu_table() -> str:
    """What one GPU reached, with the ceilings of the same run, and an earlier run of all else."""
    found = _found("h200")
    machine, earlier = found["machine"], found["earlier_run"]
    names = ("job", "C", "pictures a second", "p50 ms", "p99 ms")

    def table_of(results: Sequence[Mapping[str, Any]]) -> str:
        numbers = ("qps", "p50_ms", "p99_ms")
        return _table(
            names,
            [(r["what"], str(r["clients"]), *(_number(r[n]) for n in numbers)) for r in results],
        )

    same = {r["what"] for r in found["results"]}
    rest = [r for r in earlier["results"] if r["what"] not in same]
    gpu, driver = (part.strip() for part in machine["gpu"].split(",")[:2])
    head = (
        f"On one {gpu} (driver {driver}, {machine['cores']} cores, DALI {machine['dali']}, "
        f"TensorRT {machine['tensorrt']}), ResNet-50 fp16 on JPEG of 500x375. Alone, decoding "
        f"reached {max(found['decode'].values()):,} pictures a second in that run and the engine "
        f"{max(found['engine'].values()):,}; the best below is {found['share_of_ceiling']:.2f} of "
        "the lesser. [docs/gpu.md](docs/gpu.md) says how and why."
    )
    share = f"{earlier['share_of_ceiling']:.2f}"
    then = (
        "Without the GPU's decoders, without flowlang and over HTTP, in an earlier run on another "
        f"machine of that kind, where the best of the jobs above was {share} of the lesser ceiling:"
    )
    return "\n\n".join((head, table_of(found["results"]), then, table_of(rest)))


TABLES: Mapping[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "text": text_table,
    "serve": serve_table,
    "gpu": gpu_table,
}


def replace_tables(text: str) -> str:
    """A text with the tables between its markers made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name}-table -->\n).*?(<!-- /{name}-table -->)"
        text = re.sub(pattern, lambda m, t=make: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(replace_tables(README.read_text("utf-8")), "utf-8")
