"""The table of the README on an NVIDIA GPU: pictures to logits, and the ceilings of the same run.

    python -m benchmarks.gpu --out results.json [--seconds 4] [--only ceilings,flowlang,...]

Baselines: pure TensorRT (client threads doing OpenCV and numpy, one engine, a lock), flowlang with
decoding on the CPU, flowlang with decoding on the GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import wrk
from benchmarks.load import (
    Result,
    Sampler,
    asyncio_clients,
    fastest_loop,
    map_client,
    table,
    thread_clients,
)
from benchmarks.serve import FLOWS, SIZE
from benchmarks.servers import started
from examples.models import resnet
from flowlang import load
from flowlang.plan.physical import GPU_BATCH, GPU_LANES
from flowlang.runtime import cuda, dali, host, trt, vision
from flowlang.runtime.engine_store import EngineStore, default_directory
from flowlang.runtime.rework import Prologue
from tests.pictures import photographs

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
FLOW = (
    'decode{decoder} -> resize(224) -> rgb -> normalize(imagenet) -> trt("{model}", fp16{settings})'
    "{copies}\n"
)


class GpuSampler(Sampler):
    """Also the GPU's and its JPEG engines' use, in percent.

    They are asked for so seldom that what that costs cannot show in a p99.
    """

    def __enter__(self) -> GpuSampler:
        import pynvml

        super().__enter__()
        pynvml.nvmlInit()
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self._seen: list[tuple[float, float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        import pynvml

        while not self._done.wait(0.4):
            try:
                jpeg = float(pynvml.nvmlDeviceGetJpgUtilization(self._device)[0])
            except Exception:
                jpeg = float("nan")
            rates = pynvml.nvmlDeviceGetUtilizationRates(self._device)
            used = pynvml.nvmlDeviceGetMemoryInfo(self._device).used / 2**20
            self._seen.append((float(rates.gpu), jpeg, used))

    def __exit__(self, *failure: object) -> None:
        self._done.set()
        self._thread.join()
        super().__exit__(*failure)

    def report(self) -> dict[str, float]:
        found = super().report()
        if self._seen:
            gpu, jpeg, used = np.nanmedian(np.asarray(self._seen, np.float64), 0)
            found |= {"gpu": float(gpu), "jpeg": float(jpeg), "gpu_mib": float(used)}
        return found


class Run:
    """One run's model, pictures, engines and findings."""

    def __init__(self, folder: Path, engines: Path, seconds: float) -> None:
        self.folder = folder
        self.engines = engines
        self.seconds = seconds
        self.model = resnet(folder / "resnet50.onnx", depth=50, width=64)
        self.pictures = photographs(256)
        self.results: list[Result] = []
        self.found: dict[str, Any] = {"machine": machine()}

    def flow(self, name: str, *, decoder: str = "", settings: str = "", copies: int = 0) -> Path:
        path = self.folder / f"{name}.flow"
        text = FLOW.format(
            decoder=f"({decoder})" if decoder else "",
            model=self.model.name,
            settings=settings,
            copies=f" x{copies}" if copies else "",
        )
        path.write_text(text)
        return path

    def engine(self, batch: tuple[int, int, int]) -> trt.Engine:
        prologue = Prologue("chw", 224, 224, 3, MEAN, STD)
        spec = trt.EngineSpec(self.model, "fp16", batch, prologue)
        return trt.Engines(trt.Plans(EngineStore(self.engines)), cuda.gpu(0)).of(spec)

    def note(self, result: Result) -> None:
        self.results.append(result)
        print(table([result]).splitlines()[-1], flush=True)


def machine() -> dict[str, Any]:
    """GPU, driver and versions, to stand beside every number."""
    import tensorrt
    from nvidia import dali as nvidia_dali

    query = "name,driver_version,memory.total,clocks.max.sm"
    seen = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "gpu": seen.stdout.strip(),
        "tensorrt": tensorrt.__version__,
        "dali": nvidia_dali.__version__,
        "python": platform.python_version(),
        "cores": len(__import__("os").sched_getaffinity(0)),
    }


# Ceilings


def _rate(work: Sequence[Callable[[], int]], seconds: float) -> float:
    """Items a second that several threads do together, each running its own work."""
    counts = [0] * len(work)
    stop = time.perf_counter() + seconds

    def loop(index: int) -> None:
        cuda.use(0)
        while time.perf_counter() < stop:
            counts[index] += work[index]()

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(work))]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start_s)


def ceilings(run: Run) -> None:
    """What the engine alone and decoding alone reach."""
    cuda.use(0)
    engine = run.engine((1, GPU_BATCH, GPU_BATCH))  # the one of the flows: each takes minutes
    found: dict[str, Any] = {}
    for size, streams in ((1, 1), (4, 1), (8, 1), (GPU_BATCH, 1), (28, 2), (GPU_BATCH, 2)):
        contexts = []
        for _ in range(streams):
            context = trt.Context(engine, cuda.Stream(), use_graphs=True)
            context.warm()
            contexts.append(context)

        def once(context: trt.Context, size: int = size) -> int:
            context.start(size)
            context.stream.wait()
            return size

        rate = _rate([lambda c=c: once(c) for c in contexts], 1.0)  # type: ignore[misc]
        found[f"engine b{size} x{streams}"] = round(rate)
        for context in contexts:
            context.close()
    run.found["engine"] = found
    print("engine", found, flush=True)
    regions = GPU_LANES * dali.regions_for(GPU_BATCH)
    decodings = dali.choose_decodings(0, regions, vision.sample_pictures(7))
    print(dali.describe(decodings), flush=True)
    run.found["decoding"] = asdict(decodings)
    run.found["decode"] = _decode_rates(run, decodings.large)
    print("decode", run.found["decode"], flush=True)


def _decode_rates(run: Run, decoding: dali.Decoding) -> dict[str, int]:
    from flowlang.plan.files import compile_file
    from flowlang.plan.rewrite import rewrite

    path = run.folder / "decode.flow"
    path.write_text("decode -> resize(224) -> rgb\n")
    flow = rewrite(compile_file(path).flows[0])
    nodes = [n for n in flow.nodes() if n is not flow.input]
    found = {}
    most = dali.MOST
    sizes = ((1, 1), (4, 1), (8, 1), (14, 1), (most, 1), (most, 2), (most, 3), (most, 4), (most, 6))
    for size, pipelines in sizes:
        regions = [dali.Region(nodes, size, 0, decoding) for _ in range(pipelines)]
        streams = [cuda.Stream() for _ in regions]

        def once(
            index: int, size: int = size, regions: Any = regions, streams: Any = streams
        ) -> int:
            at = int(time.perf_counter() * 1e6) % (len(run.pictures) - size)
            result = regions[index].run(run.pictures[at : at + size], streams[index].handle)
            streams[index].wait()
            del result
            return size

        for index in range(pipelines):
            for _ in range(3):
                once(index)
        rate = _rate([lambda i=i: once(i) for i in range(pipelines)], 1.0)  # type: ignore[misc]
        found[f"b{size} x{pipelines}"] = round(rate)
        for region in regions:
            region.close()
    return found


WAKES = 3000


def wakes(run: Run) -> None:
    """What it takes to wake a thread and an event loop, which each batch does several times."""

    def to_and_fro() -> None:
        asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[int] = queue.SimpleQueue()

        def answer() -> None:
            for _ in range(WAKES):
                answers.put(asked.get())

        thread = threading.Thread(target=answer)
        thread.start()
        for number in range(WAKES):
            asked.put(number)
            answers.get()
        thread.join()

    async def by_loop() -> None:
        loop = asyncio.get_running_loop()
        asked: queue.SimpleQueue[asyncio.Future[None] | None] = queue.SimpleQueue()

        def answer() -> None:
            while (future := asked.get()) is not None:
                loop.call_soon_threadsafe(future.set_result, None)

        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(WAKES):
            future = loop.create_future()
            asked.put(future)
            await future
        asked.put(None)
        thread.join()

    ways: dict[str, Callable[[], object]] = {
        "thread to thread": to_and_fro,
        "event loop to thread": lambda: fastest_loop()(by_loop()),
    }
    found = {}
    for name, work in ways.items():
        start_s = time.perf_counter()
        work()
        found[name] = round((time.perf_counter() - start_s) / WAKES * 1e6, 1)
    run.found["there_and_back_us"] = found
    print("there and back, us:", found, flush=True)


# Peers


def pure_tensorrt(run: Run) -> None:
    """Client threads doing OpenCV, one engine behind a lock, one picture at a time.

    The engine is flowlang's own, which normalizes by itself: the baseline is spared the numpy.
    """
    import cv2

    cuda.use(0)
    stream = cuda.Stream()
    context = trt.Context(run.engine((1, GPU_BATCH, GPU_BATCH)), stream, use_graphs=False)
    context.warm()
    staged = cuda.PinnedBuffer((1, 224, 224, 3), "uint8")
    target = next(iter(context.inputs.values()))
    lock = threading.Lock()

    def call(data: bytes) -> Any:
        decoded: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        image = cv2.cvtColor(cv2.resize(decoded, (224, 224)), cv2.COLOR_BGR2RGB)
        with lock:
            cuda.use(0)
            staged.array[0] = image
            cuda.copy_to_device(target, staged, staged.size_bytes, stream)
            context.start(1)
            return context.collect(1)

    for clients in (1, 10, 20):
        run.note(
            thread_clients(
                "pure TensorRT, threads",
                call,
                run.pictures,
                clients,
                run.seconds,
                sampler=GpuSampler,
            )
        )


def flowlang_flow(
    run: Run,
    label: str,
    path: Path,
    counts: Sequence[int],
    *,
    maps: Sequence[int] = (),
    threads: Sequence[int] = (),
) -> None:
    start_s = time.perf_counter()
    with load(path, device="gpu", engines=run.engines) as app:
        loads = run.found.setdefault("load_s", {})
        loads[label] = round(time.perf_counter() - start_s, 1)
        print(f"{label}: loaded in {loads[label]} s", flush=True)
        flow = next(iter(app.flows.values()))
        stage = app.scheduler.stages[-1]
        kinds: tuple[tuple[str, Any, Any, Sequence[int]], ...] = (
            ("asyncio", asyncio_clients, flow.acall, counts),
            ("map", map_client, flow, maps),
            ("threads", thread_clients, flow, threads),
        )
        for kind, measure, call, numbers in kinds:
            for clients in numbers:
                stage.counts.sizes.clear()
                what = f"{label}, {kind}"
                result = measure(what, call, run.pictures, clients, run.seconds, sampler=GpuSampler)
                batches = sum(stage.counts.sizes.values())
                mean = sum(k * n for k, n in stage.counts.sizes.items()) / max(1, batches)
                result.usage["batch"] = round(mean, 1)
                run.note(result)


ALL = (1, 10, 20, 64, 256)
SATURATED = 512  # so many that every lane has a full batch, and the next


def on_gpu(run: Run) -> None:
    path, maps = run.flow("gpu"), (*ALL, SATURATED)
    flowlang_flow(run, "flowlang, GPU decode", path, ALL, maps=maps, threads=(1, 10, 20, 64))


HTTP_CLIENTS, HTTP_THREADS = 256, 4
FRONTS = (3, 6)


def over_http(run: Run) -> None:
    """The five best classes of each picture, asked over HTTP by wrk on the same machine.

    Beside it the size of each picture, by the same server: what HTTP alone reaches there. The cores
    named are those of the server's processes; what wrk takes is among the others.
    """
    files = [run.folder / f"{number}.jpg" for number in range(len(run.pictures))]
    for file, picture in zip(files, run.pictures, strict=True):
        file.write_bytes(picture)
    classes, sizes = run.flow("classes"), run.folder / "sizes.flow"
    classes.write_text(classes.read_text().rstrip() + " -> softmax -> top(5)\n")
    (run.folder / "size.py").write_text(SIZE)
    sizes.write_text(FLOWS["size"])
    for path, fronts in itertools.product((sizes, classes), FRONTS):

        def command(port: int, path: Path = path, fronts: int = fronts) -> list[str | Path]:
            return [
                *(sys.executable, "-m", "flowlang", "serve", path, "--device", "gpu"),
                *("--engines", run.engines, "--ingest", str(fronts), "--port", str(port)),
            ]

        with started(command, "/", run.pictures[0], run.folder / "server.log") as server:
            what = f"flowlang, HTTP, {path.stem}, {fronts} fronts"
            ask = partial(wrk.load, what, server.url, files, HTTP_CLIENTS, threads=HTTP_THREADS)
            ask(seconds=2.0)
            run.note(ask(seconds=run.seconds, processes=server.processes()))


def on_cpu(run: Run) -> None:
    flow = run.flow("cpu", decoder="libjpeg")
    flowlang_flow(run, "flowlang, CPU decode", flow, (1, 10, 64, 256))


def python_share(run: Run) -> None:
    """What Python costs: CPU time a lane's thread spends on a batch, its waiting left out."""
    from flowlang.plan.files import compile_file
    from flowlang.plan.physical import lower
    from flowlang.runtime.instances import Instances
    from flowlang.runtime.machine import this_machine

    physical = lower([compile_file(run.flow("share"))], this_machine("gpu"))
    lane: Any = Instances(physical, run.engines).make(physical.stages[0], 0)
    lane.warm()
    waited = [0.0]
    wait = lane.stream.wait

    def timed_wait() -> None:
        start_s = time.thread_time()
        wait()
        waited[0] += time.thread_time() - start_s

    lane.stream.wait = timed_wait
    found = {}
    for size in (1, 8, GPU_BATCH):
        values, costs = run.pictures[:size], []
        for _ in range(200 if size < GPU_BATCH else 60):
            waited[0] = 0.0
            start_s = time.thread_time()
            lane.run(values)
            costs.append(time.thread_time() - start_s - waited[0])
        found[size] = float(np.median(costs)) * 1e3
    a_request = (found[GPU_BATCH] - found[1]) / (GPU_BATCH - 1)
    run.found["python_ms"] = {
        "a_batch": round(found[1] - a_request, 4),
        "a_request": round(a_request, 4),
        "by_batch_size": {str(k): round(v, 4) for k, v in found.items()},
    }
    print("lane, ms of Python and of what it calls without waiting:", run.found["python_ms"])
    lane.close()


def correct(run: Run) -> None:
    """Logits against ONNX Runtime in fp32: on the same pixels, and with decoding on the GPU."""
    import onnxruntime

    from flowlang.plan.files import compile_file
    from flowlang.plan.rewrite import rewrite

    run.model = resnet(run.folder / "resnet18.onnx", depth=18, width=64)
    flow = rewrite(compile_file(run.flow("pixels", decoder="libjpeg")).flows[0])
    works = [host.work_of(n, {}) for n in flow.nodes() if n is not flow.input and n.model is None]
    session = onnxruntime.InferenceSession(str(run.model), providers=["CPUExecutionProvider"])

    def reference(picture: bytes) -> Any:
        value: Any = picture
        for work in works:
            value = work(value)
        return session.run(None, {"data": value[None]})[0][0]

    wanted = np.stack([reference(p) for p in run.pictures])
    found = {}
    for label, decoder in (("same pixels", "libjpeg"), ("GPU decode", "")):
        with load(run.flow("correct", decoder=decoder), device="gpu", engines=run.engines) as app:
            got = np.stack(list(app.map(run.pictures)))
        error = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        a, b = got - got.mean(0), wanted - wanted.mean(0)
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        found[label] = {
            "relative_error_max": round(float(error.max()), 5),
            "relative_error_mean": round(float(error.mean()), 5),
            "same_top1": int((got.argmax(1) == wanted.argmax(1)).sum()),
            "pictures": len(wanted),
            "centred_cosine_min": round(float(cosine.min()), 5),
            "centred_cosine_mean": round(float(cosine.mean()), 5),
        }
    run.found["correct"] = found
    run.found["decoded"] = _decode_differences(run)
    print("decoded", run.found["decoded"], flush=True)
    print("correct", json.dumps(found), flush=True)


def _decode_differences(run: Run) -> dict[str, float]:
    """DALI's decoding on the GPU against OpenCV's, in levels."""
    from flowlang.plan.files import compile_file

    path = run.folder / "whole.flow"
    path.write_text("decode -> rgb\n")
    flow = compile_file(path).flows[0]
    nodes = [n for n in flow.nodes() if n is not flow.input]
    works = [host.work_of(n, {}) for n in nodes]
    region, stream = dali.Region(nodes, 8, 0, dali.Decoding()), cuda.Stream()
    counts = np.zeros(256, np.int64)
    for picture in run.pictures:
        result = region.run([picture], stream.handle)
        stream.wait()
        value: Any = picture
        for work in works:
            value = work(value)
        difference = np.abs(np.array(result.as_cpu().at(0)).astype(np.int16) - value)
        counts += np.bincount(difference.ravel(), minlength=256)
    shares = np.cumsum(counts) / counts.sum()
    return {
        "mean": round(float((counts * np.arange(256)).sum() / counts.sum()), 4),
        "max": int(np.nonzero(counts)[0].max()),
        "share_within_1": round(float(shares[1]), 6),
        "share_within_3": round(float(shares[3]), 6),
    }


def variants(run: Run) -> None:
    """Fewer and more lanes than there are by default, beside those."""
    for copies in (GPU_LANES - 1, GPU_LANES, GPU_LANES + 1):
        path, maps = run.flow(f"lanes{copies}", copies=copies), (10, 20, 64, 256, SATURATED)
        try:
            flowlang_flow(run, f"x{copies}", path, (10, 64, 256), maps=maps)
        except Exception:
            traceback.print_exc()


def two_gpus(run: Run) -> None:
    """One process on two GPUs: the same flow on the first and on both, in turns."""
    for gpus in ("0", "0..1"):
        path = run.flow(f"gpu{gpus}", settings=f", gpu={gpus}")
        maps = (10, 64, 256, SATURATED, 2 * SATURATED)
        flowlang_flow(run, f"gpu={gpus}", path, (10, 64, 256), maps=maps)


def share(run: Run) -> None:
    """Share of the run's own ceiling at saturation."""
    decode = max(run.found.get("decode", {}).values(), default=0)
    engine = max(run.found.get("engine", {}).values(), default=0)
    ours = max((r.qps for r in run.results if "GPU decode" in r.what), default=0.0)
    if decode and engine and ours:
        run.found["share_of_ceiling"] = round(ours / min(decode, engine), 3)
        print(
            f"share of min(decode {decode:,}, engine {engine:,}): {ours / min(decode, engine):.2f}"
        )


PARTS: dict[str, Callable[[Run], None]] = {
    "wakes": wakes,
    "ceilings": ceilings,
    "pure": pure_tensorrt,
    "gpu": on_gpu,
    "cpu": on_cpu,
    "http": over_http,
    "variants": variants,
    "two": two_gpus,
    "python": python_share,
    "correct": correct,
    "share": share,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default="wakes,ceilings,correct,python,pure,gpu,cpu,http,share")
    parser.add_argument("--engines", type=Path, default=default_directory())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), options.engines, options.seconds)
        print(json.dumps(run.found["machine"]), flush=True)
        for name in options.only.split(","):
            try:
                PARTS[name](run)
            except Exception:
                traceback.print_exc()
                run.found.setdefault("failed", []).append(name)
        print(table(run.results))
        run.found["results"] = [r.as_json() for r in run.results]
        if options.out:
            options.out.write_text(json.dumps(run.found, indent=1))
    sys.exit(1 if run.found.get("failed") else 0)


if __name__ == "__main__":
    main()
