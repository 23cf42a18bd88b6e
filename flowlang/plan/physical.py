"""The physical plan: which operators run together, where, how many at once.

Layer 2. Runs of operators become stages. A stage is a chain of a region (image operators), at most
one model, and what follows it on the host; a chain is cut where a result is used twice, where a
named flow is mentioned more than once, and before a second model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flowlang.diagnostics import CompileError, Diagnostic, Label
from flowlang.plan import graph
from flowlang.plan.check import Plan
from flowlang.plan.graph import FlowPlan, Node, Site, consumers
from flowlang.plan.onnx import Model
from flowlang.plan.ops import OPS
from flowlang.plan.rewrite import rewrite
from flowlang.plan.schedule import COPIES
from flowlang.plan.types import Type

MAX_BYTES = 32 << 20  # of a picture file
MAX_PIXELS = 64 << 20  # of a picture: three times a 24-megapixel camera's
QUEUE = 256
LIGHT_BATCH = 64  # stages without a model share out what waits; this bounds one hand-over
GPU_LANES = 2  # each decodes a batch while its last one is in the model
GPU_BATCH = 64
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
    def model(self) -> Model | None:
        return next((n.model for n in self.nodes if n.model is not None), None)

    @property
    def region(self) -> tuple[Node, ...]:
        """The image operators and the packing, in front of the model."""
        return tuple(n for n in self.nodes if _kind(n) == "image")

    @property
    def tail(self) -> tuple[Node, ...]:
        """What runs on the host, behind the model."""
        return tuple(n for n in self.nodes if _kind(n) == "host")


@dataclass(frozen=True, slots=True)
class Unit:
    """A step of a flow's program: a stage's work, or the joining and picking of values.

    `inputs` and `output` are slots; slot 0 is the request's item.
    """

    stage: int | None
    node: Node
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True, slots=True)
class FlowProgram:
    """How a request walks through the stages."""

    name: str
    input: Type
    output: Type
    units: tuple[Unit, ...]
    slots: int
    queue: int
    slo_s: float | None
    plan: FlowPlan


@dataclass(frozen=True, slots=True)
class PhysicalPlan:
    machine: Machine
    stages: tuple[StagePlan, ...]
    programs: tuple[FlowProgram, ...]
    remarks: tuple[Diagnostic, ...]


def _kind(node: Node) -> str:
    if node.op == graph.PACK:
        return "image"
    return OPS[node.op].kind if node.op in OPS else "glue"


Identity: TypeAlias = tuple[str, Site, tuple[Type, ...], tuple[tuple[str, Any], ...]]
ChainIdentity: TypeAlias = tuple[Identity, ...]


def _identity(node: Node) -> Identity:
    """What makes two nodes one physical thing: where they are written, and what arrives.

    One flow may be mentioned behind images of different colours, and one model behind normalized
    and plain ones: these are not the same work.
    """
    packing = tuple(sorted(node.params.items())) if node.op == graph.PACK else ()
    return (node.op, node.site, tuple(i.type for i in node.inputs), packing)


def lower(plan: Plan, machine: Machine) -> PhysicalPlan:
    """A checked plan to a physical one for a machine."""
    flows = [rewrite(flow) for flow in plan.flows]
    chains = _chains(flows, plan, machine)
    stages: list[StagePlan] = []
    stage_of: dict[ChainIdentity, int] = {}
    chain_at: dict[int, list[Node]] = {}
    for chain in chains:
        key = tuple(_identity(n) for n in chain)
        if key not in stage_of:
            stage_of[key] = len(stages)
            stages.append(_stage(len(stages), chain, plan, machine))
        chain_at[id(chain[-1])] = chain
    programs = [_program(flow, chain_at, stage_of, plan) for flow in flows]
    return PhysicalPlan(machine, tuple(stages), tuple(programs), _remarks(stages, machine))


def _chains(flows: Sequence[FlowPlan], plan: Plan, machine: Machine) -> list[list[Node]]:
    """All operators of all flows, in runs that can share a stage."""
    uses: dict[Identity, int] = {}
    for flow in flows:
        for node in flow.nodes():
            identity = _identity(node)
            uses[identity] = uses.get(identity, 0) + 1
    chains: list[list[Node]] = []
    for flow in flows:
        users = consumers(flow)
        ends: dict[int, list[Node]] = {}
        for node in flow.nodes():
            if _kind(node) == "glue":
                continue
            before = ends.get(id(node.inputs[0]))
            alone = before is not None and len(users[id(before[-1])]) == 1
            if before is not None and alone and _can_follow(before, node, uses, plan, machine):
                before.append(node)
                ends[id(node)] = before
            else:
                chains.append([node])
                ends[id(node)] = chains[-1]
    return chains


def decodes_on_gpu(region: Sequence[Node]) -> bool:
    """Whether a region can run on a GPU: it starts from encoded pictures, and nobody forbade it."""
    return bool(region) and region[0].op == "decode" and region[0].params["decoder"] != "libjpeg"


def _can_follow(
    chain: list[Node],
    node: Node,
    uses: Mapping[Identity, int],
    plan: Plan,
    machine: Machine,
) -> bool:
    last = chain[-1]
    shared = (uses[_identity(last)], uses[_identity(node)])
    if shared != (1, 1) and (shared[0] != shared[1] or last.site.flow != node.site.flow):
        return False
    if node.op == graph.PACK or node.model is not None:
        # Decoding on the CPU has cores to use, a model on a GPU has lanes: a stage each.
        device = plan.settings.value(node.site, "device", machine.device)
        on_host = machine.gpus and device == "gpu" and not decodes_on_gpu(chain)
        if on_host and last.op != graph.PACK:
            return False
    return _kind(node) == "host" or _kind(last) == "image"


def _stage(index: int, chain: list[Node], plan: Plan, machine: Machine) -> StagePlan:
    settings: dict[str, Any] = {}
    for node in chain:
        settings.update({n: g.value for n, g in plan.settings.at(node.site).items()})
    models = [n for n in chain if n.model is not None]
    named = next((n.site.flow for n in models), chain[-1].site.flow)
    label = models[0].model.path.stem if models and models[0].model else chain[0].op
    name = named if named != "main" else label
    device = settings.get("device", machine.device) if models and machine.gpus else "cpu"
    instances = _instances(chain, settings, machine, device)
    return StagePlan(
        index,
        name,
        tuple(chain),
        device,
        _gpus(settings, machine, instances, models[0]) if device == "gpu" else (),
        instances,
        _batch(models, settings, device),
        settings.get("wait", 0.0),
        settings.get("timeout"),
        settings,
    )


def _gpus(
    settings: Mapping[str, Any], machine: Machine, instances: int, node: Node
) -> tuple[int, ...]:
    """The GPU of each instance: spread evenly over the range that `gpu` gives."""
    first, last = settings.get("gpu", (machine.gpus[0], machine.gpus[0]))
    wanted = list(range(first, last + 1))
    missing = [g for g in wanted if g not in machine.gpus]
    label = Label(node.span)
    if missing:
        have = ", ".join(map(str, machine.gpus))
        raise CompileError(
            [
                Diagnostic(
                    "no-such-gpu", f"there is no gpu {missing[0]} here (there is {have})", label
                )
            ]
        )
    if instances % len(wanted):
        raise CompileError(
            [
                Diagnostic(
                    "uneven-instances",
                    f"x{instances} cannot be spread evenly over {len(wanted)} GPUs",
                    label,
                    help=f"x{len(wanted) * max(1, instances // len(wanted))}",
                )
            ]
        )
    return tuple(wanted[i % len(wanted)] for i in range(instances))


def _instances(
    chain: list[Node], settings: Mapping[str, Any], machine: Machine, device: str
) -> int:
    if device == "gpu":
        first, last = settings.get("gpu", (0, 0))
        return int(settings.get(COPIES, GPU_LANES * (last - first + 1)))
    if all(n.op in HOST_OPS for n in chain):
        return 1  # Python alone: a second thread would only wait for the first
    copies: int = settings.get(COPIES, machine.cores)
    return min(copies, machine.cores)


def _batch(models: list[Node], settings: Mapping[str, Any], device: str) -> tuple[int, int, int]:
    """(least, best, most) items at once."""
    if not models:
        return (1, LIGHT_BATCH, LIGHT_BATCH)
    model = models[0].model
    fixed = model.fixed_batch if model else None
    # On a CPU a batch saves nothing for a convolutional network, so one is the default.
    free = (1, GPU_BATCH) if device == "gpu" else (1, 1)
    given = settings.get("batch") or ((fixed,) * 2 if fixed else free)
    return (given[0], given[1] if len(given) == 3 else given[-1], given[-1])


def _program(
    flow: FlowPlan,
    chain_at: Mapping[int, list[Node]],
    stage_of: Mapping[ChainIdentity, int],
    plan: Plan,
) -> FlowProgram:
    slots: dict[int, int] = {id(flow.input): 0}
    units: list[Unit] = []
    for node in flow.nodes():
        chain = chain_at.get(id(node))
        if node is flow.input or (chain is None and _kind(node) != "glue"):
            continue
        slots[id(node)] = len(slots)
        sources = chain[0].inputs if chain else node.inputs
        stage = stage_of[tuple(_identity(n) for n in chain)] if chain else None
        units.append(Unit(stage, node, tuple(slots[id(s)] for s in sources), slots[id(node)]))
    given = plan.settings.flows.get(flow.name, {})
    queue, slo = given.get("queue"), given.get("slo")
    return FlowProgram(
        flow.name,
        flow.input.type,
        flow.output.type,
        tuple(units),
        len(slots),
        queue.value if queue else QUEUE,
        slo.value if slo else None,
        flow,
    )


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
