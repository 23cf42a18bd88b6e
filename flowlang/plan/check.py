"""A program checked: declarations, types, params, flows and schedules become a Plan.

Layer 2. All diagnostics of a file are collected in one run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flowlang.diagnostics import CompileError, Diagnostic, Label, Source, Span, in_order
from flowlang.plan import graph
from flowlang.plan.arguments import Binder, did_you_mean
from flowlang.plan.elaborate import Elaborator
from flowlang.plan.extent import Extents
from flowlang.plan.graph import FlowPlan, Node, Site
from flowlang.plan.onnx import Opener
from flowlang.plan.ops import OPS, UNBUILT
from flowlang.plan.schedule import Settings
from flowlang.plan.settle import Settler
from flowlang.plan.types import UNKNOWN, Image, Unknown
from flowlang.plan.values import Constant, Refused, evaluate, from_text, refuse
from flowlang.plan.written import WrittenTypes
from flowlang.syntax import tree
from flowlang.syntax.parse import parse_leniently


@dataclass(frozen=True, slots=True)
class ParamValue:
    """A param's final value and where it came from: `file`, `environment` or `--set`."""

    name: str
    value: Constant
    origin: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked program: its served flows, the settings, the params and the hints."""

    source: Source
    flows: tuple[FlowPlan, ...]
    settings: Settings
    params: tuple[ParamValue, ...]
    hints: tuple[Diagnostic, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """What is decided outside the file: `--set`, the environment, the schedule, the key.

    `opener` gives what an encrypted model holds.
    """

    values: Mapping[str, str]
    environment: Mapping[str, str]
    schedule: str | None = None
    opener: Opener | None = None


NO_CHOICES = Choices({}, {})
MAX_DIAGNOSTICS = 1000


def compile_source(source: Source, choices: Choices = NO_CHOICES) -> Plan:
    """Source to Plan. Raises CompileError with every error found."""
    plan, diagnostics = check_source(source, choices)
    errors = [d for d in diagnostics if d.severity == "error"]
    if errors or plan is None:
        raise CompileError(errors)
    return plan


def check_source(
    source: Source, choices: Choices = NO_CHOICES
) -> tuple[Plan | None, list[Diagnostic]]:
    """The Plan of a source (None where it has errors) and every diagnostic."""
    program, diagnostics, lost = parse_leniently(source)
    checker = _Checker(source, program, lost, choices)
    flows = checker.run()
    found = in_order([*diagnostics, *checker.diagnostics])
    if any(d.severity == "error" for d in found):
        return None, found
    params = tuple(checker.params.values())
    return Plan(source, flows, checker.elaborator.settings, params, tuple(found)), found


_EXAMPLES = {"int": "1", "float": "0.5", "bool": "false", "duration": "5ms", "size": "64MiB"}


class _Enough(Exception):
    """So many errors that more of them help nobody."""


class _Checker:
    def __init__(
        self, source: Source, program: tree.Program, lost: frozenset[str], choices: Choices
    ) -> None:
        self.source = source
        self.choices = choices
        self.diagnostics: list[Diagnostic] = []
        self.params: dict[str, ParamValue] = {}
        self.constants: dict[str, Constant] = {}
        self.flows: dict[str, tree.Flow] = {}
        self.types = WrittenTypes(self.report, lost)
        self.schedules: list[tree.Schedule] = []
        self.declared: dict[str, Span] = {}
        folder = Path(os.path.dirname(source.name))
        binder = Binder(self.constants, folder, self.report)
        self.elaborator = Elaborator(self.flows, lost, binder, self.types.resolve, choices.opener)
        for name in lost:
            self.constants[name] = Constant("unknown", None, program.span)
        self._program = program

    def error(self, slug: str, message: str, span: Span, **more: object) -> None:
        self._tell(refuse(slug, message, span, **more))

    def _tell(self, refused: Refused) -> None:
        if refused.diagnostic:
            self.report(refused.diagnostic)

    def report(self, diagnostic: Diagnostic) -> None:
        self.diagnostics.append(diagnostic)
        if len(self.diagnostics) >= MAX_DIAGNOSTICS:
            raise _Enough

    # Declarations

    def _declare(self, program: tree.Program) -> None:
        if program.pipeline is not None:
            span = program.pipeline.span
            self.flows["main"] = tree.Flow(
                "main", (), None, program.pipeline, True, span, None, span
            )
        for item in program.items:
            if isinstance(item, tree.Schedule):
                self.schedules.append(item)
                continue
            if not self._is_new(item.name, item.name_span):
                continue
            if isinstance(item, tree.Param):
                self._param(item)
            elif isinstance(item, tree.TypeDef):
                self.types.declare(item)
            elif isinstance(item, tree.Flow):
                self._flow(item)
            else:
                self.elaborator.lost |= {item.name}
                self.error(
                    "not-built",
                    "`use` is part of the language, and this version cannot run it yet",
                    item.span,
                )

    def _is_new(self, name: str, span: Span) -> bool:
        if name in self.declared:
            self.error(
                "duplicate-name",
                f"`{name}` is declared twice",
                span,
                secondary=(Label(self.declared[name], "first here"),),
            )
            return False
        self.declared[name] = span
        return True

    def _flow(self, flow: tree.Flow) -> None:
        if flow.name in OPS or flow.name in UNBUILT:
            self.error(
                "operator-name",
                f"`{flow.name}` is an operator, so a flow cannot have its name",
                flow.name_span,
                help=f"my_{flow.name}",
                fix=flow.name_span,
            )
            return
        if flow.inputs:
            self.error(
                "not-built",
                "request parameters are part of the language, and this version cannot run them yet",
                flow.inputs[0].span,
            )
            for name in (i.name for i in flow.inputs):
                self.elaborator.lost |= {name}
                self.constants.setdefault(name, Constant("unknown", None, flow.span))
        self.flows[flow.name] = flow

    # Params

    def _param(self, item: tree.Param) -> None:
        try:
            value, origin = self._param_value(item)
        except Refused as refused:
            self._tell(refused)
            self.constants[item.name] = Constant("unknown", None, item.name_span)
            return
        self.constants[item.name] = value
        self.params[item.name] = ParamValue(item.name, value, origin)

    def _param_value(self, item: tree.Param) -> tuple[Constant, str]:
        declared = self._param_kind(item)
        default, origin = self._default(item)
        kind = declared or default.kind
        if declared and not _is_of(default, declared):
            raise refuse(
                "wrong-kind",
                f"`{item.name}` is declared as {declared}, and its default is {default.noun}",
                item.default.span,
            )
        if default.kind == "word":
            is_below = any(
                isinstance(i, tree.Param) and i.name == default.value for i in self._program.items
            )
            raise refuse(
                "unknown-name",
                f"there is no param named `{default.value}` above this one",
                item.default.span,
                help=None if is_below else f'"{default.value}"',
                note="params are read in order"
                if is_below
                else "a string is written in double quotes",
                fix=None if is_below else item.default.span,
            )
        if item.name in self.choices.values:
            text = self.choices.values[item.name]
            span = Span(Source(f"--set {item.name}", text), 0, len(text))
            return from_text(text, kind, span), "--set"
        return default, origin

    def _param_kind(self, item: tree.Param) -> str | None:
        if item.type is None:
            return None
        name = str(item.type.name)
        if name in ("int", "float", "str", "bool", "path", "duration", "size"):
            return name
        raise refuse(
            "wrong-kind",
            f"a param cannot be of type `{item.type.span.text}`",
            item.type.span,
            note="params are int, float, str, bool, path, duration or size",
        )

    def _default(self, item: tree.Param) -> tuple[Constant, str]:
        call = item.default
        if isinstance(call, tree.Call) and str(call.path) == "env" and call.args is not None:
            values = [evaluate(a.value, self.constants) for a in call.args]
            if not 1 <= len(values) <= 2 or values[0].kind != "str":
                raise refuse(
                    "wrong-kind",
                    "`env` takes the name of a variable and a default",
                    call.span,
                    help='env("MODELS", "models")',
                )
            text = self.choices.environment.get(values[0].value)
            if text is None and len(values) == 1:
                example = _EXAMPLES.get(self._param_kind(item) or "str", '""')
                raise refuse(
                    "missing-variable",
                    f"the environment has no `{values[0].value}`, and there is no default",
                    call.span,
                    help=f'env("{values[0].value}", {example})',
                    fix=call.span,
                )
            if text is None:
                return values[1], "file"
            span = Span(Source(f"${values[0].value}", text), 0, len(text))
            kind = self._param_kind(item) or (values[1].kind if len(values) == 2 else "str")
            return from_text(text, kind, span), "environment"
        return evaluate(call, self.constants), "file"

    def _check_choices(self) -> None:
        for name, text in self.choices.values.items():
            if name not in self.constants:
                span = Span(Source("--set", f"{name}={text}"), 0, len(name))
                self.error(
                    "unknown-name",
                    f"the flow has no param named `{name}`",
                    span,
                    help=did_you_mean(name, self.params),
                )

    # Flows

    def run(self) -> tuple[FlowPlan, ...]:
        """The plans of the served flows; of a program with errors, not all of them."""
        try:
            self._declare(self._program)
            return self._plans()
        except _Enough:
            return ()

    def _plans(self) -> tuple[FlowPlan, ...]:
        self._check_choices()
        self.types.resolve_all()
        extents = Extents(self.flows, self.report)
        if not extents.end():
            return ()
        served = self._served()
        roots = [
            name
            for name, flow in self.flows.items()
            if name in served or name not in extents.mentioned or flow.signature
        ]
        if not extents.can_unroll(roots):
            return ()
        plans = []
        for name in roots:
            plan = self._flow_plan(self.flows[name], name in served)
            if name in served:
                plans.append(plan)
        settler = Settler(
            self.flows, self.constants, self.elaborator, self.choices.schedule, self.report
        )
        for schedule in sorted(self.schedules, key=lambda s: s.name is not None):
            settler.place(schedule)
        names = [s.name for s in self.schedules if s.name]
        if self.choices.schedule is not None and self.choices.schedule not in names:
            span = Span(Source("--schedule", self.choices.schedule), 0, len(self.choices.schedule))
            self.error(
                "unknown-name",
                f"the flow has no schedule named `{self.choices.schedule}`",
                span,
                help=did_you_mean(self.choices.schedule, names),
            )
        settler.check_batches(plans)
        return tuple(plans)

    def _served(self) -> list[str]:
        exported = [n for n, f in self.flows.items() if f.is_exported]
        if exported or (len(self.flows) == 1 and not self.elaborator.lost):
            return exported or list(self.flows)
        if self.diagnostics or self.elaborator.lost:
            return []
        if self.flows:
            last = list(self.flows.values())[-1]
            start = Span(last.span.source, last.span.start, last.name_span.end)
            self.error(
                "nothing-exported",
                "none of the flows is exported, so there is nothing to serve",
                last.name_span,
                help=f"export flow {last.name}",
                fix=start,
            )
        else:
            end = len(self.source.text.rstrip())
            self.error(
                "empty-program", "there is no flow in this file", Span(self.source, end, end)
            )
        return []

    def _flow_plan(self, flow: tree.Flow, is_served: bool) -> FlowPlan:
        before = len(self.diagnostics)
        kind = self.elaborator.flow_input(flow)
        if isinstance(kind, Image) and not flow.signature and not is_served:
            kind = UNKNOWN  # a part of something: sized and coloured where it is mentioned
        item = Node(graph.INPUT, {}, (), kind, flow.name_span, Site(flow.name, flow.name_span))
        output = self.elaborator.flow(flow.name, item)
        if is_served and isinstance(kind, Unknown) and len(self.diagnostics) == before:
            self._check_input(flow, output)
        return FlowPlan(flow.name, item, output, flow.name_span, flow.doc, is_served)

    def _check_input(self, flow: tree.Flow, output: Node) -> None:
        """A served flow says what it takes, or its first stage does; `pass` takes anything."""
        stages = [n for n in graph.topological(output) if n.op != graph.INPUT]
        if any(n.op == "unknown" for n in stages) or all(n.op == "pass" for n in stages):
            return
        first = stages[0]
        takes = f"{{ {first.params['name']}: bytes }}" if first.op == graph.FIELD else "bytes"
        gives = str(output.type)
        self.error(
            "unknown-input",
            f"what `{flow.name}` takes cannot be told from its first stage",
            flow.name_span,
            help=f"flow {flow.name}: {takes} -> {'...' if 'unknown' in gives else gives}",
        )


def _is_of(constant: Constant, kind: str) -> bool:
    wanted = {"path": "str", "size": "bytes"}.get(kind, kind)
    return constant.kind == wanted or (wanted == "float" and constant.kind == "int")
