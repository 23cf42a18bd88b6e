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
from flowlang.plan.graph import FlowPlan, Node, Site
from flowlang.plan.ops import OPS, UNBUILT
from flowlang.plan.schedule import COPIES, SETTINGS, Given, Settings, fit_setting
from flowlang.plan.types import (
    COLOURS,
    DTYPES,
    NAMED,
    UNKNOWN,
    Image,
    ListOf,
    Optional,
    Record,
    Tensor,
    Type,
    Unknown,
)
from flowlang.plan.values import Constant, Refused, evaluate, from_text, refuse
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
    """What is decided outside the file: `--set`, the environment, the schedule, the device."""

    values: Mapping[str, str]
    environment: Mapping[str, str]
    schedule: str | None = None


NO_CHOICES = Choices({}, {})


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
        self.types: dict[str, tree.TypeDef] = {}
        self.schedules: list[tree.Schedule] = []
        self.declared: dict[str, Span] = {}
        self._resolving: list[str] = []
        folder = Path(os.path.dirname(source.name))
        binder = Binder(self.constants, folder, self.diagnostics.append)
        self.elaborator = Elaborator(self.flows, lost, binder, self.resolve)
        self._declare(program)

    def error(self, slug: str, message: str, span: Span, **more: object) -> None:
        self.diagnostics.append(refuse(slug, message, span, **more).diagnostic)

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
                self.types[item.name] = item
            elif isinstance(item, tree.Flow):
                self._flow(item)
            else:
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
        self.flows[flow.name] = flow

    # Params

    def _param(self, item: tree.Param) -> None:
        try:
            value, origin = self._param_value(item)
        except Refused as refused:
            self.diagnostics.append(refused.diagnostic)
            self.constants[item.name] = Constant("str", "", item.name_span)
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
            raise refuse(
                "unknown-name",
                f"there is no param named `{default.value}` above this one",
                item.default.span,
                help=f'"{default.value}"',
                note="a string is written in double quotes",
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
                raise refuse(
                    "missing-variable",
                    f"the environment has no `{values[0].value}`, and there is no default",
                    call.span,
                    help=f'env("{values[0].value}", "")',
                )
            if text is None:
                return values[1], "file"
            span = Span(Source(f"${values[0].value}", text), 0, len(text))
            kind = self._param_kind(item) or (values[1].kind if len(values) == 2 else "str")
            return from_text(text, kind, span), "environment"
        return evaluate(call, self.constants), "file"

    def _check_choices(self) -> None:
        for name, text in self.choices.values.items():
            if name not in self.params and name not in self.declared:
                span = Span(Source("--set", f"{name}={text}"), 0, len(name))
                self.error(
                    "unknown-name",
                    f"the flow has no param named `{name}`",
                    span,
                    help=did_you_mean(name, self.params),
                )

    # Types

    def resolve(self, given: tree.TypeExpr) -> Type:
        """A written type. What is wrong in it is reported, and it counts as unknown."""
        kind = self._resolve(given)
        return Optional(kind) if given.optional and not isinstance(kind, Unknown) else kind

    def _resolve(self, given: tree.TypeExpr) -> Type:
        if given.name is None:
            return Record(tuple((f.name, self.resolve(f.type)) for f in given.fields))
        name = str(given.name)
        if name in self.types:
            return self._named_type(name, given.span)
        if name == "list" and len(given.arguments) == 1:
            inner = given.arguments[0]
            return ListOf(self.resolve(inner)) if not isinstance(inner, str) else UNKNOWN
        if name == "image":
            return self._image_type(given)
        if name == "tensor":
            return self._tensor_type(given)
        if name in NAMED and not given.arguments:
            return NAMED[name]
        self.error(
            "unknown-type",
            f"there is no type `{given.span.text}`",
            given.span,
            help=did_you_mean(name, [*NAMED, *self.types, "image", "tensor", "list"]),
        )
        return UNKNOWN

    def _named_type(self, name: str, span: Span) -> Type:
        if name in self._resolving:
            self.error("recursive-type", f"the type `{name}` would hold itself", span)
            return UNKNOWN
        self._resolving.append(name)
        kind = self.resolve(self.types[name].type)
        self._resolving.pop()
        return Record(kind.fields, name) if isinstance(kind, Record) else kind

    def _image_type(self, given: tree.TypeExpr) -> Type:
        image = Image()
        for part in given.arguments:
            word = part if isinstance(part, str) else str(part.name)
            if word in COLOURS:
                image = Image(word, image.dtype, image.height, image.width)
            elif word in ("u8", "f32"):
                image = Image(image.colour, word, image.height, image.width)
            elif isinstance(part, str) and word.count("x") == 1:
                h, w = (None if side == "?" else int(side) for side in word.split("x"))
                image = Image(image.colour, image.dtype, h, w)
            elif word not in ("hwc", "undecided"):
                self.error(
                    "unknown-type",
                    f"`{word}` says nothing about an image",
                    given.span,
                    help="image<rgb, u8, hwc>",
                )
        return image

    def _tensor_type(self, given: tree.TypeExpr) -> Type:
        words = [p if isinstance(p, str) else str(p.name) for p in given.arguments]
        if not words or words[0] not in DTYPES or len(words) > 2:
            self.error(
                "unknown-type",
                "a tensor has a dtype and a shape",
                given.span,
                help="tensor<f32, 3x224x224>",
                note=f"dtypes are {' '.join(DTYPES)}",
            )
            return UNKNOWN
        if len(words) == 1:
            return Tensor(words[0], None)
        return Tensor(words[0], tuple(None if s == "?" else int(s) for s in words[1].split("x")))

    # Flows

    def run(self) -> tuple[FlowPlan, ...]:
        self._check_choices()
        for name in self.types:
            self._named_type(name, self.types[name].span)
        mentions = {name: _mentions(flow, self.flows) for name, flow in self.flows.items()}
        if self._check_recursion(mentions):
            return ()
        mentioned = {m for found in mentions.values() for m in found}
        served = self._served()
        plans = []
        for name, flow in self.flows.items():
            if name in served or name not in mentioned or flow.signature:
                plan = self._flow_plan(flow, name in served)
                if name in served:
                    plans.append(plan)
        for schedule in self.schedules:
            self._schedule(schedule, mentions)
        names = [s.name for s in self.schedules if s.name]
        if self.choices.schedule is not None and self.choices.schedule not in names:
            span = Span(Source("--schedule", self.choices.schedule), 0, len(self.choices.schedule))
            self.error(
                "unknown-name",
                f"the flow has no schedule named `{self.choices.schedule}`",
                span,
                help=did_you_mean(self.choices.schedule, names),
            )
        self._check_batches(plans)
        return tuple(plans)

    def _served(self) -> list[str]:
        exported = [n for n, f in self.flows.items() if f.is_exported]
        if exported or len(self.flows) == 1:
            return exported or list(self.flows)
        if self.flows and not self.diagnostics:
            last = list(self.flows.values())[-1]
            self.error(
                "nothing-exported",
                "none of the flows is exported, so there is nothing to serve",
                last.name_span,
                help=f"export flow {last.name}",
            )
        elif not self.flows and not self.diagnostics and not self.elaborator.lost:
            end = len(self.source.text.rstrip())
            self.error(
                "empty-program", "there is no flow in this file", Span(self.source, end, end)
            )
        return []

    def _check_recursion(self, mentions: Mapping[str, Mapping[str, Span]]) -> bool:
        found: set[frozenset[str]] = set()
        for start in mentions:
            path, stack = [start], [iter(mentions[start].items())]
            while stack:
                name, span = next(stack[-1], (None, None))
                if name is None or span is None:
                    stack.pop()
                    path.pop()
                elif name == start:
                    if frozenset(path) not in found:
                        found.add(frozenset(path))
                        self._recursive(start, [*path, start], span)
                elif name not in path:
                    path.append(name)
                    stack.append(iter(mentions[name].items()))
        return bool(found)

    def _recursive(self, name: str, path: list[str], span: Span) -> None:
        self.error(
            "recursive-flow",
            f"`{name}` would run itself",
            span,
            label=" -> ".join(path),
            note="flows are unrolled at compile time; repeat over a list with `map`",
        )

    def _flow_plan(self, flow: tree.Flow, is_served: bool) -> FlowPlan:
        kind = self.elaborator.flow_input(flow)
        if isinstance(kind, Image) and not flow.signature and not is_served:
            kind = UNKNOWN  # a part of something: sized and coloured where it is mentioned
        item = Node(graph.INPUT, {}, (), kind, flow.name_span, Site(flow.name, flow.name_span))
        output = self.elaborator.flow(flow.name, item)
        if (
            is_served
            and isinstance(kind, Unknown)
            and output.op != "unknown"
            and flow.body.span.text != "pass"
        ):
            self.error(
                "unknown-input",
                f"what `{flow.name}` takes cannot be told from its first stage",
                flow.name_span,
                help=f"flow {flow.name}: bytes -> ...",
            )
        return FlowPlan(flow.name, item, output, flow.name_span, flow.doc, is_served)

    # Schedules

    def _schedule(
        self, schedule: tree.Schedule, mentions: Mapping[str, Mapping[str, Span]]
    ) -> None:
        is_chosen = schedule.name is None or schedule.name == self.choices.schedule
        for entry in schedule.entries:
            name = str(entry.path)
            if name not in self.flows:
                if name not in self.elaborator.lost:
                    self.error(
                        "unknown-target",
                        f"there is no flow named `{name}` to schedule",
                        entry.path.span,
                        help=did_you_mean(name, self.flows),
                    )
                continue
            given = self._entry_settings(entry)
            if entry.count is not None and entry.count_span is not None:
                given[COPIES] = Given(entry.count, entry.count_span)
            self._place(entry, name, given, is_chosen)

    def _entry_settings(self, entry: tree.Entry) -> dict[str, Given]:
        given: dict[str, Given] = {}
        for arg in entry.args or ():
            try:
                name, value = self._entry_setting(entry, arg)
                if name in given:
                    raise refuse("given-twice", f"`{name}` is given twice", arg.span)
                given[name] = value
            except Refused as refused:
                self.diagnostics.append(refused.diagnostic)
        return given

    def _entry_setting(self, entry: tree.Entry, arg: tree.Arg) -> tuple[str, Given]:
        constant = evaluate(arg.value, self.constants)
        if arg.name is None or arg.name not in SETTINGS:
            raise self._not_a_setting(entry, arg, constant)
        return arg.name, Given(fit_setting(SETTINGS[arg.name], constant), constant.span)

    def _not_a_setting(self, entry: tree.Entry, arg: tree.Arg, constant: Constant) -> Refused:
        name = arg.name or str(constant.value)
        span = Span(
            arg.span.source, arg.span.start, arg.span.start + len(arg.name or arg.span.text)
        )
        call = self._owner(self.flows[str(entry.path)], name, arg)
        if call is None:
            return refuse(
                "unknown-setting",
                f"there is no setting `{name}`",
                span,
                help=did_you_mean(name, SETTINGS),
                note=f"settings are {' '.join(SETTINGS)}",
            )
        inside = [a.span.text for a in call.args or ()]
        kept = [t for t in inside if t not in _rivals(call, name)]
        mended = f"{call.path}({', '.join([*kept, arg.span.text])})"
        what = "where the model is named" if str(call.path) == "trt" else f"where `{call.path}` is"
        return refuse(
            "not-a-setting",
            f"`{name}` changes answers, so it cannot be set in a schedule",
            span,
            help=f"put it {what}, {call.span}:   {mended}",
        )

    def _owner(self, flow: tree.Flow, name: str, arg: tree.Arg) -> tree.Call | None:
        """The call in a flow whose operator has a parameter or word of this name."""
        for call in _calls(flow.body):
            op = OPS.get(str(call.path))
            if op and (op.param(name) if arg.name else op.param_of_word(name)):
                return call
        return None

    def _place(
        self, entry: tree.Entry, name: str, given: dict[str, Given], is_chosen: bool
    ) -> None:
        flow_level = {
            n: g for n, g in given.items() if n in SETTINGS and SETTINGS[n].level == "flow"
        }
        rest = {n: g for n, g in given.items() if n not in flow_level}
        for setting, value in flow_level.items():
            is_served = self.flows[name].is_exported or len(self.flows) == 1
            if setting in ("slo", "queue") and not is_served:
                self.error(
                    "unknown-setting",
                    f"`{setting}` belongs to the entrance of a flow, and `{name}` is not exported",
                    value.span,
                    help=f"export flow {name}",
                )
        if is_chosen:
            self.elaborator.settings.flows.setdefault(name, {}).update(flow_level)
        self._place_on_operator(entry, name, rest, is_chosen)

    def _place_on_operator(
        self, entry: tree.Entry, name: str, given: dict[str, Given], is_chosen: bool
    ) -> None:
        if not given:
            return
        calls = list(_calls(self.flows[name].body))
        batched = [c for c in calls if (op := OPS.get(str(c.path))) and op.kind == "model"]
        for setting, value in given.items():
            level = SETTINGS[setting].level if setting in SETTINGS else "stage"
            targets = batched
            if level == "image":
                targets = [
                    c for c in calls if setting in OPS.get(str(c.path), OPS["pass"]).settings
                ]
            if len(targets) != 1 and (level == "image" or setting != "gpu"):
                shown = f"x{value.value}" if setting == COPIES else setting
                count = "none" if not targets else str(len(targets))
                self.error(
                    "no-one-target",
                    f"`{shown}` needs a flow with exactly one operator that takes it, "
                    f"and `{name}` has {count}",
                    value.span,
                    help="name the part and schedule that: flow net = trt(...)"
                    if targets
                    else None,
                )
                continue
            for call in targets:
                if is_chosen:
                    site = Site(name, call.span)
                    self.elaborator.settings.sites.setdefault(site, {})[setting] = value

    def _check_batches(self, plans: list[FlowPlan]) -> None:
        """Settings placed by a block are held against the models as inline ones were."""
        for plan in plans:
            for node in plan.nodes():
                if node.model is not None:
                    given = self.elaborator.settings.sites.get(node.site, {}).get("batch")
                    self.elaborator.check_batch(node.model, given)


def _rivals(call: tree.Call, word: str) -> list[str]:
    """Words already in a call that set the same parameter as `word`."""
    op = OPS.get(str(call.path))
    param = op.param_of_word(word) if op else None
    return list(param.words) if param else []


def _is_of(constant: Constant, kind: str) -> bool:
    wanted = {"path": "str", "size": "bytes"}.get(kind, kind)
    return constant.kind == wanted or (wanted == "float" and constant.kind == "int")


def _children(expr: object) -> list[object]:
    """The expressions directly inside one."""
    if isinstance(expr, tree.Body):
        return [*(let.value for let in expr.lets), expr.result]
    if isinstance(expr, tree.Pipeline):
        return list(expr.steps)
    if isinstance(expr, tree.Call):
        return [a.value for a in expr.args or ()]
    if isinstance(expr, tree.Record):
        return [
            f.value or tree.Call(tree.Path((f.name or "",), f.span), None, f.span)
            for f in expr.fields
            if f.name
        ]
    if isinstance(expr, (tree.Group, tree.Unary)):
        return [expr.value]
    if isinstance(expr, tree.Repeat):
        return [expr.stage]
    if isinstance(expr, tree.If):
        return [expr.condition, expr.then, expr.otherwise]
    if isinstance(expr, tree.Match):
        return [a.value for a in expr.arms]
    if isinstance(expr, tree.Binary):
        return [expr.left, expr.right]
    if isinstance(expr, tree.Fallback):
        return list(expr.choices)
    return []


def _calls(expr: object) -> list[tree.Call]:
    """Every call in an expression, in order of writing."""
    found: list[tree.Call] = []
    stack = [expr]
    while stack:
        part = stack.pop()
        if isinstance(part, tree.Call):
            found.append(part)
        stack.extend(reversed(_children(part)))
    return found


def _mentions(flow: tree.Flow, flows: Mapping[str, tree.Flow]) -> dict[str, Span]:
    """Flows that a flow mentions, each with the first place."""
    hidden = {let.name for let in flow.body.lets} if isinstance(flow.body, tree.Body) else set()
    found: dict[str, Span] = {}
    for call in _calls(flow.body):
        name = str(call.path)
        if name in flows and name not in hidden:
            found.setdefault(name, call.path.span)
    return found
