"""Schedule blocks settled: each line's settings put at the operators and flows they are for.

Layer 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.arguments import did_you_mean, given_setting
from flowlang.plan.elaborate import Elaborator
from flowlang.plan.extent import calls
from flowlang.plan.graph import FlowPlan, Site
from flowlang.plan.ops import OPS
from flowlang.plan.schedule import COPIES, SETTINGS, Given
from flowlang.plan.values import Constant, Refused, evaluate, refuse
from flowlang.syntax import tree


class Settler:
    """Fills the table of settings; `chosen` names the schedule that counts besides the unnamed."""

    def __init__(
        self,
        flows: Mapping[str, tree.Flow],
        constants: Mapping[str, Constant],
        elaborator: Elaborator,
        chosen: str | None,
        report: Callable[[Diagnostic], None],
    ) -> None:
        self.flows = flows
        self.constants = constants
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
            name = str(entry.path)
            if name not in self.flows:
                if name not in self.elaborator.lost:
                    self.error(
                        "unknown-target",
                        f"there is no flow named `{name}` to schedule",
                        entry.path.span,
                        help=did_you_mean(name, self.flows),
                        note=f"flows are {', '.join(list(self.flows)[:8])}",
                    )
                continue
            given = self._entry_settings(entry)
            if entry.count is not None and entry.count_span is not None:
                given[COPIES] = Given(entry.count, entry.count_span)
            for setting, value in given.items():
                self._check_once((schedule.name, name, setting), value.span)
            self._place(entry, name, given, is_chosen)

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
        call = self._owner(self.flows[str(entry.path)], name, arg)
        if call is None:
            return refuse(
                "unknown-setting",
                f"there is no setting `{name}`",
                span,
                help=did_you_mean(name, SETTINGS),
                note=f"settings are {' '.join(SETTINGS)}",
            )
        op = OPS[str(call.path)]
        param = op.param(name) if arg.name else op.param_of_word(name)
        bound = self.elaborator.bound_at(call)
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
        found = list(calls(self.flows[name].body))
        batched = [c for c in found if _is_model(c)]
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
                    f"and `{name}` has {count}",
                    value.span,
                    help="name the part and schedule that: flow net = trt(...)"
                    if targets
                    else self._better_target(found, setting, value),
                )
                continue
            for call in targets:
                if is_chosen:
                    site = Site(name, call.span)
                    self.elaborator.settings.sites.setdefault(site, {})[setting] = value

    def _better_target(self, found: list[tree.Call], setting: str, value: Given) -> str | None:
        """The same setting on a flow that is mentioned and has one operator that takes it."""
        for name in (str(c.path) for c in found if str(c.path) in self.flows):
            models = [c for c in calls(self.flows[name].body) if _is_model(c)]
            if len(models) == 1:
                shown = value.span.text
                return f"{name} {shown}" if setting == COPIES else f"{name}({setting}={shown})"
        return None

    def check_batches(self, plans: Sequence[FlowPlan]) -> None:
        """Settings placed by a block are held against the models as inline ones were."""
        for plan in plans:
            for node in plan.nodes():
                if node.model is not None:
                    given = self.elaborator.settings.sites.get(node.site, {}).get("batch")
                    self.elaborator.fitter.check_batch(node.model, given)


def _is_model(call: tree.Call) -> bool:
    op = OPS.get(str(call.path))
    return op is not None and op.kind == "model"
