"""Wrong programs, checked as a user would check them, and the texts expected of that.

A file tests/errors/SLUG.flow holds programs, each headed by a line `#= name [choices]`; SLUG.txt
beside it holds what checking each of them says. Choices are written as on the command line:
`--set size=448`, `--schedule prod`, `--device gpu`, and `NAME=VALUE` for the environment.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flowlang.diagnostics import CompileError, Diagnostic, Source
from flowlang.plan.check import check_source
from flowlang.plan.declare import Choices
from flowlang.plan.physical import Machine, lower

ERRORS = Path(__file__).parent / "errors"
REGENERATE = bool(os.environ.get("FLOWLANG_REGENERATE"))
CPU, GPU = Machine(2), Machine(2, "gpu", (0, 1))


@dataclass(frozen=True)
class Case:
    """One program, and what is chosen outside it."""

    slug: str
    name: str
    text: str
    options: str = ""

    def __str__(self) -> str:
        return f"{self.slug}-{self.name}"


def read_cases(file: Path) -> list[Case]:
    """The programs of a file."""
    parts = re.split(r"^#= (\S+)(?: (.*))?\n", file.read_text("utf-8"), flags=re.MULTILINE)
    assert not parts[0].strip(), f"{file} starts without a head"
    heads = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return [Case(file.stem, name, text, options or "") for name, options, text in heads]


def all_cases() -> Iterator[Case]:
    for file in sorted(ERRORS.glob("*.flow")):
        yield from read_cases(file)


def choices(options: str) -> tuple[Choices, Machine]:
    """What the words of a command line choose."""
    values: dict[str, str] = {}
    environment: dict[str, str] = {}
    schedule, machine = None, CPU
    words = iter(shlex.split(options))
    for word in words:
        if word == "--set":
            name, _, values[name] = next(words).partition("=")
        elif word == "--schedule":
            schedule = next(words)
        elif word == "--device":
            machine = {"cpu": CPU, "gpu": GPU}[next(words)]
        else:
            name, _, environment[name] = word.partition("=")
    return Choices(values, environment, schedule), machine


def check(text: str, options: str = "") -> list[Diagnostic]:
    """Everything said of a program named app.flow, down to its stages where it has no errors."""
    chosen, machine = choices(options)
    plan, found = check_source(Source("app.flow", text), chosen)
    if plan is None:
        return found
    try:
        return [*found, *lower([plan], machine).remarks]
    except CompileError as error:
        return [*found, *error.diagnostics]


def applied(diagnostic: Diagnostic) -> str:
    """The program after taking a diagnostic's help in place of its `fix`."""
    span = diagnostic.fix
    assert span is not None
    assert diagnostic.help is not None
    text = span.source.text
    return text[: span.start] + diagnostic.help + text[span.end :]
