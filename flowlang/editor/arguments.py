"""What can stand between the parentheses of a call, or of a line of a schedule.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flowlang.doc import parameter_text, setting_text
from flowlang.editor.offers import FIRST, USUAL, Completion, Place, local_values, operands, params
from flowlang.plan.ops import Op, Param
from flowlang.plan.schedule import SETTINGS, Setting
from flowlang.syntax.format import format_type


def arguments(place: Place) -> Iterator[Completion]:
    frame = place.cursor.frame
    op, flow = place.document.operator(frame.callee), place.flow(frame.callee)
    if op is not None:
        yield from _parameters(place, op)
        if any(p.is_body or p.kind == "value" for p in op.params if not p.is_named):
            yield from (replace(c, rank=max(c.rank, USUAL)) for c in operands(place))
    elif flow is not None:
        for given in flow.inputs:
            if given.name not in frame.given:
                detail = format_type(given.type)
                yield Completion(f"{given.name}=", "parameter", detail, rank=FIRST)
    yield from local_values(place)
    yield from params(place)


def _parameters(place: Place, op: Op) -> Iterator[Completion]:
    given = place.cursor.frame.given
    for param in op.params:
        if param.name in given:
            continue
        if param.kind == "flag":
            yield Completion(param.name, "word", "flag", param.doc, rank=FIRST)
            continue
        if not param.is_named:
            yield from _words(param)
        if param.is_named or not param.words:
            doc = parameter_text(param)
            yield Completion(f"{param.name}=", "parameter", param.kind, doc, rank=FIRST)
    for name in op.settings:
        if name not in given:
            yield _setting(SETTINGS[name])


def _words(param: Param) -> Iterator[Completion]:
    for word in param.words:
        detail = f"{param.name}, the default" if word == param.default else param.name
        yield Completion(word, "word", detail, param.doc, rank=FIRST)


def _setting(setting: Setting) -> Completion:
    return Completion(
        f"{setting.name}=", "setting", f"setting, as {setting.example}", setting_text(setting)
    )


def values(place: Place) -> Iterator[Completion]:
    """Behind `name=` in a call."""
    frame = place.cursor.frame
    op = place.document.operator(frame.callee)
    param = op.param(frame.argument) if op else None
    if op and frame.argument in op.settings:
        yield from setting_values(place)
    elif param is not None and param.words:
        yield from _words(param)
    elif param is not None and param.kind == "flag":
        yield from truth()
    elif param is not None and (param.is_body or param.kind == "value"):
        yield from operands(place)
    yield from local_values(place)
    yield from params(place)


def truth() -> Iterator[Completion]:
    for word in ("true", "false"):
        yield Completion(word, "keyword", rank=FIRST)


def settings(place: Place) -> Iterator[Completion]:
    given = place.cursor.frame.given
    for setting in SETTINGS.values():
        if setting.level != "image" and setting.name not in given:
            yield _setting(setting)


def setting_values(place: Place) -> Iterator[Completion]:
    setting = SETTINGS.get(place.cursor.frame.argument)
    if setting is None:
        return
    for word in setting.words:
        yield Completion(word, "word", setting.name, setting.doc, rank=FIRST)
    if setting.kind == "bool":
        yield from truth()
    elif not setting.words:
        yield Completion(setting.example, "value", setting.name, setting.doc, rank=FIRST)
    yield from params(place)
