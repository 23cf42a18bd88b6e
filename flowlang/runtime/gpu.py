"""Instances of stages on a GPU: a DALI region and a TensorRT context on one stream.

Layer 3. What the region gives reaches the engine without leaving the GPU and without the host
waiting for it; outputs come back once a batch through pinned memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import BadRequest, InternalError, RequestError, StageFailed
from flowlang.plan import graph
from flowlang.plan.graph import Node
from flowlang.plan.physical import MAX_BYTES, MAX_PIXELS, StagePlan, decodes_on_gpu
from flowlang.plan.types import Image, Tensor
from flowlang.runtime import cuda, dali, trt
from flowlang.runtime.host import Work, as_bmp, check_picture, sample_pictures, work_of
from flowlang.runtime.picture import Picture
from flowlang.runtime.rework import Prologue

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("flowlang.gpu")

# What the GPU decoders take. Everything else is decoded by OpenCV and handed over as a bitmap.
DECODED = frozenset({"jpeg", "png", "webp", "tiff", "bmp", "jpeg2000", "pnm"})


def is_decoded(picture: Picture) -> bool:
    """Whether the GPU decoders take a picture and get it right."""
    return picture.format in DECODED and picture.is_complete and not picture.stores_rgb


class GpuResources:
    """What the instances of an app share on one GPU: engines, how to decode, rescue threads."""

    def __init__(self, engines: trt.Engines, decoding: dali.Decoding) -> None:
        self.engines = engines
        self.decoding = decoding
        self.rescuers = ThreadPoolExecutor(8, thread_name_prefix="flowlang-rescue")

    def close(self) -> None:
        self.rescuers.shutdown(wait=False, cancel_futures=True)


def spec_of(plan: StagePlan) -> trt.EngineSpec:
    """What the engine of a stage with a model is built from."""
    node = next(n for n in plan.nodes if n.model is not None)
    if node.model is None:
        raise InternalError("a stage without a model has no engine")
    pack = next((n for n in plan.region if n.op == graph.PACK), None)
    return trt.EngineSpec(
        node.model.path,
        node.params["precision"],
        plan.batch,
        _prologue(pack) if pack is not None else None,
        plan.settings.get("workspace", trt.WORKSPACE),
    )


def _prologue(pack: Node) -> Prologue | None:
    image = pack.inputs[0].type
    if not isinstance(image, Image) or image.dtype != "u8" or not image.is_sized:
        return None
    return Prologue(
        pack.params["layout"],
        image.height or 0,
        image.width or 0,
        image.channels or 3,
        pack.params["mean"],
        pack.params["std"],
    )


class GpuInstance:
    """One lane: pictures or arrays in, what the model and the host operators behind it give out."""

    def __init__(self, plan: StagePlan, gpu: int, resources: GpuResources) -> None:
        cuda.use(gpu)
        self.plan = plan
        self.stream = cuda.Stream()
        self.resources = resources
        node = next(n for n in plan.nodes if n.model is not None)
        if node.model is None:
            raise InternalError("a GPU stage has a model")
        self.name, self.place = node.model.name, str(node.span)
        self.ports = node.model.inputs
        spec = spec_of(plan)
        engine = resources.engines.of(spec, cuda.gpu(gpu))
        self.context = trt.Context(
            engine, self.stream, use_graphs=plan.settings.get("graphs", True)
        )
        self.after = [work_of(n, plan.settings) for n in plan.tail]
        self.source: _Pictures | _Arrays
        if decodes_on_gpu(plan.region):
            self.source = _Pictures(plan, gpu, self, spec.prologue is not None)
        else:
            self.source = _Arrays(plan, self, spec.prologue is not None)

    def warm(self) -> None:
        self.source.warm()
        self.context.warm()

    def run(self, values: Sequence[Any]) -> list[Any]:
        outcomes, good, held = self.source.load(values)
        if good:
            self.context.start(len(good))
            outputs = self.context.collect(len(good))
            self._scatter(outputs, good, outcomes)
        del held  # DALI's buffers may go back only now that the stream is done with them
        if not self.after:
            return outcomes
        return [o if isinstance(o, Exception) else self._finish(o) for o in outcomes]

    def _scatter(self, outputs: Any, good: Sequence[int], outcomes: list[Any]) -> None:
        if len(outputs) == 1:
            (rows,) = outputs.values()
            for index, row in zip(good, rows, strict=True):
                outcomes[index] = row
            return
        for row, index in enumerate(good):
            outcomes[index] = {name: values[row] for name, values in outputs.items()}

    def _finish(self, value: Any) -> Any:
        try:
            for work in self.after:
                value = work(value)
        except RequestError as error:
            return error
        return value

    def close(self) -> None:
        self.source.close()
        self.context.close()
        self.stream.close()


class _Pictures:
    """Encoded pictures to the engine's input, through DALI."""

    def __init__(self, plan: StagePlan, gpu: int, lane: GpuInstance, is_folded: bool) -> None:
        nodes = [n for n in plan.region if not (is_folded and n.op == graph.PACK)]
        self.lane = lane
        self.decode = nodes[0]
        self.host = [work_of(n, plan.settings) for n in nodes]
        self.max_bytes = plan.settings.get("max_bytes", MAX_BYTES)
        self.max_pixels = plan.settings.get("max_pixels", MAX_PIXELS)
        self.allows_truncated = self.decode.params["truncated"] == "allow"
        self.region = dali.Region(nodes, plan.batch[2], gpu, lane.resources.decoding)
        self.target = next(iter(lane.context.inputs.values()))
        self.row_bytes = next(iter(lane.context.row_bytes.values()))

    def warm(self) -> None:
        """Decode a full batch first: the JPEG decoder sets itself up for the first it gets."""
        pictures = sample_pictures(4)
        for count in (self.region.batch, 1):
            values = [pictures[i % 4] for i in range(count)]
            held = self.load(values)
            self.lane.stream.wait()
            del held

    def load(self, values: Sequence[Any]) -> tuple[list[Any], list[int], Any]:
        """Decode what can be decoded into the engine's input.

        Gives the outcome of each item so far, the indices of those on their way in the order of
        their rows, and what must be kept until the stream is done.
        """
        import numpy as np

        outcomes: list[Any] = [None] * len(values)
        good: list[int] = []
        pictures: list[NDArray[Any]] = []
        for index, data in enumerate(values):
            try:
                picture = check_picture(
                    data, self.max_bytes, self.max_pixels, self.allows_truncated
                )
                if not is_decoded(picture):
                    data = as_bmp(data, picture)
            except BadRequest as error:
                outcomes[index] = self._blame(error)
                continue
            good.append(index)
            pictures.append(np.frombuffer(data, np.uint8))
        if not good:
            return outcomes, good, None
        try:
            result = self.region.run(pictures, self.lane.stream.handle)
        except RuntimeError as error:
            log.info("a picture failed its batch of %d: %s", len(good), str(error).splitlines()[0])
            return self._rescue(values, good, outcomes)
        return outcomes, good, self._hand_over(result, len(good), pictures)

    def _hand_over(self, result: Any, count: int, pictures: Any) -> Any:
        """Queue the copy of the region's result into the engine's input, on the GPU."""
        tensor = result.as_tensor()
        size = count * self.row_bytes
        cuda.copy_on_device(self.target.address, int(tensor.data_ptr()), size, self.lane.stream)
        return result, tensor, pictures

    def _rescue(
        self, values: Sequence[Any], good: list[int], outcomes: list[Any]
    ) -> tuple[list[Any], list[int], Any]:
        """A batch in which something cannot be decoded, once more without it.

        DALI names at most one of the culprits. So each picture is worked on by the reference
        operators, which tell exactly whose fault it is, and the rest goes through as bitmaps.
        """
        import numpy as np

        checked = list(
            self.lane.resources.rescuers.map(self._try_on_host, [values[i] for i in good])
        )
        pictures: list[NDArray[Any]] = []
        left: list[int] = []
        for index, found in zip(good, checked, strict=True):
            if isinstance(found, Exception):
                outcomes[index] = found
            else:
                left.append(index)
                pictures.append(np.frombuffer(found, np.uint8))
        if not left:
            return outcomes, left, None
        try:
            result = self.region.run(pictures, self.lane.stream.handle)
        except RuntimeError as error:
            for index in left:
                outcomes[index] = StageFailed(
                    f"decode failed: {str(error).splitlines()[0]}",
                    stage="decode",
                    place=str(self.decode.span),
                )
            return outcomes, [], None
        return outcomes, left, self._hand_over(result, len(left), pictures)

    def _try_on_host(self, data: bytes) -> bytes | Exception:
        try:
            value: Any = data
            for work in self.host:
                value = work(value)
            return as_bmp(data)
        except Exception as error:
            return error

    def _blame(self, error: RequestError) -> RequestError:
        error.message = f"decode failed: {error.message}"
        error.stage, error.place = "decode", str(self.decode.span)
        return error

    def close(self) -> None:
        self.region.close()


class _Arrays:
    """Arrays of the host to the engine's inputs, through pinned memory."""

    def __init__(self, plan: StagePlan, lane: GpuInstance, is_folded: bool) -> None:
        self.lane = lane
        nodes = [n for n in plan.region if not (is_folded and n.op == graph.PACK)]
        self.before: list[Work] = [work_of(n, plan.settings) for n in nodes]
        context = lane.context
        self.staged = {
            name: cuda.PinnedBuffer(
                (context.most, *context.engine.shape(name)), context.engine.dtype(name)
            )
            for name in context.inputs
        }

    def warm(self) -> None: ...

    def load(self, values: Sequence[Any]) -> tuple[list[Any], list[int], Any]:
        """As of _Pictures: arrays are stacked in pinned memory and copied over."""
        outcomes: list[Any] = [None] * len(values)
        good: list[int] = []
        names = list(self.staged)
        for index, value in enumerate(values):
            try:
                for work in self.before:
                    value = work(value)
                for name in names:
                    part = value if len(names) == 1 else value[name]
                    row = self.staged[name].array[len(good)]
                    if part.ndim == 2 and row.ndim == 3:  # gray
                        part = part[:, :, None]
                    if part.shape != row.shape:
                        wanted = Tensor("f32", row.shape)
                        raise BadRequest(f"`{self.lane.name}` takes {wanted}, not {part.shape}")
                    row[...] = part
            except Exception as error:
                outcomes[index] = error
                continue
            good.append(index)
        context = self.lane.context
        for name in names if good else ():
            size = len(good) * context.row_bytes[name]
            cuda.copy_to_device(context.inputs[name], self.staged[name], size, self.lane.stream)
        return outcomes, good, None

    def close(self) -> None:
        for buffer in self.staged.values():
            buffer.close()
