"""Declarations: a file's text to a Module, and so for every file it uses.

Layer 2. Params get their values here; flows are only noted, to be elaborated where they are served.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from flowlang.diagnostics import CompileError, Diagnostic, Label, Source, Span
from flowlang.plan.arguments import Report, find_file
from flowlang.plan.module import Declared, Module, ParamValue, PythonFile
from flowlang.plan.onnx import Opener
from flowlang.plan.ops import OPS
from flowlang.plan.values import Constant, Refused, evaluate, from_text, refuse
from flowlang.plan.written import WrittenTypes
from flowlang.syntax import tree
from flowlang.syntax.parse import opened_source, parse_leniently, read_source


@dataclass(frozen=True, slots=True)
class Choices:
    """What is decided outside the file: `--set`, the environment, the schedule, the key.

    `opener` gives what an encrypted model holds.
    """

    values: Mapping[str, str]
    environment: Mapping[str, str]
    schedule: str | None = None
    opener: Opener | None = None


# What App and Flow take themselves, and what the Open Inference Protocol has a meaning for that
# holds for every flow.
CALLERS = frozenset(
    {"deadline_s", "priority", "errors", "ahead"} | {"timeout", "binary_data_output"}
)
MAIN = "main"  # the flow that a bare pipeline is
PARAM_TYPES = ("int", "float", "str", "bool", "path", "duration", "size")
_EXAMPLES = {"int": "1", "float": "0.5", "bool": "false", "duration": "5ms", "size": "64MiB"}


NOTHING_OPEN: Mapping[str, str] = {}
Readable: TypeAlias = tuple[tree.Program, list[Diagnostic], frozenset[str]]
Read: TypeAlias = Callable[[Source], Readable]


class Declarations:
    """The modules of a program, each file read once however often it is used.

    `read` gives the tree of a source, for those who have it already, and `texts` those of files
    that an editor has open, by their real paths.
    """

    def __init__(
        self,
        choices: Choices,
        report: Report,
        read: Read = parse_leniently,
        texts: Mapping[str, str] = NOTHING_OPEN,
    ) -> None:
        self._read = read
        self._texts = texts
        self._choices = choices
        self._report = report
        self._modules: dict[str, Module] = {}
        self._python: dict[str, PythonFile | None] = {}
        self._reading: list[str] = []
        self._prefixes: dict[str, str] = {}  # by file, what its names begin with

    @property
    def modules(self) -> list[Module]:
        """Every module, those used before those that use them; the program's own is the last."""
        return list(self._modules.values())

    @property
    def files(self) -> list[str]:
        """The files that have been read, and those that operators import."""
        imports = [file for p in self._python.values() if p is not None for file in p.imports]
        return [*(m.source.name for m in self._modules.values()), *self._python, *imports]

    def flows(self) -> dict[str, Declared]:
        """Every flow of every module, by its name in the program."""
        found: dict[str, Declared] = {}
        for module in reversed(self.modules):
            for flow in module.flows.values():
                declared = Declared(flow, module)
                found[declared.name] = declared
        return found

    def read(self, source: Source, prefix: str = "") -> Module:
        """The module of a source, with all that it uses."""
        program, diagnostics, lost = self._read(source)
        for diagnostic in diagnostics:
            self._report(diagnostic)
        module = Module(source, prefix, Path(os.path.dirname(source.name)), lost=lost)
        module.types = WrittenTypes(module, self._report)
        key = os.path.realpath(source.name)
        self._reading.append(key)
        _Reader(self, module, program, self._choices, self._report).run()
        self._reading.pop()
        self._modules[key] = module
        return module

    def claim(self, item: tree.Use, user: Module) -> None:
        """Note that a file is used: its names begin with what those who use it first call it."""
        with contextlib.suppress(Refused, ValueError):  # which a path with a null byte raises
            given = evaluate(item.path, user.constants)
            key = os.path.realpath(user.folder / str(given.value))
            self._prefixes.setdefault(key, f"{user.prefix}{item.name}.")

    def use(self, item: tree.Use, user: Module) -> Module | PythonFile | None:
        """What a `use` brings in, or None where it has been complained about."""
        given = evaluate(item.path, user.constants)
        if not str(given.value).endswith((".flow", ".py")):
            raise refuse(
                "not-usable",
                f"`{given.value}` is neither a .flow file nor a .py file",
                item.path.span,
                note='use "post.py" as post',
            )
        path = find_file(given, user.folder)
        key = os.path.realpath(path)
        if path.suffix == ".py":
            from flowlang.plan.signature import read_python  # most programs use no Python

            if key not in self._python:
                text = self._texts.get(key)
                self._python[key] = read_python(path, item.name, self._report, text)
            return self._python[key]
        if key in self._reading:
            raise _circle(item, [*self._reading[self._reading.index(key) :], key])
        if key in self._modules:
            return self._modules[key]
        try:
            text = self._texts.get(key)
            source = read_source(path) if text is None else opened_source(text, os.fspath(path))
        except CompileError as error:
            for diagnostic in error.diagnostics:
                self._report(diagnostic)
            return None
        return self.read(source, self._prefixes.get(key, f"{user.prefix}{item.name}."))


def _circle(item: tree.Use, keys: list[str]) -> Refused:
    names = [os.path.basename(key) for key in keys]
    return refuse(
        "import-cycle",
        f"`{names[0]}` would use itself",
        item.path.span,
        label=" -> ".join(names),
        note="put what both files need into a third one, and let both use that",
    )


class _Reader:
    """Fills one module from its tree."""

    def __init__(
        self,
        declarations: Declarations,
        module: Module,
        program: tree.Program,
        choices: Choices,
        report: Report,
    ) -> None:
        self.declarations = declarations
        self.module = module
        self.choices = choices
        self.report = report
        self.declared: dict[str, Span] = {}
        self._program = program
        for name in module.lost:
            module.constants[name] = Constant("unknown", None, program.span)

    def error(self, slug: str, message: str, span: Span, **more: object) -> None:
        self._tell(refuse(slug, message, span, **more))

    def _tell(self, refused: Refused) -> None:
        if refused.diagnostic:
            self.report(refused.diagnostic)

    def run(self) -> None:
        program = self._program
        if program.pipeline is not None:
            span = program.pipeline.span
            self.module.flows[MAIN] = tree.Flow(
                MAIN, (), None, program.pipeline, True, span, None, span
            )
        for item in program.items:
            if isinstance(item, tree.Use):
                self.declarations.claim(item, self.module)
        for item in program.items:
            if isinstance(item, tree.Schedule):
                self.module.schedules.append(item)
            elif self._is_new(item.name, item.name_span):
                self._declare(item)

    def _declare(self, item: tree.Use | tree.Param | tree.TypeDef | tree.Flow) -> None:
        if isinstance(item, tree.Param):
            self._param(item)
        elif isinstance(item, tree.TypeDef):
            self.module.types.declare(item)
        elif isinstance(item, tree.Flow):
            self._flow(item)
        else:
            self._use(item)

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
        if flow.name in OPS:
            self.error(
                "operator-name",
                f"`{flow.name}` is an operator, so a flow cannot have its name",
                flow.name_span,
                help=f"my_{flow.name}",
                fix=flow.name_span,
            )
            return
        seen: dict[str, Span] = {}
        for given in flow.inputs:
            if given.name in seen:
                self.error(
                    "duplicate-name",
                    f"`{flow.name}` has two parameters named `{given.name}`",
                    given.span,
                    secondary=(Label(seen[given.name], "first here"),),
                )
            if given.name in CALLERS:
                self.error(
                    "reserved-word",
                    f"`{given.name}` is a word of those who call flows, so a parameter cannot be "
                    "named so",
                    Span(given.span.source, given.span.start, given.span.start + len(given.name)),
                    help=f"{given.name}_",
                )
            seen[given.name] = given.span
        self.module.flows[flow.name] = flow

    def _use(self, item: tree.Use) -> None:
        used = None
        try:
            used = self.declarations.use(item, self.module)
        except Refused as refused:
            self._tell(refused)
        except OSError as error:
            message = f"`{item.path.value}` cannot be read: {error.strerror}"
            self.error("missing-file", message, item.path.span)
        if used is None:
            self.module.lost |= {item.name}
        else:
            self.module.uses[item.name] = used
        if isinstance(used, Module):
            self.module.constants |= {f"{item.name}.{n}": c for n, c in used.constants.items()}

    # Params

    def _param(self, item: tree.Param) -> None:
        try:
            value, origin = self._param_value(item)
        except Refused as refused:
            self._tell(refused)
            self.module.constants[item.name] = Constant("unknown", None, item.name_span)
            return
        self.module.constants[item.name] = value
        self.module.params[item.name] = ParamValue(self.module.prefix + item.name, value, origin)

    def _param_value(self, item: tree.Param) -> tuple[Constant, str]:
        declared = self._param_kind(item)
        default, origin = self._default(item)
        kind = declared or default.kind
        if declared and not _is_of(default, declared):
            unit = {"duration": "ms", "size": "MiB"}.get(declared)
            text = item.default.span.text
            mended = f"{text}{unit}" if unit and default.kind == "int" and text.isdigit() else None
            raise refuse(
                "wrong-kind",
                f"`{item.name}` is declared as {declared}, and its default is {default.noun}",
                item.default.span,
                help=mended,
                fix=item.default.span if mended else None,
            )
        if declared == "float" and default.kind == "int":
            default = Constant("float", float(default.value), default.span)
        if default.kind == "word":
            raise self._unknown_default(item, default)
        name = self.module.prefix + item.name
        if name in self.choices.values:
            text = self.choices.values[name]
            span = Span(Source(f"--set {name}", text), 0, len(text))
            return from_text(text, kind, span), "--set"
        return default, origin

    def _unknown_default(self, item: tree.Param, default: Constant) -> Refused:
        is_below = any(
            isinstance(i, tree.Param) and i.name == default.value for i in self._program.items
        )
        return refuse(
            "unknown-name",
            f"there is no param named `{default.value}` above this one",
            item.default.span,
            help=None if is_below else f'"{default.value}"',
            note="params are read in order" if is_below else "a string is written in double quotes",
            fix=None if is_below else item.default.span,
        )

    def _param_kind(self, item: tree.Param) -> str | None:
        if item.type is None:
            return None
        name = str(item.type.name)
        if name in PARAM_TYPES:
            return name
        raise refuse(
            "wrong-kind",
            f"a param cannot be of type `{item.type.span.text}`",
            item.type.span,
            note="params are int, float, str, bool, path, duration or size",
        )

    def _default(self, item: tree.Param) -> tuple[Constant, str]:
        call, names = item.default, self.module.constants
        if isinstance(call, tree.Call) and str(call.path) == "env" and call.args is not None:
            given = [evaluate(a.value, names) for a in _in_order(call.args)]
            values = given if len(given) == len(call.args) else []
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
        return evaluate(call, names), "file"


def _in_order(args: Sequence[tree.Arg]) -> list[tree.Arg]:
    """The arguments of `env`, its name and its default, without those that have no place."""
    named = {a.name: a for a in args if a.name is not None}
    free = [n for n in ("name", "default") if n not in named]
    named |= dict(zip(free, (a for a in args if a.name is None), strict=False))
    return [named[n] for n in ("name", "default") if n in named and "name" in named]


def _is_of(constant: Constant, kind: str) -> bool:
    wanted = {"path": "str", "size": "bytes"}.get(kind, kind)
    return constant.kind == wanted or (wanted == "float" and constant.kind == "int")
