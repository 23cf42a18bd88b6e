"""Schedule blocks settled: each line's settings put at the operators and flows they are for.

Layer 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.arguments import did_you_mean, given_setting, setting_meant
from flowlang.plan.elaborate import Elaborator
from flowlang.plan.extent import calls
from flowlang.plan.graph import FlowPlan, Site
from flowlang.plan.module import Declared, Module
from flowlang.plan.ops import OPS
from flowlang.plan.schedule import COPIES, SETTINGS, Given
from flowlang.plan.values import Constant, Refused, evaluate, refuse
from flowlang.syntax import tree


class Settler:
    """Fills the table of settings; `chosen` names the schedule that counts besides the unnamed."""

    def __init__(
        self,
        module: Module,
        elaborator: Elaborator,
        chosen: str | None,
        report: Callable[[Diagnostic], None],
    ) -> None:
        self.module = module
        self.constants = module.constants
        self.elaborator = elaborator
        self.chosen = chosen
        self.report = report
        self._scheduled: dict[tuple[str | None, str, str], Span] = {}

    def error(self, slug: str, message: str, span: Span, **more: object) -> None:
        self._tell(refuse(slug, message, span, **more))

    def _tell(self, refused: Refused) -> None:
        if refused.diagnostic:
            self.report(refused.diagnostic)

    def place(self, schedule: tree.Schedule) -> None:
        """Put what a block says into the table, or complain about it."""
        is_chosen = schedule.name is None or schedule.name == self.chosen
        for entry in schedule.entries:
            declared = self.module.declared(entry.path.names)
            if declared is None:
                if not self.module.is_lost(entry.path.names):
                    known = [
                        n
                        for n in self.module.callable_names()
                        if self.module.declared(tuple(n.split("."))) is not None
                    ]
                    note = f"flows are {', '.join(known[:8])}" if known else None
                    if str(entry.path) in OPS or self.module.operator(entry.path.names):
                        note = "operators are set where they stand, or in a flow of their own"
                    self.error(
                        "unknown-target",
                        f"there is no flow named `{entry.path}` to schedule",
                        entry.path.span,
                        help=did_you_mean(str(entry.path), known),
                        note=note,
                    )
                continue
            given = self._entry_settings(entry)
            if entry.count is not None and entry.count_span is not None:
                given[COPIES] = Given(entry.count, entry.count_span)
            for setting, value in given.items():
                self._check_once((schedule.name, str(entry.path), setting), value.span)
            self._place(declared, given, is_chosen)

    def _check_once(self, key: tuple[str | None, str, str], span: Span) -> None:
        """A setting stands once for each flow in the schedules of one name."""
        first = self._scheduled.setdefault(key, span)
        if first is not span:
            shown = "the number of copies" if key[2] == COPIES else f"`{key[2]}`"
            self.error(
                "given-twice",
                f"{shown} of `{key[1]}` is given twice",
                span,
                secondary=(Label(first, "first here"),),
            )

    def _entry_settings(self, entry: tree.Entry) -> dict[str, Given]:
        given: dict[str, Given] = {}
        for arg in entry.args or ():
            try:
                name, value = self._entry_setting(entry, arg)
                if name in given:
                    raise refuse(
                        "given-twice",
                        f"`{name}` of `{entry.path}` is given twice",
                        arg.span,
                        secondary=(Label(given[name].span, "first here"),),
                    )
                given[name] = value
            except Refused as refused:
                self._tell(refused)
        return given

    def _entry_setting(self, entry: tree.Entry, arg: tree.Arg) -> tuple[str, Given]:
        constant = evaluate(arg.value, self.constants)
        if arg.name is None or arg.name not in SETTINGS:
            raise self._not_a_setting(entry, arg, constant)
        return arg.name, given_setting(arg.name, constant, arg)

    def _not_a_setting(self, entry: tree.Entry, arg: tree.Arg, constant: Constant) -> Refused:
        name = arg.name or str(constant.value)
        span = Span(
            arg.span.source, arg.span.start, arg.span.start + len(arg.name or arg.span.text)
        )
        declared = self.module.declared(entry.path.names)
        call = self._owner(declared.flow, name, arg) if declared is not None else None
        if call is None:
            help_text = setting_meant(arg, entry.path) or did_you_mean(name, SETTINGS)
            return refuse(
                "unknown-setting",
                f"there is no setting `{name}`",
                span,
                help=help_text,
                note=f"settings are {' '.join(SETTINGS)}",
            )
        op = OPS[str(call.path)]
        param = op.param(name) if arg.name else op.param_of_word(name)
        bound = self.elaborator.calls.bound_at(call)
        rival = bound.spans.get(param.name) if bound and param else None
        kept = [a.span.text for a in call.args or () if rival not in (a.span, a.value.span)]
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
        for call in calls(flow.body):
            op = OPS.get(str(call.path))
            if op and (op.param(name) if arg.name else op.param_of_word(name)):
                return call
        return None

    def _place(self, declared: Declared, given: dict[str, Given], is_chosen: bool) -> None:
        flow_level = {
            n: g for n, g in given.items() if n in SETTINGS and SETTINGS[n].level == "flow"
        }
        rest = {n: g for n, g in given.items() if n not in flow_level}
        name = declared.name
        for setting, value in flow_level.items():
            is_own = declared.module is self.module
            is_served = declared.flow.is_exported or len(declared.module.flows) == 1
            if setting in ("slo", "queue") and not (is_own and is_served):
                what = "is not exported" if is_own else "is served nowhere in this file"
                self.error(
                    "unknown-setting",
                    f"`{setting}` belongs to the entrance of a flow, and `{name}` {what}",
                    value.span,
                    help=f"export flow {declared.flow.name}" if is_own else None,
                )
        if is_chosen:
            self.elaborator.settings.flows.setdefault(declared.name, {}).update(flow_level)
        self._place_on_operator(declared, rest, is_chosen)

    def _place_on_operator(
        self, declared: Declared, given: dict[str, Given], is_chosen: bool
    ) -> None:
        if not given:
            return
        found = list(calls(declared.flow.body))
        batched = batched_calls(found, declared.module)
        for setting, value in given.items():
            level = SETTINGS[setting].level if setting in SETTINGS else "stage"
            targets = batched
            if level == "image":
                targets = [
                    c for c in found if setting in OPS.get(str(c.path), OPS["pass"]).settings
                ]
            if len(targets) != 1 and (level == "image" or setting != "gpu"):
                shown = f"x{value.value}" if setting == COPIES else setting
                count = "none" if not targets else str(len(targets))
                self.error(
                    "no-one-target",
                    f"`{shown}` needs a flow with exactly one operator that takes it, "
                    f"and `{declared.flow.name}` has {count}",
                    value.span,
                    help="name the part and schedule that: flow net = trt(...)"
                    if targets
                    else self._better_target(found, declared.module, setting, value),
                )
                continue
            for call in targets:
                if is_chosen:
                    site = Site(declared.name, call.span)
                    self.elaborator.settings.schedule(site, {setting: value})

    def _better_target(
        self, found: list[tree.Call], module: Module, setting: str, value: Given
    ) -> str | None:
        """The same setting on a flow that is mentioned and has one operator that takes it."""
        for call in found:
            inner = module.declared(call.path.names)
            if inner is None:
                continue
            if len(batched_calls(calls(inner.flow.body), inner.module)) == 1:
                shown = value.span.text
                return (
                    f"{call.path} {shown}"
                    if setting == COPIES
                    else f"{call.path}({setting}={shown})"
                )
        return None

    def check_batches(self, plans: Sequence[FlowPlan]) -> None:
        """Settings placed by a block are held against the models as inline ones were."""
        for plan in plans:
            for node in plan.all_nodes():
                if node.model is not None:
                    given = self.elaborator.settings.places.get(node.site.place, {}).get("batch")
                    self.elaborator.calls.fitter.check_batch(node.model, given)


def batched_calls(found: Iterable[tree.Call], module: Module) -> list[tree.Call]:
    """The calls of models; where there are none, those of operators in Python."""
    kinds: dict[str, list[tree.Call]] = {"model": [], "python": []}
    for call in found:
        op = OPS.get(str(call.path)) or module.operator(call.path.names)
        if op is not None and op.kind in kinds:
            kinds[op.kind].append(call)
    return kinds["model"] or kinds["python"]
