"""Modules: what each file of a program declares, and where a name leads from there.

Layer 2. The file that is checked is one module, and each file it brings in with `use` another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from flowlang.diagnostics import Diagnostic, Source
from flowlang.plan.ops import Op
from flowlang.plan.types import Type
from flowlang.plan.values import Constant
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.plan.written import WrittenTypes


@dataclass(frozen=True, slots=True)
class ParamValue:
    """A param's final value and where it came from: `file`, `environment` or `--set`."""

    name: str
    value: Constant
    origin: str


@dataclass(frozen=True, slots=True)
class PythonFile:
    """A Python file's operators and record types by name, read without running it.

    `problems` say of the others of either kind why they cannot be read; `others` are the names at
    its top that are no functions of its own; `imports` are the files beside it that it imports.
    """

    path: Path
    operators: dict[str, Op]
    types: dict[str, Type]
    problems: dict[str, Diagnostic]
    others: frozenset[str] = frozenset()
    imports: tuple[str, ...] = ()


@dataclass(slots=True)
class Module:
    """One .flow file. `prefix` is how its names start in messages: `imagenet.`, or nothing.

    `lost` are the names of declarations that could not be read: what mentions them is let pass.
    """

    source: Source
    prefix: str
    folder: Path
    flows: dict[str, tree.Flow] = field(default_factory=dict)
    params: dict[str, ParamValue] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    schedules: list[tree.Schedule] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)
    types: WrittenTypes = field(init=False)
    lost: frozenset[str] = frozenset()

    def declared(self, names: tuple[str, ...]) -> Declared | None:
        """The flow that a path of names leads to from here."""
        if len(names) == 1:
            flow = self.flows.get(names[0])
            return Declared(flow, self) if flow is not None else None
        used = self.uses.get(names[0])
        return used.declared(names[1:]) if isinstance(used, Module) else None

    def operator(self, names: tuple[str, ...]) -> Op | None:
        """The Python operator that a path of names leads to from here."""
        used = self.uses.get(names[0])
        if isinstance(used, PythonFile):
            return used.operators.get(names[1]) if len(names) == 2 else None
        return used.operator(names[1:]) if isinstance(used, Module) and len(names) > 2 else None

    def is_lost(self, names: tuple[str, ...]) -> bool:
        """Whether a path leads to something that could not be read."""
        if names[0] in self.lost:
            return True
        used = self.uses.get(names[0])
        return isinstance(used, Module) and len(names) > 1 and used.is_lost(names[1:])

    def callable_names(self) -> Iterator[str]:
        """The flows and Python operators that can be mentioned here, as they are written."""
        yield from self.flows
        for alias, used in self.uses.items():
            names = used.operators if isinstance(used, PythonFile) else used.flows
            yield from (f"{alias}.{name}" for name in names)


Use: TypeAlias = Module | PythonFile


@dataclass(frozen=True, slots=True)
class Declared:
    """A flow and the module it is declared in."""

    flow: tree.Flow
    module: Module

    @property
    def name(self) -> str:
        """The flow's name, unlike every other's of the program."""
        return self.module.prefix + self.flow.name
