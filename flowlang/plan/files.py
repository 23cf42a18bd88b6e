"""Flow files to diagnostics and plans, with what is chosen outside them.

Layer 2: the calls that the faces share, and that run nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from flowlang.diagnostics import CompileError, Diagnostic, FlowError, shown
from flowlang.plan.check import Plan, check_source, compile_source
from flowlang.plan.declare import Choices
from flowlang.plan.onnx import Opener
from flowlang.syntax import tree
from flowlang.syntax.parse import parse, read_source

PathLike: TypeAlias = str | os.PathLike[str]


def _choices(
    values: Mapping[str, object] | None, schedule: str | None, opener: Opener | None
) -> Choices:
    texts = {
        n: str(v).lower() if isinstance(v, bool) else str(v) for n, v in (values or {}).items()
    }
    return Choices(texts, os.environ, schedule, opener)


def check(
    path: PathLike,
    *,
    values: Mapping[str, object] | None = None,
    schedule: str | None = None,
    opener: Opener | None = None,
) -> list[Diagnostic]:
    """Every error, warning and hint of a flow file, in order of place. Runs nothing.

    `values` overrides params, as `--set` does; `opener` opens encrypted models. Raises OSError if
    the file cannot be read.
    """
    try:
        return check_source(read_source(path), _choices(values, schedule, opener))[1]
    except CompileError as error:
        return error.diagnostics


def compile_file(
    path: PathLike,
    *,
    values: Mapping[str, object] | None = None,
    schedule: str | None = None,
    opener: Opener | None = None,
) -> Plan:
    """The typed plan of a flow file. Raises CompileError, or OSError if it cannot be read."""
    return compile_source(read_source(path), _choices(values, schedule, opener))


def compile_files(
    paths: Sequence[PathLike],
    *,
    values: Mapping[str, object] | None = None,
    schedule: str | None = None,
    opener: Opener | None = None,
) -> list[Plan]:
    """The typed plans of flow files that are served together.

    Raises CompileError with the errors of all of them, FlowError where two serve flows of one name,
    or OSError.
    """
    plans: list[Plan] = []
    errors: list[Diagnostic] = []
    for path in paths:
        try:
            plans.append(compile_file(path, values=values, schedule=schedule, opener=opener))
        except CompileError as error:
            errors += error.diagnostics
    if errors:
        raise CompileError(errors)
    _check_names(plans)
    return plans


def _check_names(plans: Sequence[Plan]) -> None:
    """Every served flow has its own name. Raises FlowError."""
    owners: dict[str, str] = {}
    for plan in plans:
        for flow in plan.flows:
            file = plan.source.name
            if flow.name in owners:
                both = f"{shown(owners[flow.name])} and {shown(file)}"
                mend = "give one another name, `flow NAME = ...`"
                raise FlowError(f"{both} both serve a flow named `{flow.name}`: {mend}")
            owners[flow.name] = file


def inspect_file(
    path: PathLike,
    *,
    values: Mapping[str, object] | None = None,
    schedule: str | None = None,
    opener: Opener | None = None,
) -> tuple[tree.Program, Plan | None]:
    """The tree of a flow file, and its plan where it has no errors.

    Raises CompileError where it cannot be read, or OSError.
    """
    source = read_source(path)
    return parse(source), check_source(source, _choices(values, schedule, opener))[0]
