"""Regions as NVIDIA DALI pipelines: decode, resize, colour, crop, normalize, pack in one go.

Layer 3, and the only file importing nvidia.dali. The same graph is built for the GPU (`mixed`
decoding on the JPEG engines) and, with no device, for DALI's CPU backend, so that machines without
a GPU test the graph that runs on one, against `host.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import EngineError, InternalError
from flowlang.plan import graph
from flowlang.plan.graph import Node
from flowlang.plan.rewrite import levels_of
from flowlang.plan.rules import sides_of
from flowlang.plan.types import Image
from flowlang.runtime.stage import InstanceLost

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("flowlang.dali")

INPUT = "pictures"


@functools.cache
def _dali() -> Any:
    try:
        from nvidia import dali
        from nvidia.dali import fn, tensors, types  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"decoding on a GPU needs NVIDIA DALI ({error}): pip install 'flowlang[gpu]'"
        ) from None
    return dali


# DALI scales sides in single precision, in which a half that is to be rounded up may come out
# below it. Where a side is asked for with this much more, it does not.
SLIGHTLY_MORE = 1 + 2**-22
# Of a batch of 32 and more DALI (2.4; older ones of more than four for each thread and one) looks
# at the headers in blocks side by side. Where one of them is none, it goes on before all blocks are
# done, and those left write to memory that is gone: the process dies of one bad picture. So no
# region takes so many. It is a multiple of the seven JPEG engines that large GPUs have.
MOST = 28
SMALL_BATCH = 8  # up to this a pipeline of its own decodes: it is made for latency


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a pipeline decodes JPEG: the share given to the hardware engines, and CPU threads."""

    hardware_load: float = 1.0
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Decodings:
    """How batches of up to SMALL_BATCH pictures are decoded, and larger ones.

    `uses_engines` is what a measurement at start-up saw, `rate` the pictures a second that one
    region decoded in large batches.
    """

    small: Decoding = Decoding()
    large: Decoding = Decoding()
    uses_engines: bool = False
    rate: float = 0.0


class Region:
    """A pipeline for runs of 1 to `batch` pictures. For one thread only.

    DALI reads pictures where they lie. They are kept here until their batch is out; of one that
    failed until the next is, for DALI does not say when its threads have left the others of it.
    """

    def __init__(
        self, nodes: Sequence[Node], batch: int, device: int | None, decoding: Decoding
    ) -> None:
        if batch > MOST:
            raise InternalError(f"a region takes {MOST} pictures, not {batch}")
        self.batch = batch
        pipe = _pipeline(
            batch,
            device,
            decoding,
            lambda data: _lower(_dali(), nodes, data, device, decoding),
            exec_dynamic=True,
        )
        self._pipe = pipe
        self._wrap = _dali().tensors.TensorCPU
        self._feed, self._run, self._outputs = _calls(pipe)
        self._is_begun = False
        self._read: deque[Sequence[bytes]] = deque(maxlen=2)  # batches that DALI may be reading

    def start(self, pictures: Sequence[bytes]) -> None:
        """Begin a batch, in DALI's own threads.

        Raises InstanceLost where it is not begun, or where nobody took the result of the one
        before: from then on each batch would be given the pictures of another.
        """
        if self._is_begun:
            raise InstanceLost("a batch was begun whose pictures nobody took")
        wrap = self._wrap  # of DALI's own kind, and so looked at no further
        wrapped = [wrap(p) for p in pictures]
        self._read.append(pictures)
        self._is_begun = True
        try:
            self._feed(INPUT, wrapped)
            self._run()
        except RuntimeError as error:
            raise InstanceLost(f"DALI begins no batch: {reason(error)}") from error

    def result(self, stream: int | None = None) -> Any:
        """The begun batch (DALI's TensorListGPU, or TensorListCPU without a device).

        On a GPU it is ordered on `stream` and must be kept until what reads it there is done.
        Raises RuntimeError where any picture cannot be decoded; the pipeline stays usable.
        """
        self._is_begun = False
        found = self._outputs(None if stream is None else ctypes.c_void_p(stream))[0]
        self._read.clear()
        return found

    def run(self, pictures: Sequence[bytes], stream: int | None = None) -> Any:
        """`start` and `result` in one."""
        self.start(pictures)
        return self.result(stream)

    def close(self) -> None:
        del self._pipe, self._feed, self._run, self._outputs
        self._read.clear()


def regions_for(batch: int) -> int:
    """How many regions decode a batch side by side."""
    return -(-batch // MOST)


def _pipeline(
    batch: int, device: int | None, how: Decoding, work: Callable[[Any], Any], **options: Any
) -> Any:
    """A pipeline of what `work` makes of up to `batch` encoded pictures."""
    dali = _dali()
    with _told("DALI makes no pipeline"):
        pipe = dali.Pipeline(
            batch_size=batch,
            num_threads=_threads(how, batch),
            device_id=device,
            prefetch_queue_depth=1,
            **options,
        )
        with pipe:
            data = dali.fn.external_source(
                name=INPUT, ndim=1, dtype=dali.types.UINT8, no_copy=True, device="cpu"
            )
            pipe.set_outputs(work(data))
        pipe.build()
    return pipe


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """DALI's RuntimeErrors, of memory say, as EngineErrors: where no picture is at fault."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"{what}: {reason(error)}") from error


def _threads(decoding: Decoding, batch: int) -> int:
    """So many that a batch is not looked at in blocks: see MOST."""
    return max(decoding.threads, -(-batch // 4) - 1)


def _calls(pipe: Any) -> tuple[Any, Any, Any]:
    """A pipeline's `feed_input`, `schedule_run` and `outputs`.

    Taken from the object behind it where it has them: what the public ones look up and check again
    for each batch costs 40 us of Python and a microsecond a picture.
    """
    inner: Any = getattr(pipe, "_pipe", None)
    if all(hasattr(inner, name) for name in ("SetExternalTensorInput", "Run", "Outputs")):

        def feed(name: str, tensors: list[Any]) -> None:
            inner.SetExternalTensorInput(name, tensors, None, False)

        return feed, inner.Run, inner.Outputs
    return pipe.feed_input, pipe.schedule_run, pipe.outputs


def reason(error: RuntimeError) -> str:
    """What DALI says went wrong, without the pipeline's definition that it tells before."""
    said = str(error)
    lines = (said.partition("encountered:\n")[2].strip() or said.strip()).splitlines()
    return lines[0] if lines else "no reason given"


def _lower(dali: Any, nodes: Sequence[Node], data: Any, device: int | None, how: Decoding) -> Any:
    """The region's operators as DALI's. Inside, an image of undecided colour is RGB."""
    colour = "rgb"
    for node in nodes:
        if node.op == "decode":
            data = _decode(dali, data, device, how)
        elif node.op == "resize":
            data = _resize(dali, data, node)
        elif node.op in ("rgb", "bgr", "gray"):
            data, colour = _recolour(dali, data, colour, node.op), node.op
        elif node.op == "crop":
            data = _crop(dali, data, node)
        elif node.op in ("normalize", graph.PACK):
            data = _levels(dali, data, node, colour)
        else:
            raise EngineError(f"`{node.op}` does not run in a DALI region")
    last = nodes[-1].type
    if isinstance(last, Image) and last.colour is None:
        data = _recolour(dali, data, colour, "bgr")
    return data


def _decode(dali: Any, data: Any, device: int | None, how: Decoding) -> Any:
    if device is None:
        return dali.fn.decoders.image(data, device="cpu", output_type=dali.types.RGB)
    return dali.fn.decoders.image(
        data,
        device="mixed",
        output_type=dali.types.RGB,
        jpeg_fancy_upsampling=True,  # interpolated chroma, as libjpeg-turbo does
        hw_decoder_load=how.hardware_load,
        preallocate_width_hint=1024,
        preallocate_height_hint=1024,
    )


def _resize(dali: Any, data: Any, node: Node) -> Any:
    params = node.params
    fit = params["fit"]
    h, w = sides_of(params)
    high, wide = (None if side is None else side * SLIGHTLY_MORE for side in (h, w))
    # subpixel_scale would shift the sampling grid by the rounding of the output's size.
    options = {
        "interp_type": dali.types.INTERP_LINEAR,
        "antialias": params["antialias"],
        "subpixel_scale": False,
    }
    if fit == "shorter":
        return dali.fn.resize(data, resize_shorter=high, **options)
    if fit == "stretch":
        sides = {"resize_y": high, "resize_x": wide}
        return dali.fn.resize(data, **{k: v for k, v in sides.items() if v}, **options)
    data = dali.fn.resize(data, size=[high, wide], mode="not_larger", **options)
    if fit == "pad":
        return dali.fn.pad(data, axes=(0, 1), shape=(h, w), fill_value=float(params["fill"]))
    return dali.fn.crop(
        data,
        crop=(float(h), float(w)),
        out_of_bounds_policy="pad",
        fill_values=[float(params["fill"])],
        rounding="truncate",
    )


def _recolour(dali: Any, data: Any, given: str, wanted: str) -> Any:
    if given == wanted:
        return data
    names = {"rgb": dali.types.RGB, "bgr": dali.types.BGR, "gray": dali.types.GRAY}
    return dali.fn.color_space_conversion(data, image_type=names[given], output_type=names[wanted])


def _crop(dali: Any, data: Any, node: Node) -> Any:
    h, w = sides_of(node.params)
    whole: Any = data.shape() if None in (h, w) else None  # DALI wants both sides named
    crop_h, crop_w = (
        dali.fn.cast(whole[axis], dtype=dali.types.FLOAT) if side is None else float(side)
        for axis, side in enumerate((h, w))
    )
    return dali.fn.crop(data, rounding="truncate", crop_h=crop_h, crop_w=crop_w)


def _levels(dali: Any, data: Any, node: Node, colour: str) -> Any:
    """`normalize`, or the packing of a model's input."""
    types = dali.types
    if node.op == "normalize":
        mean, std = levels_of(node)
        dtype, layout = types.FLOAT, "HWC"
    else:
        mean, std = node.params["mean"], node.params["std"]
        dtype = {"f32": types.FLOAT, "f16": types.FLOAT16, "u8": types.UINT8}[node.params["dtype"]]
        layout = node.params["layout"].upper()
        if mean is None and node.params["dtype"] == "u8":
            return data if layout == "HWC" else dali.fn.transpose(data, perm=[2, 0, 1])
    channels = 1 if colour == "gray" else 3
    return dali.fn.crop_mirror_normalize(
        data,
        dtype=dtype,
        output_layout=layout,
        mean=list(mean or (0.0,) * channels),
        std=list(std or (1.0,) * channels),
    )


# Choosing how to decode


def choose_decodings(device: int, regions: int, pictures: Sequence[bytes]) -> Decodings:
    """The fastest ways to decode here, found by decoding `pictures` a few times each way, as many
    at once as a region takes.

    `regions` is how many will decode side by side. Hardware engines are never assumed: many GPUs
    have none, and containers without the `video` capability hide them. Without them CPU threads
    carry the work, as many as the regions leave each, and what share of it the GPU takes is tried.
    Making a pipeline takes long, so no more is tried than has made a difference.
    """
    share = max(2, len(os.sched_getaffinity(0)) // regions)
    pictures = [pictures[i % len(pictures)] for i in range(MOST)]
    with _told("DALI does not decode here"):
        rates = {how: _rate(device, how, pictures) for how in (Decoding(0.0, 2), Decoding(1.0, 2))}
        without, engines = rates.values()
        uses_engines = engines > 1.5 * without
        if uses_engines:  # one thread was the faster for few pictures wherever it was tried
            small, large = Decoding(1.0, 1), Decoding(1.0, 2)
        else:
            ways = [Decoding(load, share) for load in (0.0, 0.65, 1.0)]
            rates |= {how: _rate(device, how, pictures) for how in ways}
            large = max(ways, key=rates.__getitem__)
            small = min(ways, key=lambda how: _time_s(device, how, pictures[:SMALL_BATCH]))
    chosen = Decodings(small, large, uses_engines, rates[large])
    log.info("%s", describe(chosen))
    return chosen


def describe(how: Decodings) -> str:
    """What was chosen, for the log."""
    who = "the GPU's JPEG engines" if how.uses_engines else "CPU threads and CUDA (no JPEG engines)"
    small, large = how.small, how.large
    return (
        f"JPEG is decoded by {who}: hardware load {large.hardware_load:g}, {large.threads} threads "
        f"a region ({small.hardware_load:g}, {small.threads} up to {SMALL_BATCH} at once), "
        f"{how.rate:,.0f} pictures/s in one region"
    )


def _rate(device: int, how: Decoding, pictures: Sequence[bytes]) -> float:
    """Pictures a second that one pipeline decodes."""
    batch, rounds = _arrays(pictures), 6
    pipe = _decoder(device, how, len(batch))
    best_s = float("inf")
    for _ in range(3):  # the first round warms up
        start_s = time.perf_counter()
        for _ in range(rounds):
            pipe.run(**{INPUT: batch})
        best_s = min(best_s, time.perf_counter() - start_s)
    return rounds * len(batch) / best_s


def _time_s(device: int, how: Decoding, pictures: Sequence[bytes]) -> float:
    """Seconds that batches of one, of half and of all the pictures take, one after the other."""
    batch = _arrays(pictures)
    pipe = _decoder(device, how, len(batch))
    pipe.run(**{INPUT: batch})
    total_s = 0.0
    for size in (1, len(batch) // 2, len(batch)):
        times_s = []
        for _ in range(25):
            start_s = time.perf_counter()
            pipe.run(**{INPUT: batch[:size]})
            times_s.append(time.perf_counter() - start_s)
        total_s += statistics.median(times_s)
    return total_s


def _arrays(pictures: Sequence[bytes]) -> list[NDArray[Any]]:
    import numpy as np

    return [np.frombuffer(picture, np.uint8) for picture in pictures]


def _decoder(device: int, how: Decoding, batch: int) -> Any:
    """A pipeline that decodes and does nothing else."""
    return _pipeline(batch, device, how, lambda data: _decode(_dali(), data, device, how))
