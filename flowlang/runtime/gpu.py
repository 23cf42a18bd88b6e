"""Instances of stages on a GPU: a DALI region and a TensorRT context on one stream.

Layer 3. What the region gives reaches the engine without leaving the GPU and without the host
waiting for it; outputs come back once a batch through pinned memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from flowlang.diagnostics import BadRequest, EngineError, InternalError, StageFailed
from flowlang.plan import graph
from flowlang.plan.chain import decodes_on_gpu
from flowlang.plan.graph import Node
from flowlang.plan.onnx import Model
from flowlang.plan.physical import MAX_BYTES, MAX_PIXELS, PhysicalPlan, StagePlan
from flowlang.plan.types import DTYPES, Image, Tensor, numpy_dtype
from flowlang.runtime import cuda, dali, trt
from flowlang.runtime.conform import NotOfType, converted
from flowlang.runtime.cpu import RowChain
from flowlang.runtime.exif import upright_size
from flowlang.runtime.frame import Frame, framed_by, has_free_size
from flowlang.runtime.host import Work, check_picture, work_of
from flowlang.runtime.picture import Picture, plain_jpeg_size
from flowlang.runtime.rework import Prologue
from flowlang.runtime.vision import as_bmp, sample_pictures

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("flowlang.gpu")

# What the GPU decoders take. Everything else is decoded by OpenCV and handed over as a bitmap.
DECODED = frozenset({"jpeg", "png", "webp", "tiff", "bmp", "jpeg2000", "pnm"})


def is_decoded(picture: Picture) -> bool:
    """Whether the GPU decoders take a picture and get it right."""
    return picture.format in DECODED and picture.is_complete and not picture.stores_rgb


def decodings_of(plan: PhysicalPlan, gpu: int) -> dali.Decodings | None:
    """How pictures are decoded best on a GPU, measured there; None where no stage decodes on it."""
    decoding = [stage for stage in plan.stages if decodes_on_gpu(stage.region)]
    if not any(gpu in stage.gpus for stage in decoding):
        return None
    cuda.use(gpu)
    # Those of all GPUs: they have the same cores.
    regions = sum(dali.regions_for(s.batch[2]) * len(s.gpus) for s in decoding)
    return dali.choose_decodings(gpu, regions, sample_pictures(7))


class GpuResources:
    """What the instances of an app share on one GPU: engines, how to decode, rescue threads."""

    def __init__(self, engines: trt.Engines, decodings: dali.Decodings | None) -> None:
        self.engines = engines
        self.decodings = decodings or dali.Decodings()
        self.rescuers = ThreadPoolExecutor(8, thread_name_prefix="flowlang-rescue")

    def close(self) -> None:
        self.rescuers.shutdown(wait=False, cancel_futures=True)
        self.engines.close()


def _model_of(plan: StagePlan) -> tuple[Node, Model]:
    """The node of a stage that is its model, and the model."""
    for node in plan.nodes:
        if node.model is not None:
            return node, node.model
    raise InternalError("a stage on a GPU has a model")


def spec_of(plan: StagePlan) -> trt.EngineSpec:
    """What the engine of a stage with a model is built from."""
    node, model = _model_of(plan)
    pack = next((n for n in plan.region if n.op == graph.PACK), None)
    return trt.EngineSpec(
        model.path,
        node.params["precision"],
        plan.batch,
        _prologue(pack) if pack is not None else None,
        plan.settings.get("workspace", trt.WORKSPACE),
        model.content,
        model.weights,
    )


def _prologue(pack: Node) -> Prologue | None:
    image = pack.inputs[0].type
    if not isinstance(image, Image) or image.dtype != "u8" or not image.is_sized:
        return None
    if pack.params["dtype"] == "u8":
        return None  # the model takes levels itself, and inside an engine there are none
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
        self.resources = resources
        _, model = _model_of(plan)
        self.name = model.name
        self.given = {p.name: numpy_dtype(p.dtype) for p in model.outputs}
        spec = spec_of(plan)
        # A prologue of the engine packs in place of the region.
        region = [n for n in plan.region if not (spec.prologue and n.op == graph.PACK)]
        engine = resources.engines.of(spec)
        extras = dict(zip(plan.nodes, plan.extras, strict=True))
        self.has_extras = any(extras.values())
        self.after = RowChain(plan.tail, extras, plan.settings)
        self.source: _Pictures | _Arrays
        with ExitStack() as made:  # what is made is given back if the rest cannot be
            self.stream = cuda.Stream()
            made.callback(self.stream.close)
            self.context = trt.Context(
                engine, self.stream, use_graphs=plan.settings.get("graphs", True)
            )
            made.callback(self.context.close)
            if decodes_on_gpu(plan.region):
                self.source = _Pictures(region, plan, gpu, self)
            else:
                self.source = _Arrays(region, plan, self)
            made.pop_all()

    def warm(self) -> None:
        self.source.warm()
        self.context.warm()

    def run(self, values: Sequence[Any]) -> list[Any]:
        return self.collect(self.launch(self.begin(values)))

    def begin(self, values: Sequence[Any]) -> _Batch:
        """Check the items and start decoding them; nothing of it is waited for."""
        batch = _Batch([v[0] for v in values] if self.has_extras else values)
        batch.items = values
        self.source.begin(batch)
        return batch

    def launch(self, batch: _Batch) -> _Batch:
        """Put what was decoded, the model and the copy of its outputs on the stream."""
        try:
            self.source.load(batch)
            if batch.good:
                self.context.start(len(batch.good))
        except Exception:
            self.stream.wait()  # what was decoded goes with the batch, and is still copied from
            raise
        return batch

    def collect(self, batch: _Batch) -> list[Any]:
        """Wait for the stream and give each item its outcome."""
        outcomes, good = batch.outcomes, batch.good
        outputs = self.context.collect(len(good)) if good else {}
        batch.held = []  # DALI's buffers may go back only now that the stream is done with them
        if good:
            items = [batch.items[i] for i in good]
            for index, value in zip(good, self._values(outputs, items), strict=True):
                outcomes[index] = value
        return outcomes

    def _values(self, outputs: Mapping[str, NDArray[Any]], items: Sequence[Any]) -> Sequence[Any]:
        """What the stage gives for each of the items that got through the model."""
        outputs = {n: rows.astype(self.given[n], copy=False) for n, rows in outputs.items()}
        if len(outputs) == 1:
            (rows,) = outputs.values()
            return self.after.of_rows(rows, items)
        records = [{n: rows[i] for n, rows in outputs.items()} for i in range(len(items))]
        return [self.after.through(r, item) for r, item in zip(records, items, strict=True)]

    def close(self) -> None:
        self.source.close()
        self.context.close()
        self.stream.close()


class _Batch:
    """A batch on its way: the outcome of each item so far, and who is still in it.

    `good` has the indices of the items under way, in the order of their rows; `runs` what is being
    decoded for them; `held` what must be kept until the stream is done. `items` are what the stage
    was given, where its operators on the host take more than what flows.
    """

    __slots__ = ("good", "held", "items", "outcomes", "runs", "values")

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = self.items = values
        self.outcomes: list[Any] = [None] * len(values)
        self.good: list[int] = []
        self.runs: list[_Run] = []
        self.held: list[Any] = []


class _Run(NamedTuple):
    """What of a batch one region decodes at once."""

    region: dali.Region
    indices: list[int]
    pictures: list[bytes]


class _Pictures:
    """Encoded pictures to the engine's input, through DALI.

    A batch larger than one region takes is decoded by several of them side by side.
    """

    def __init__(self, nodes: Sequence[Node], plan: StagePlan, gpu: int, lane: GpuInstance) -> None:
        self.lane = lane
        self.nodes = nodes
        self.decode = nodes[0]
        self.free_side = _free_side(nodes)
        self.host = [work_of(n, plan.settings) for n in nodes]
        self.max_bytes = plan.settings.get("max_bytes", MAX_BYTES)
        self.max_pixels = plan.settings.get("max_pixels", MAX_PIXELS)
        self.allows_truncated = self.decode.params["truncated"] == "allow"
        how, most = lane.resources.decodings, plan.batch[2]
        count = dali.regions_for(most)
        self.small = dali.Region(nodes, min(most, dali.SMALL_BATCH), gpu, how.small)
        self.large = [self.small]
        if most > dali.SMALL_BATCH:
            self.large = [
                dali.Region(nodes, -(-most // count), gpu, how.large) for _ in range(count)
            ]
        self.target = next(iter(lane.context.inputs.values()))
        self.row_bytes = next(iter(lane.context.row_bytes.values()))

    def warm(self) -> None:
        """Decode full batches first: the JPEG decoder sets itself up for the first it gets.

        Measured on an H200: 64 pictures take 3.4 ms if the first batch was of 64, and 17 ms for
        good if it was of one, the hardware engines left out.
        """
        pictures, stream = sample_pictures(4), self.lane.stream
        for region in self.regions:
            for count in (region.batch, 1):
                batch = _Batch([pictures[i % 4] for i in range(count)])
                try:
                    result = region.run(batch.values, stream.handle)
                except RuntimeError as error:
                    if isinstance(self._try_on_host(batch.values[0]), Exception):
                        continue  # the region refuses such pictures, and the decoder has seen them
                    raise EngineError(f"DALI does not decode here: {dali.reason(error)}") from None
                self._hand_over(result, list(range(count)), batch)
                stream.wait()

    def begin(self, batch: _Batch) -> None:
        """Sort out what cannot be decoded and start on the rest."""
        good: list[int] = []
        pictures: list[bytes] = []
        for index, data in enumerate(batch.values):
            size = plain_jpeg_size(data, self.max_pixels) if len(data) <= self.max_bytes else None
            if size is None or (self.free_side and self._may_grow(*size)):
                try:
                    data = self._readable(data)
                except BadRequest as error:
                    batch.outcomes[index] = error
                    continue
            good.append(index)
            pictures.append(data)
        regions = [self.small] if len(good) <= self.small.batch else self.large
        count = -(-len(good) // regions[0].batch)
        for number, region in enumerate(regions[:count]):
            part = slice(len(good) * number // count, len(good) * (number + 1) // count)
            batch.runs.append(_Run(region, good[part], pictures[part]))
        for run in batch.runs:
            run.region.start(run.pictures)

    def _may_grow(self, height: int, width: int) -> bool:
        """Whether the region may make too much of a picture stored so, whichever way it is up."""
        short = min(height, width)
        return 2 * height * width * self.free_side**2 > MAX_PIXELS * short**2

    def _readable(self, data: bytes) -> bytes:
        """A picture that the GPU decoders get right, of a size that the region can make.

        Raises BadRequest, blaming an operator, where it is none.
        """
        node = self.decode
        try:
            picture = check_picture(data, self.max_bytes, self.max_pixels, self.allows_truncated)
            readable = data if is_decoded(picture) else as_bmp(data, picture)
            if self.free_side:  # DALI makes any size it is asked for
                frame = Frame.of(*upright_size(data))
                for node in self.nodes:
                    frame = framed_by(node, frame)
            return readable
        except BadRequest as error:
            error.message = f"{node.op} failed: {error.message}"
            error.stage, error.place = node.op, str(node.span)
            raise

    def load(self, batch: _Batch) -> None:
        """Queue the copy of what was decoded into the engine's input, on the GPU."""
        failed: list[_Run] = []
        decoded: list[tuple[_Run, Any]] = []
        for run in batch.runs:
            try:
                decoded.append((run, run.region.result(self.lane.stream.handle)))
            except RuntimeError as error:
                told = "a picture failed its batch of %d: %s"
                log.info(told, len(run.indices), dali.reason(error))
                failed.append(run)
        for run, result in decoded:
            self._hand_over(result, run.indices, batch)
        for run in failed:
            self._rescue(run, batch)

    def _hand_over(self, result: Any, indices: list[int], batch: _Batch) -> None:
        """What a region gave goes into the rows behind those that are taken."""
        size = len(indices) * self.row_bytes
        target = self.target.address + len(batch.good) * self.row_bytes
        address = int(result.data_ptr())  # the pictures are of one size, so they lie in a row
        cuda.copy_on_device(target, address, size, self.lane.stream)
        batch.good += indices
        batch.held.append(result)

    def _rescue(self, run: _Run, batch: _Batch) -> None:
        """A run in which something cannot be decoded, once more without it.

        DALI names at most one of the culprits. So each picture is worked on by the reference
        operators, which tell exactly whose fault it is, and the rest goes through as bitmaps.
        """
        checked = list(self.lane.resources.rescuers.map(self._try_on_host, run.pictures))
        left: list[int] = []
        bitmaps: list[bytes] = []
        for index, found in zip(run.indices, checked, strict=True):
            if isinstance(found, Exception):
                batch.outcomes[index] = found
            else:
                left.append(index)
                bitmaps.append(found)
        if not left:
            return
        try:
            result = run.region.run(bitmaps, self.lane.stream.handle)
        except RuntimeError as error:
            self.lane.stream.wait()  # raises InstanceLost where it is no fault of the pictures
            message = f"decode failed: {dali.reason(error)}"
            for index in left:
                batch.outcomes[index] = StageFailed(
                    message, stage="decode", place=str(self.decode.span)
                )
        else:
            self._hand_over(result, left, batch)

    def _try_on_host(self, data: bytes) -> bytes | Exception:
        try:
            value: Any = data
            for work in self.host:
                value = work(value)
            return as_bmp(data)
        except Exception as error:
            return error

    @property
    def regions(self) -> list[dali.Region]:
        return list(dict.fromkeys((*self.large, self.small)))

    def close(self) -> None:
        for region in self.regions:
            region.close()


def _free_side(nodes: Sequence[Node]) -> int:
    """The side that a resize asks for where the picture decides the other; 0 where none does.

    Where there are two of them, or what they resize is no longer the decoded picture, it is so
    large that every picture is followed through the region.
    """
    free = [i for i, n in enumerate(nodes) if n.op == "resize" and has_free_size(n.params)]
    if not free:
        return 0
    if len(free) > 1 or any(n.op in ("resize", "crop") for n in nodes[: free[0]]):
        return MAX_PIXELS
    params = nodes[free[0]].params
    return int(params["size"] or params["h"] or params["w"])


class _Arrays:
    """Arrays of the host to the engine's inputs, through pinned memory."""

    def __init__(self, nodes: Sequence[Node], plan: StagePlan, lane: GpuInstance) -> None:
        self.lane = lane
        self.before: list[Work] = [work_of(n, plan.settings) for n in nodes]
        context = lane.context
        self.staged: dict[str, cuda.PinnedBuffer] = {}
        try:
            for name in context.inputs:
                shape, dtype = context.engine.shape(name), context.engine.dtype(name)
                self.staged[name] = cuda.PinnedBuffer((context.most, *shape), dtype)
        except BaseException:
            self.close()
            raise

    def warm(self) -> None:
        """Have the model warm up on zeros, which are an index, and a number of rounds, that it can
        have: what new memory holds may be none.
        """
        for name, staged in self.staged.items():
            staged.array[...] = 0
            cuda.copy_to_device(
                self.lane.context.inputs[name], staged, staged.size_bytes, self.lane.stream
            )

    def begin(self, batch: _Batch) -> None: ...

    def load(self, batch: _Batch) -> None:
        """Stack the arrays in pinned memory and queue their copy to the GPU."""
        for index, value in enumerate(batch.values):
            try:
                self._stage(value, len(batch.good))
            except Exception as error:
                batch.outcomes[index] = error
                continue
            batch.good.append(index)
        if not batch.good:
            return
        context = self.lane.context
        for name, staged in self.staged.items():
            size = len(batch.good) * context.row_bytes[name]
            cuda.copy_to_device(context.inputs[name], staged, size, self.lane.stream)

    def _stage(self, value: Any, row: int) -> None:
        """One item into its row of the staged inputs. Raises BadRequest where it does not fit."""
        for work in self.before:
            value = work(value)
        for name, staged in self.staged.items():
            part = value if len(self.staged) == 1 else value[name]
            target = staged.array[row, ...]
            if part.ndim == 2 and target.ndim == 3:  # gray
                part = part[:, :, None]
            if part.shape != target.shape:
                wanted = Tensor("f32", target.shape)
                raise BadRequest(f"`{self.lane.name}` takes {wanted}, not {part.shape}")
            target[...] = part if part.dtype == target.dtype else self._converted(part, target)

    def _converted(self, part: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
        """An array in the numbers that an engine has for a model's: TensorRT 8.6 has 32 bits where
        a model has 64. Raises BadRequest where they do not hold it.
        """
        kind = next(name for name in DTYPES if numpy_dtype(name) == str(target.dtype))
        try:
            fitting: NDArray[Any] = converted(part, target.dtype, Tensor(kind, target.shape))
        except NotOfType as error:
            raise BadRequest(f"the engine of `{self.lane.name}` cannot take it: {error}") from None
        return fitting

    def close(self) -> None:
        for buffer in self.staged.values():
            buffer.close()
