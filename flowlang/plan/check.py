"""A program checked: declarations, types, params, flows and schedules become a Plan.

Layer 2. All diagnostics of a program are collected in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowlang.diagnostics import CompileError, Diagnostic, Label, Source, Span, in_order
from flowlang.plan import graph
from flowlang.plan.arguments import did_you_mean
from flowlang.plan.declare import NOTHING_OPEN, Choices, Declarations, Read
from flowlang.plan.elaborate import Elaborator
from flowlang.plan.extent import Extents
from flowlang.plan.graph import FlowPlan, Node, Parameter
from flowlang.plan.module import Declared, Module, ParamValue
from flowlang.plan.schedule import Settings
from flowlang.plan.scope import Scope
from flowlang.plan.settle import Settler
from flowlang.plan.types import (
    BYTES,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    Image,
    ListOf,
    Record,
    Type,
    Unknown,
    is_undecided,
    taken,
)
from flowlang.plan.values import refuse
from flowlang.syntax import tree
from flowlang.syntax.parse import parse_leniently
from flowlang.syntax.wording import one_line


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked program: its served flows, the settings, the params and the hints.

    `files` are all that it was made from: flow files, Python files and models. `unserved` says why
    a file of parts serves no flow: it can be checked, and not be run.
    """

    source: Source
    flows: tuple[FlowPlan, ...]
    settings: Settings
    params: tuple[ParamValue, ...]
    hints: tuple[Diagnostic, ...]
    files: tuple[str, ...] = ()
    unserved: tuple[Diagnostic, ...] = ()


@dataclass(frozen=True, slots=True)
class Inspection:
    """A program as far as it could be checked, right or wrong.

    `seen` has the places of expressions with the types they give, in order of elaboration.
    """

    plan: Plan | None
    diagnostics: list[Diagnostic]
    seen: list[tuple[Span, Type]]
    module: Module | None


def _has_defaults(declared: Declared) -> bool:
    return all(given.default is not None for given in declared.flow.inputs)


NO_CHOICES = Choices({}, {})
OF_PARTS = "checked as a file of parts, which others use: by itself it serves nothing"
MAX_DIAGNOSTICS = 300


def compile_source(source: Source, choices: Choices = NO_CHOICES) -> Plan:
    """Source to the Plan of what it serves. Raises CompileError with every error found."""
    plan, diagnostics = check_source(source, choices)
    errors = [d for d in diagnostics if d.severity == "error"]
    if errors or plan is None:
        raise CompileError(errors)
    if plan.unserved:
        raise CompileError(list(plan.unserved))
    return plan


def check_source(
    source: Source, choices: Choices = NO_CHOICES
) -> tuple[Plan | None, list[Diagnostic]]:
    """The Plan of a source (None where it has errors) and every diagnostic."""
    found = inspect_source(source, choices)
    return found.plan, found.diagnostics


def inspect_source(
    source: Source,
    choices: Choices = NO_CHOICES,
    read: Read = parse_leniently,
    texts: Mapping[str, str] = NOTHING_OPEN,
) -> Inspection:
    """All that checking a source finds out.

    `read` gives the tree of one that was read before, `texts` has those of open files.
    """
    checker = _Checker(source, choices, read, texts)
    flows = checker.run()
    found = in_order(checker.diagnostics)
    seen = checker.elaborator.seen if checker.elaborator is not None else []
    module = checker.module
    if checker.is_cut:
        last = found[-1]
        more = f"checking stopped at {MAX_DIAGNOSTICS} messages; there may be more"
        found[-1] = replace(last, note=f"{last.note}; {more}" if last.note else more)
    if any(d.severity == "error" for d in found) or checker.elaborator is None:
        return Inspection(None, found, seen, module)
    params = tuple(p for m in checker.declarations.modules for p in m.params.values())
    files = [*checker.declarations.files, *checker.elaborator.calls.fitter.files]
    for flow in flows:
        files += _named_files(flow)
    plan = Plan(
        source,
        flows,
        checker.elaborator.settings,
        params,
        tuple(found),
        tuple(dict.fromkeys(files)),
        tuple(checker.unserved),
    )
    return Inspection(plan, found, seen, module)


def _named_files(flow: FlowPlan) -> Iterator[str]:
    """The files that operators are given by name: lists of words or characters, and models."""
    for node in flow.all_nodes():
        yield from (str(given) for given in node.params.values() if isinstance(given, Path))


class _Enough(Exception):
    """So many errors that more of them help nobody."""


class _Checker:
    def __init__(
        self, source: Source, choices: Choices, read: Read, texts: Mapping[str, str]
    ) -> None:
        self.source = source
        self.choices = choices
        self.diagnostics: list[Diagnostic] = []
        self.unserved: list[Diagnostic] = []
        self.is_cut = False
        self.declarations = Declarations(choices, self.report, read, texts)
        self.module: Module | None = None
        self.elaborator: Elaborator | None = None

    def error(self, slug: str, message: str, span: Span, **more: object) -> None:
        refused = refuse(slug, message, span, **more)
        if refused.diagnostic:
            self.report(refused.diagnostic)

    def report(self, diagnostic: Diagnostic) -> None:
        self.diagnostics.append(diagnostic)
        if len(self.diagnostics) >= MAX_DIAGNOSTICS:
            self.is_cut = True
            raise _Enough

    def run(self) -> tuple[FlowPlan, ...]:
        """The plans of the served flows; of a program with errors, not all of them."""
        try:
            self.module = self.declarations.read(self.source)
            flows = self.declarations.flows()
            self.elaborator = Elaborator(flows, self.report, self.choices.opener)
            return self._plans(self.module, flows, self.elaborator)
        except _Enough:
            return ()

    def _plans(
        self, module: Module, flows: dict[str, Declared], elaborator: Elaborator
    ) -> tuple[FlowPlan, ...]:
        self._check_choices()
        for each in self.declarations.modules:
            each.types.resolve_all()
        extents = Extents(flows, self.report)
        if not extents.end():
            return ()
        served = self._served(module)
        roots = [
            name
            for name, declared in flows.items()
            if declared.module is module
            and (name in served or name not in extents.mentioned or declared.flow.signature)
            and (name in served or name not in extents.mentioned or _has_defaults(declared))
        ]
        if not extents.can_unroll(roots):
            return ()
        if reasons := self._why_unserved(module, served):
            served = []
            self._tell_unserved(module, reasons)
        plans = []
        for name in roots:
            before = len(self.diagnostics)
            plan = self._flow_plan(flows[name], elaborator, name in served)
            if name not in served:
                continue
            told = self.diagnostics[before:]
            if reasons := self._never_brought(flows[name], told):
                self.diagnostics[before:] = [d for d in told if d not in reasons]
                self._tell_unserved(module, reasons)
            else:
                plans.append(plan)
        self._settle(elaborator, plans)
        self._check_schedule(module)
        return tuple(plans)

    def _settle(self, elaborator: Elaborator, plans: list[FlowPlan]) -> None:
        """Place what the blocks of all files say, those of used files first, and the named last."""
        settlers = [
            (module, Settler(module, elaborator, self.choices.schedule, self.report))
            for module in self.declarations.modules
        ]
        for is_named in (False, True):
            for module, settler in settlers:
                for schedule in module.schedules:
                    if (schedule.name is not None) is is_named:
                        settler.place(schedule)
        settlers[-1][1].check_batches(plans)  # which are of all files

    def _check_choices(self) -> None:
        known = [
            module.prefix + name
            for module in self.declarations.modules
            for name in module.constants
            if "." not in name
        ]
        for name, text in self.choices.values.items():
            if name not in known:
                span = Span(Source("--set", f"{name}={text}"), 0, len(name))
                self.error(
                    "unknown-name",
                    f"the flow has no param named `{name}`",
                    span,
                    help=self._param_elsewhere(name) or did_you_mean(name, [n for n in known if n]),
                    note=f"params are {', '.join(known)}" if known else "it has none",
                )

    def _param_elsewhere(self, name: str) -> str | None:
        """The name of a param that has been given by another name of its file."""
        *path, last = name.split(".")
        module = self.module
        for alias in path:
            used = module.uses.get(alias) if module is not None else None
            module = used if isinstance(used, Module) else None
        return module.prefix + last if module is not None and last in module.params else None

    def _check_schedule(self, module: Module) -> None:
        chosen = self.choices.schedule
        names = [s.name for m in self.declarations.modules for s in m.schedules if s.name]
        if chosen is not None and chosen not in names:
            self.error(
                "unknown-name",
                f"the flow has no schedule named `{chosen}`",
                Span(Source("--schedule", chosen), 0, len(chosen)),
                help=did_you_mean(chosen, names),
                note=f"schedules are {', '.join(dict.fromkeys(names))}" if names else "it has none",
            )

    def _served(self, module: Module) -> list[str]:
        flows = module.flows
        exported = [n for n, f in flows.items() if f.is_exported]
        if exported or (len(flows) == 1 and not module.lost):
            return exported or list(flows)
        return []

    def _why_unserved(self, module: Module, served: list[str]) -> list[Diagnostic]:
        """Why a file that could be read has nothing to serve, but at most parts for others."""
        if served or module.lost or any(d.severity == "error" for d in self.diagnostics):
            return []
        if not module.flows:
            end = len(self.source.text.rstrip())
            place = Label(Span(self.source, end, end))
            return [Diagnostic("empty-program", "there is no flow in this file", place)]
        last = list(module.flows.values())[-1]
        declared = Declared(last, module)
        is_servable = not any(d.severity == "error" for d in self._trial(declared, is_served=True))
        message = "none of the flows is exported, so there is nothing to serve"
        start = Span(last.span.source, last.span.start, last.name_span.end)
        return [
            Diagnostic(
                "nothing-exported",
                message,
                Label(last.name_span),
                help=f"export flow {last.name}" if is_servable else None,
                fix=start if is_servable else None,
            )
        ]

    def _never_brought(self, declared: Declared, told: Sequence[Diagnostic]) -> list[Diagnostic]:
        """What no request can bring the only flow of a file, and another flow could give it.

        `told` is what was said of it as one that is served.
        """
        asked = [d for d in told if d.slug == "not-a-constant"]
        if not asked or declared.flow.is_exported or not declared.flow.inputs:
            return []
        of_part = self._trial(declared, is_served=False)
        return asked if all(d.slug != "not-a-constant" for d in of_part) else []

    def _trial(self, declared: Declared, is_served: bool) -> list[Diagnostic]:
        """What would be said of a flow."""
        before = len(self.diagnostics)
        elaborator = Elaborator(self.declarations.flows(), self.report, self.choices.opener)
        try:
            self._flow_plan(declared, elaborator, is_served)
        except _Enough:
            self.is_cut = False
        told = self.diagnostics[before:]
        del self.diagnostics[before:]
        return told

    def _tell_unserved(self, module: Module, reasons: list[Diagnostic]) -> None:
        """A hint, for a file of parts is right as such; nothing at all is an error."""
        is_used = module.flows or module.params or module.types.names() or module.uses
        if not is_used:
            self.report(reasons[0])
            return
        self.unserved = reasons
        for reason in reasons:
            self.report(replace(reason, severity="hint", note=OF_PARTS))

    def _flow_plan(self, declared: Declared, elaborator: Elaborator, is_served: bool) -> FlowPlan:
        flow = declared.flow
        before = len(self.diagnostics)
        scope = Scope(declared, constants=declared.module.constants)
        kind = elaborator.flow_input(declared)
        kind = taken(kind) if is_served else kind
        if isinstance(kind, Image) and not flow.signature and not is_served:
            kind = UNKNOWN  # a part of something: sized and coloured where it is mentioned
        item = Node(graph.INPUT, {}, (), kind, flow.name_span, scope.site(flow.name_span))
        parameters = []
        if is_served:
            parameters = self._parameters(declared, elaborator, scope, item)
        else:
            elaborator.calls.set_defaults(declared, item, scope)
        output = elaborator.flow(declared, item, scope)
        is_open = isinstance(kind, Unknown) and not flow.signature  # a lost one was told
        if is_served and is_open and len(self.diagnostics) == before:
            self._check_input(declared, item, output)
        if is_served and is_undecided(output.type) and len(self.diagnostics) == before:
            self._tell_undecided(flow.name, output)
        return FlowPlan(
            flow.name, item, output, flow.name_span, flow.doc, is_served, tuple(parameters)
        )

    def _tell_undecided(self, name: str, output: Node) -> None:
        text = one_line(output.span)
        self.report(
            Diagnostic(
                "undecided-colour",
                f"`{name}` gives channels in an order nobody decided",
                Label(output.span),
                help=f"{text} -> rgb" if isinstance(output.type, Image) else None,
                severity="hint",
            )
        )

    def _parameters(
        self, declared: Declared, elaborator: Elaborator, scope: Scope, item: Node
    ) -> list[Parameter]:
        """The values that each request brings for the parameters of a flow."""
        found = []
        for given in declared.flow.inputs:
            kind = taken(declared.module.types.resolve(given.type))
            name = {"called": f"`{given.name}`"}
            node = Node(graph.INPUT, name, (), kind, given.span, scope.site(given.span))
            default = elaborator.calls.default(declared, given, item)
            scope.put(given.name, node)
            found.append(Parameter(node, given.name, kind, default))
        return found

    def _check_input(self, declared: Declared, item: Node, output: Node) -> None:
        """A served flow says what it takes, or its first stage does; `pass` takes anything."""
        flow = declared.flow
        stages = [n for n in graph.topological(output) if n.op != graph.INPUT]
        whole = output
        while whole.op == "pass":
            whole = whole.inputs[0]
        if whole is item or any(n.op == "unknown" for n in stages):
            return
        first = stages[0] if stages else output
        if first.op == graph.PYTHON:
            return  # which may take anything
        name = first.params["name"] if first.op == graph.FIELD else None
        signature = self._signature(declared, name)
        self.error(
            "unknown-input",
            f"what `{flow.name}` takes cannot be told from its first stage",
            flow.name_span,
            help=f"flow {_head(flow)}: {signature}" if signature else None,
            note=None if signature else "`flow name: bytes -> label = ...` says so",
        )

    def _signature(self, declared: Declared, field: str | None) -> str | None:
        """Types that a flow could declare, if it suits plain values, or lists of them.

        `field` is what it takes of its item first.
        """
        for plain in (BYTES, INT, FLOAT, STR):
            for kind in (plain, ListOf(plain)):
                taken = kind if field is None else Record(((field, kind),))
                problems: list[Diagnostic] = []
                elaborator = Elaborator(
                    self.declarations.flows(), problems.append, self.choices.opener
                )
                scope = Scope(declared, constants=declared.module.constants)
                span = declared.flow.name_span
                item = Node(graph.INPUT, {}, (), taken, span, scope.site(span))
                self._parameters(declared, elaborator, scope, item)
                given = elaborator.flow(declared, item, scope).type
                if not problems and "unknown" not in str(given):
                    return f"{taken} -> {given}"
        return None


def _head(flow: tree.Flow) -> str:
    """A flow's name and parameters as they are written."""
    inputs = ", ".join(given.span.text for given in flow.inputs)
    return f"{flow.name}({inputs})" if inputs else flow.name
