"""The physical plan: which operators run together, where, how many at once.

Layer 2. Runs of operators become stages. A stage is a chain of a region (image operators), at most
one model, and what follows it on the host; a chain is cut where a result is used twice, where a
named flow is mentioned more than once, and before a second model. An operator in Python is a stage
of its own. What is between stages, and which of them an item goes through, are the steps of a
program: the flow's own, and below a control node those of each of its bodies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flowlang.diagnostics import CompileError, Diagnostic, Label
from flowlang.plan import graph
from flowlang.plan.chain import (
    ChainIdentity,
    chain_identity,
    chains_of,
    is_work,
    kind_of,
    runs_on_gpu,
)
from flowlang.plan.check import Plan
from flowlang.plan.declare import MAIN
from flowlang.plan.graph import Body, FlowPlan, Node, topological
from flowlang.plan.onnx import Model
from flowlang.plan.ops import OPS
from flowlang.plan.rewrite import rewrite
from flowlang.plan.schedule import COPIES, NORMAL, PRIORITIES, Given
from flowlang.plan.sharing import ModelChain, Part, Shared, model_chain, parts_of
from flowlang.plan.types import Type

MAX_BYTES = 32 << 20  # of a picture file
MAX_PIXELS = 64 << 20  # of a picture: three times a 24-megapixel camera's
QUEUE = 256
LIGHT_BATCH = 64  # stages without a model share out what waits; this bounds one hand-over
PYTHON_TIMEOUT_S = 30.0  # of an operator in Python, which may well never come back
GPU_LANES = 3  # each decodes a batch while its last one is in the model
LANES_OF_EACH_GPU = 2  # where there are several: all lanes share one interpreter
GPU_BATCH = 56  # a multiple of the seven JPEG engines that large GPUs have
HOST_OPS = frozenset(op.name for op in OPS.values() if op.kind == "host")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the plan is made for: `device` is `cpu`, or `gpu` with the numbers of those to use."""

    cores: int
    device: str = "cpu"
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StagePlan:
    """A chain of operators that each instance runs in one go.

    `device` is `cpu` or `gpu`; `gpus` has the GPU of each instance, and is empty on the CPU.
    """

    index: int
    name: str
    nodes: tuple[Node, ...]
    device: str
    gpus: tuple[int, ...]
    instances: int
    batch: tuple[int, int, int]
    wait_s: float
    timeout_s: float | None
    settings: Mapping[str, Any]

    @property
    def extras(self) -> tuple[tuple[int, ...], ...]:
        """For each operator, which values of an item it gets besides the one that flows.

        An item of a stage with any is a tuple: first what flows, then all the others in order.
        """
        found, at = [], 1
        for node in self.nodes:
            count = len(node.inputs) - 1
            found.append(tuple(range(at, at + count)))
            at += count
        return tuple(found)

    @property
    def model(self) -> Model | None:
        return next((n.model for n in self.nodes if n.model is not None), None)

    @property
    def place(self) -> str:
        """Where it runs, as `--device` would have it: `cpu`, `gpu:1`, or `gpu:0..1`."""
        used = sorted(set(self.gpus))
        if not used:
            return self.device
        return f"gpu:{used[0]}" if len(used) == 1 else f"gpu:{used[0]}..{used[-1]}"

    @property
    def at_once(self) -> int:
        """How many items are worked on at the same time. Without batches it is one an instance,
        however many it takes in one go."""
        return self.instances * (self.batch[2] if _batched(self.nodes) else 1)

    @property
    def region(self) -> tuple[Node, ...]:
        """The image operators and the packing, in front of the model."""
        return tuple(n for n in self.nodes if kind_of(n) == "image")

    @property
    def tail(self) -> tuple[Node, ...]:
        """What runs on the host, behind the model."""
        return tuple(n for n in self.nodes if kind_of(n) == "host")


@dataclass(frozen=True, slots=True)
class Unit:
    """One step: a stage's work, or glue, or a control node with the steps of its bodies.

    `inputs` and `output` are slots. Inside a body, slot 0 is its item, and `captures` tells which
    slots get which of the control node's inputs.
    """

    stage: int | None
    node: Node
    inputs: tuple[int, ...]
    output: int
    bodies: tuple[Steps, ...] = ()


@dataclass(frozen=True, slots=True)
class Steps:
    """The units of one graph, those that give a value before those that take it.

    `result` is the slot of what it gives.
    """

    units: tuple[Unit, ...]
    slots: int
    result: int
    captures: tuple[tuple[int, int], ...] = ()

    def stages(self) -> Iterator[int]:
        """The stages that are used, those inside bodies too."""
        for unit in self.units:
            if unit.stage is not None:
                yield unit.stage
            for body in unit.bodies:
                yield from body.stages()


@dataclass(frozen=True, slots=True)
class FlowProgram:
    """How a request walks through the stages. Slot 0 has its item, then come its parameters."""

    name: str
    input: Type
    output: Type
    steps: Steps
    queue: int
    slo_s: float | None
    priority: int
    plan: FlowPlan


@dataclass(frozen=True, slots=True)
class PhysicalPlan:
    """`plans` are those of the files it was made from."""

    plans: tuple[Plan, ...]
    machine: Machine
    stages: tuple[StagePlan, ...]
    programs: tuple[FlowProgram, ...]
    remarks: tuple[Diagnostic, ...]

    @property
    def files(self) -> list[str]:
        """All that it was made from."""
        return [file for plan in self.plans for file in plan.files]


def lower(plans: Sequence[Plan], machine: Machine) -> PhysicalPlan:
    """Checked plans, of a file each, to one physical plan for a machine."""
    flows = [[rewrite(flow) for flow in plan.flows] for plan in plans]
    chains = [
        chains_of([output for flow in each for output in flow.levels()], plan, machine)
        for plan, each in zip(plans, flows, strict=True)
    ]
    parts = _parts(chains, plans, machine)
    stages = _Stages(machine)
    programs: list[FlowProgram] = []
    for plan, each, pieces in zip(plans, flows, map(_pieces, chains, parts), strict=True):
        walk = stages.walk(pieces, plan)
        programs += [_program(flow, walk, plan) for flow in each]
    if stages.errors:
        raise CompileError(list(dict.fromkeys(stages.errors)))  # a flow's is that of all its stages
    return PhysicalPlan(
        tuple(plans), machine, tuple(stages.all), tuple(programs), _remarks(stages.all, machine)
    )


def _parts(
    chains: Sequence[Sequence[list[Node]]], plans: Sequence[Plan], machine: Machine
) -> list[dict[ChainIdentity, Part]]:
    """For each file, which parts of which chains are stages of other files too."""
    files: list[dict[ChainIdentity, ModelChain]] = []
    for plan, own in zip(plans, chains, strict=True):
        files.append({})
        for chain in own:
            at = next((i for i, node in enumerate(chain) if node.model is not None), None)
            if at is not None:
                # Parted from a model on a GPU, pictures would be decoded by the CPU instead.
                is_whole = runs_on_gpu(chain[at], plan, machine)
                found = model_chain(chain, at, plan, is_whole=is_whole)
                files[-1][chain_identity(chain)] = found
    return parts_of(files)


Piece: TypeAlias = tuple[list[Node], Shared | None]


def _pieces(chains: Sequence[list[Node]], parts: Mapping[ChainIdentity, Part]) -> Iterator[Piece]:
    """The chains of a file, cut where a part of one is a stage of other files too."""
    for chain in chains:
        part = parts.get(chain_identity(chain))
        yield from part.cut(chain) if part is not None else [(chain, None)]


class _Stages:
    """The stages made so far."""

    def __init__(self, machine: Machine) -> None:
        self.all: list[StagePlan] = []
        self.errors: list[Diagnostic] = []
        self._machine = machine
        self._of_shared: dict[Shared, int] = {}

    def walk(self, pieces: Iterable[Piece], plan: Plan) -> _Walk:
        """The stages of a file's chains, those that are new made."""
        stage_of: dict[ChainIdentity, int] = {}
        chain_at: dict[int, list[Node]] = {}
        for chain, shared in pieces:
            key = chain_identity(chain)
            if key not in stage_of:
                stage_of[key] = self._stage(chain, shared, plan)
            chain_at[id(chain[-1])] = chain
        return _Walk(chain_at, stage_of)

    def _stage(self, chain: list[Node], shared: Shared | None, plan: Plan) -> int:
        number = len(self.all)
        if shared is None:
            self.all.append(self._made(number, _name([chain]), chain, plan))
            return number
        if shared not in self._of_shared:
            self._of_shared[shared] = number
            self.all.append(self._made(number, _name(shared.chains), chain, plan))
        return self._of_shared[shared]

    def _made(self, index: int, name: str, chain: list[Node], plan: Plan) -> StagePlan:
        machine = self._machine
        given: dict[str, Given] = {}
        for node in chain:
            given.update(plan.settings.at(node.site))
        settings: dict[str, Any] = {n: g.value for n, g in given.items()}
        batched = _batched(chain)
        models = [n for n in batched if n.model is not None]
        device = settings.get("device", machine.device) if models and machine.gpus else "cpu"
        instances = _instances(chain, settings, machine, device)
        is_python = bool(batched) and not models
        wrong = list(_wrong_gpus(given, machine, instances)) if device == "gpu" else []
        self.errors += wrong
        return StagePlan(
            index,
            name,
            tuple(chain),
            device,
            _gpus(settings, machine, instances) if device == "gpu" and not wrong else (),
            instances,
            _batch(batched, settings, device),
            settings.get("wait", 0.0),
            settings.get("timeout", PYTHON_TIMEOUT_S if is_python else None),
            settings,
        )


def _batched(chain: Sequence[Node]) -> list[Node]:
    return [n for n in chain if n.model is not None or n.op == graph.PYTHON]


def _name(chains: Sequence[Sequence[Node]]) -> str:
    """A stage's name: of its flow, or in the unnamed one, or in several, of what it does."""
    node = next(iter(_batched(chains[0])), chains[0][-1])
    if node.op == graph.PYTHON:
        return str(node.params[graph.FUNCTION].shown)
    flows = {chain[-1].site.flow for chain in chains}
    if len(flows) == 1 and node.site.flow != MAIN:
        return node.site.flow
    return node.model.path.stem if node.model is not None else chains[0][0].op


def _gpus(settings: Mapping[str, Any], machine: Machine, instances: int) -> tuple[int, ...]:
    """The GPU of each instance: spread evenly over the range that `gpu` gives."""
    first, last = settings.get("gpu", (machine.gpus[0], machine.gpus[0]))
    return tuple(first + i % (last - first + 1) for i in range(instances))


def _wrong_gpus(
    given: Mapping[str, Given], machine: Machine, instances: int
) -> Iterator[Diagnostic]:
    """What is wrong with the GPUs that a stage asks for, told where that is written."""
    if "gpu" not in given:
        return
    first, last = given["gpu"].value
    missing = next((g for g in range(first, last + 1) if g not in machine.gpus), None)
    if missing is not None:
        have = ", ".join(map(str, machine.gpus))
        message = f"there is no gpu {missing} to run on (there is {have})"
        yield Diagnostic("no-such-gpu", message, Label(given["gpu"].span))
        return
    count = last - first + 1
    if instances % count:
        message = f"x{instances} cannot be spread evenly over {count} GPUs"
        even = f"x{count * max(1, instances // count)}"
        over = Label(given["gpu"].span, f"{count} GPUs")
        span = given[COPIES].span
        yield Diagnostic("uneven-instances", message, Label(span), (over,), help=even, fix=span)


def _instances(
    chain: list[Node], settings: Mapping[str, Any], machine: Machine, device: str
) -> int:
    if device == "gpu":
        first, last = settings.get("gpu", (0, 0))
        several = last - first + 1
        return int(settings.get(COPIES, LANES_OF_EACH_GPU * several if several > 1 else GPU_LANES))
    if chain[0].op == graph.PYTHON:
        return int(settings.get(COPIES, 1))
    if all(n.op in HOST_OPS for n in chain):
        return 1  # Python alone: a second thread would only wait for the first
    copies: int = settings.get(COPIES, machine.cores)
    return min(copies, machine.cores)


def _batch(batched: list[Node], settings: Mapping[str, Any], device: str) -> tuple[int, int, int]:
    """(least, best, most) items at once."""
    if not batched:
        return (1, LIGHT_BATCH, LIGHT_BATCH)
    model = batched[0].model
    if model is None:
        most = LIGHT_BATCH if batched[0].params[graph.FUNCTION].is_batched else 1
        given = settings.get("batch") or (1, most)
        return (given[0], given[-1], given[-1])
    fixed = model.fixed_batch if model else None
    # On a CPU a batch saves nothing for a convolutional network, so one is the default.
    free = (1, GPU_BATCH) if device == "gpu" else (1, 1)
    given = settings.get("batch") or ((fixed,) * 2 if fixed else free)
    return (given[0], given[1] if len(given) == 3 else given[-1], given[-1])


def _program(flow: FlowPlan, walk: _Walk, plan: Plan) -> FlowProgram:
    given = plan.settings.flows.get(flow.name, {})
    queue, slo, priority = given.get("queue"), given.get("slo"), given.get("priority")
    inputs = [flow.input, *(p.node for p in flow.parameters)]
    return FlowProgram(
        flow.name,
        flow.input.type,
        flow.output.type,
        walk.steps(inputs, flow.output, ()),
        queue.value if queue else QUEUE,
        slo.value if slo else None,
        PRIORITIES[priority.value if priority else NORMAL],
        flow,
    )


class _Walk:
    """Graphs as steps: which stage has each chain."""

    def __init__(
        self, chain_at: Mapping[int, list[Node]], stage_of: Mapping[ChainIdentity, int]
    ) -> None:
        self._chain_at = chain_at
        self._stage_of = stage_of

    def steps(
        self, inputs: Sequence[Node], output: Node, captures: tuple[tuple[int, int], ...]
    ) -> Steps:
        slots: dict[int, int] = {id(node): slot for slot, node in enumerate(inputs)}
        units: list[Unit] = []
        for node in topological(output):
            chain = self._chain_at.get(id(node))
            if id(node) in slots or (chain is None and is_work(node)):
                continue
            slots[id(node)] = len(slots)
            sources = list(chain[0].inputs) if chain else list(node.inputs)
            for link in (chain or ())[1:]:
                sources += link.inputs[1:]
            stage = self._stage_of[chain_identity(chain)] if chain else None
            bodies = tuple(self._body(b) for b in node.bodies)
            places = tuple(slots[id(s)] for s in sources)
            units.append(Unit(stage, node, places, slots[id(node)], bodies))
        return Steps(tuple(units), len(slots), slots[id(output)], captures)

    def _body(self, body: Body) -> Steps:
        inner = [node for node, _ in body.captures]
        captures = tuple((slot, index) for slot, (_, index) in enumerate(body.captures, 1))
        return self.steps([body.item, *inner], body.output, captures)


def _remarks(stages: Sequence[StagePlan], machine: Machine) -> tuple[Diagnostic, ...]:
    """What the machine makes of settings that it cannot follow to the letter."""
    found = []
    for stage in stages:
        copies = stage.settings.get(COPIES, 0)
        for node in stage.nodes:
            if node.model is None or stage.device != "cpu":
                continue
            if node.params["precision"] != "fp32":
                precision = node.params["precision"]
                found.append(
                    Diagnostic(
                        "runs-in-fp32",
                        f"a CPU gains nothing from {precision}: `{node.model.name}` runs in fp32",
                        Label(node.param_spans["precision"]),
                        severity="hint",
                    )
                )
            if copies > stage.instances:
                found.append(
                    Diagnostic(
                        "fewer-instances",
                        f"x{copies} is more than this machine's {machine.cores} cores can run at "
                        f"once: {stage.instances} instances",
                        Label(node.span),
                        severity="hint",
                    )
                )
    return tuple(found)
