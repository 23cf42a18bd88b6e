"""Settings: what can change speed, memory or place, and never an answer.

Layer 2. Inline settings, `schedule` blocks and the command line end in one table, keyed by the site
of an operator or the name of a flow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowlang.diagnostics import Span
from flowlang.plan.graph import Site
from flowlang.plan.values import Constant, refuse


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the closed list of settings.

    `level` is where it can be given: `stage` (a batched operator), `image`, or `flow`.
    """

    name: str
    kind: str
    level: str
    doc: str
    example: str
    words: tuple[str, ...] = ()


TABLE: tuple[Setting, ...] = (
    Setting("batch", "range", "stage", "items an instance takes at once, least to most", "1..8"),
    Setting(
        "wait", "duration", "stage", "longest an item waits for others to join its batch", "2ms"
    ),
    Setting("timeout", "duration", "stage", "longest the stage may take for an item", "50ms"),
    Setting("gpu", "gpus", "stage", "the GPU or GPUs to run on", "0..1"),
    Setting("graphs", "bool", "stage", "replay batches as CUDA graphs", "false"),
    Setting("workspace", "bytes", "stage", "memory TensorRT may use to build", "2GiB"),
    Setting("max_bytes", "bytes", "image", "largest picture file that is decoded", "32MiB"),
    Setting("max_pixels", "int", "image", "largest picture that is decoded", "67108864"),
    Setting("device", "word", "flow", "where its stages run", "cpu", ("cpu", "gpu")),
    Setting(
        "priority",
        "word",
        "flow",
        "whose requests a stage takes first",
        "low",
        ("low", "normal", "high"),
    ),
    Setting("slo", "duration", "flow", "deadline of each request", "50ms"),
    Setting(
        "queue", "int", "flow", "requests that may wait, besides those that are worked on", "256"
    ),
)
SETTINGS: Mapping[str, Setting] = {s.name: s for s in TABLE}
OF_REQUESTS = frozenset({"priority", "slo", "queue"})  # and not of the stages they go through
NORMAL = "normal"
PRIORITIES = {"high": 1, NORMAL: 2, "low": 3}  # the lowest number first, as in a request
_ABOVE_ZERO = frozenset({"timeout", "slo"})  # of 0 they would let nothing through
COPIES = "x"  # `x4`: not a word of the language, so it cannot collide with a setting


@dataclass(frozen=True, slots=True)
class Given:
    """A setting's value and where it was written."""

    value: Any
    span: Span


@dataclass(slots=True)
class Settings:
    """The table. A block's line overrules an inline setting; a named schedule overrules both.

    Inline settings may differ by the arguments of their flow, those of a block do not.
    """

    inline: dict[Site, dict[str, Given]] = field(default_factory=dict)
    places: dict[tuple[str, Span], dict[str, Given]] = field(default_factory=dict)
    flows: dict[str, dict[str, Given]] = field(default_factory=dict)

    def put(self, site: Site, given: Mapping[str, Given]) -> None:
        """Set something for an operator where it is written."""
        self.inline.setdefault(site, {}).update(given)

    def schedule(self, site: Site, given: Mapping[str, Given]) -> None:
        """Set something in a block, for the operator that is written there."""
        self.places.setdefault(site.place, {}).update(given)

    def at(self, site: Site) -> Mapping[str, Given]:
        """What is set for one operator, its flow's settings under its own."""
        return {
            **self.flows.get(site.flow, {}),
            **self.inline.get(site, {}),
            **self.places.get(site.place, {}),
        }

    def value(self, site: Site, name: str, default: Any = None) -> Any:
        given = self.at(site).get(name)
        return default if given is None else given.value


def fit_setting(setting: Setting, given: Constant) -> Any:
    """The value of a setting from a constant. Raises Refused where it does not fit."""
    kind = setting.kind
    if kind == "duration":
        return _amount(setting, given, "duration", "ms")
    if kind == "bytes":
        return _amount(setting, given, "bytes", "MiB")
    if kind == "range":
        return _batch(setting, given)
    if kind == "gpus":
        if given.kind == "int" and given.value >= 0:
            return (given.value, given.value)
        if given.kind == "range" and len(given.value) == 2 and isinstance(given.value[0], int):
            return given.value
    if kind == "int" and given.kind == "int" and given.value > 0:
        return given.value
    if kind == "bool" and given.kind == "bool":
        return given.value
    if kind == "word" and given.kind == "word" and given.value in setting.words:
        return given.value
    raise refuse(
        "wrong-kind",
        f"`{setting.name}` does not take `{given.span.text}`",
        given.span,
        help=f"{setting.name}={setting.example}",
        note=f"{setting.name}: {setting.doc}"
        + (f" ({', '.join(setting.words)})" if setting.words else ""),
    )


def _amount(setting: Setting, given: Constant, kind: str, unit: str) -> Any:
    """Seconds or bytes. Raises Refused, with a unit where only that is missing."""
    noun = {"bytes": "an amount of memory", "duration": "a duration"}[kind]
    text = given.span.text
    if given.kind == kind and given.value == 0 and setting.name in _ABOVE_ZERO:
        raise refuse(
            "out-of-range",
            f"`{setting.name}` is more than 0",
            given.span,
            help=f"{setting.name}={setting.example}",
        )
    if given.kind == kind and given.value >= 0:
        return given.value
    if given.kind in ("int", "float") and given.value >= 0:
        is_number = text[0].isdigit() and text[-1].isdigit()
        raise refuse(
            "missing-unit",
            f"`{setting.name}` is {noun}, and `{text}` has no unit",
            given.span,
            help=f"{setting.name}={text}{unit}" if is_number else None,
            note=None if is_number else f"a param has its unit where it is declared: 2{unit}",
        )
    what = "negative" if given.kind in (kind, "int", "float") else given.noun
    raise refuse(
        "wrong-kind",
        f"`{setting.name}` is {noun}, and `{text}` is {what}",
        given.span,
        help=f"{setting.name}={setting.example}",
    )


def _batch(setting: Setting, given: Constant) -> tuple[int, ...]:
    """(least, most) or (least, best, most)."""
    values = (given.value,) * 2 if given.kind == "int" else given.value
    if given.kind not in ("int", "range") or not all(isinstance(v, int) for v in values):
        raise refuse(
            "wrong-kind",
            f"`{setting.name}` is a whole number or a range of them",
            given.span,
            help=f"{setting.name}={_range_meant(given) or setting.example}",
        )
    if values[0] < 1:
        least = "..".join(str(max(1, v)) for v in values[: 1 if given.kind == "int" else 3])
        raise refuse(
            "bad-range",
            "a batch has at least one item",
            given.span,
            help=f"{setting.name}={_range_meant(given) or least}",
        )
    return tuple(values)


def _range_meant(given: Constant) -> str | None:
    """`1-4`, `[1, 4]` and `"1..4"` as ranges are written."""
    ends = re.fullmatch(
        r"([1-9][0-9]*)\s*(?:-|,|\.\.)\s*([1-9][0-9]*)", given.span.text.strip('"[]')
    )
    return f"{ends[1]}..{ends[2]}" if ends and int(ends[1]) <= int(ends[2]) else None
