"""Python operators: what a .py file declares, read from its text without running it.

Layer 2. Every public function at the top of the file is an operator. Its annotations are its types,
its parameters behind the item are what a flow can tell it. The functions themselves are called in
`flowlang.runtime.python`.
"""

from __future__ import annotations

import ast
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Source, Span
from flowlang.plan.arguments import Report
from flowlang.plan.imports import imported_files
from flowlang.plan.module import Module, PythonFile
from flowlang.plan.ops import Op, Param
from flowlang.plan.rules import Mismatch
from flowlang.plan.types import (
    ANY_ARRAY,
    NAMED,
    UNKNOWN,
    ListOf,
    Optional,
    Record,
    Type,
    Unknown,
    fits,
    optional,
    taken,
)
from flowlang.plan.written import WrittenTypes
from flowlang.syntax.parse import parse_leniently

SETTINGS = ("batch", "wait", "timeout")
_PLAIN = {"int": "int", "float": "float", "str": "str", "bool": "bool", "bytes": "bytes"}
_KINDS = {"int": "int", "float": "number", "str": "str", "bool": "flag"}  # of parameters
_TYPES = (
    "types are int, float, str, bool, bytes, list[...], X | None, np.ndarray, and a TypedDict, "
    "NamedTuple or dataclass of the same file"
)
_LISTS = frozenset({"list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Iterator", "set"})
_NO_FIELDS = frozenset({"ClassVar", "KW_ONLY"})  # annotations in a class
_ARRAYS = frozenset({"ndarray", "NDArray", "ArrayLike"})


@dataclass(frozen=True, slots=True)
class PythonFunction:
    """Which function an operator is. `fields` are the record's fields it takes one by one.

    One that is `is_batched` takes a list of items and gives a list of results. `arguments` are what
    it can be told besides, with their types. `classes` are the records of its file that are made
    objects of it; others are dicts. `problem` is why it cannot be an operator: that is told where
    it is mentioned, for not every function is one.
    """

    path: Path
    name: str
    shown: str
    takes: Type
    gives: Type
    is_batched: bool
    fields: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Type], ...] = ()
    classes: frozenset[str] = frozenset()
    problem: Diagnostic | None = None


class _Unreadable(Exception):
    """An annotation that says no type of the language."""

    def __init__(
        self,
        node: ast.AST,
        message: str,
        help: str | None = None,  # noqa: A002
        note: str | None = None,
    ) -> None:
        super().__init__(message)
        self.node = node
        self.message = message
        self.help = help
        self.note = note


def read_python(
    path: Path, alias: str, report: Report, text: str | None = None
) -> PythonFile | None:
    """The operators of a file, or None where it is no Python. Raises OSError.

    `text` is what it holds, where an editor has changed that.
    """
    text = path.read_bytes().decode("utf-8", "replace") if text is None else text
    source = Source(str(path), text)
    try:
        if "\0" in source.text:
            raise ValueError("it holds null bytes")
        parsed = ast.parse(source.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        report(_no_python(source, error))
        return None
    return _Reader(source, path, alias, report).read(parsed)


def _no_python(source: Source, error: Exception) -> Diagnostic:
    line = getattr(error, "lineno", None) or 1
    column = getattr(error, "offset", None) or 1
    starts = source.line_starts
    at = min(starts[min(line, len(starts)) - 1] + max(0, column - 1), len(source.text))
    reason = getattr(error, "msg", None) or str(error)
    message = f"this is no Python: {reason}"
    return Diagnostic("not-python", message, Label(Span(source, at, min(at + 1, len(source.text)))))


class _Reader:
    def __init__(self, source: Source, path: Path, alias: str, report: Report) -> None:
        self.source = source
        self.path = path
        self.alias = alias
        self.report = report
        self.records: dict[str, ast.ClassDef] = {}
        self.classes: frozenset[str] = frozenset()
        self.aliases: dict[str, ast.expr] = {}
        self.types: dict[str, Record] = {}
        self._resolving: set[str] = set()

    def read(self, parsed: ast.Module) -> PythonFile:
        self.records = {c.name: c for c in _records(parsed)}
        self.classes = frozenset(self.records) - frozenset(_typed_dicts(parsed))
        self.aliases = dict(_aliases(parsed))
        operators: dict[str, Op] = {}
        for node in parsed.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if not node.name.startswith("_"):
                try:
                    operators[node.name] = self._operator(node)
                except _Unreadable as error:
                    operators[node.name] = self._unknown(node, error)
        problems: dict[str, Diagnostic] = {}
        for name in self.records:
            try:
                self._record(name)
            except _Unreadable as error:
                problems[name] = self._problem(error)
        gives: dict[str, Type] = {}
        for name, op in operators.items():
            if op.function is not None and op.function.problem is not None:
                problems.setdefault(name, op.function.problem)
            elif op.function is not None:
                gives[name] = op.function.gives
        imports = imported_files(os.path.realpath(self.path), parsed)
        types = {**gives, **self.types}
        others = frozenset(_named(parsed)) - operators.keys()
        return PythonFile(self.path, operators, types, problems, others, tuple(imports))

    def _span(self, node: ast.AST) -> Span:
        """The place of a piece of Python; of a function or class, its first line."""
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
        starts = self.source.line_starts
        text = self.source.line(line)
        start = starts[line - 1] + len(text.encode()[:column].decode("utf-8", "ignore"))
        end_line = getattr(node, "end_lineno", None)
        if end_line != line:
            return Span(self.source, start, starts[line - 1] + len(text))
        tail = text.encode()[: getattr(node, "end_col_offset", 0)].decode("utf-8", "ignore")
        return Span(self.source, start, starts[line - 1] + len(tail))

    def _unknown(self, node: ast.FunctionDef | ast.AsyncFunctionDef, error: _Unreadable) -> Op:
        function = PythonFunction(
            self.path,
            node.name,
            f"{self.alias}.{node.name}",
            UNKNOWN,
            UNKNOWN,
            is_batched=False,
            problem=self._problem(error),
        )
        return _op(function, "", (), lambda given, params: UNKNOWN)

    def _problem(self, error: _Unreadable) -> Diagnostic:
        place = Label(self._span(error.node))
        return Diagnostic("bad-signature", error.message, place, help=error.help, note=error.note)

    def _operator(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Op:
        if isinstance(node, ast.AsyncFunctionDef):
            raise _Unreadable(node, f"`{node.name}` is a coroutine, not an operator")
        shown = f"{self.alias}.{node.name}"
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        if args.vararg or args.kwarg or not positional:
            raise _Unreadable(
                node,
                f"`{node.name}` takes its item first, and then parameters with names",
                help=f"def {node.name}(item: bytes) -> str:",
            )
        if node.returns is None:
            raise _Unreadable(
                node,
                f"`{node.name}` does not say what it gives",
                help=f"def {node.name}({ast.unparse(_annotated(args))}) -> str:",
            )
        is_batched = any(_name(d) == "batched" for d in node.decorator_list)
        bare = len(positional) - len(args.defaults)
        items, rest = positional[: max(1, bare)], positional[max(1, bare) :]
        self._check_names(node, rest)
        takes = [(a.arg, taken(self._annotation(a, is_batched))) for a in items]
        gives = self._type(node.returns)
        gives = self._element(node.returns, gives) if is_batched else gives
        item = takes[0][1] if len(takes) == 1 else Record(tuple(takes))
        fields = tuple(name for name, _ in takes) if len(takes) > 1 else ()
        defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
        params = [self._param(a, d) for a, d in zip(positional, defaults, strict=True) if a in rest]
        params += [
            self._param(a, d, is_named=True)
            for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
        ]
        arguments = tuple((p.name, p.type) for p in params)
        function = PythonFunction(
            self.path, node.name, shown, item, gives, is_batched, fields, arguments, self.classes
        )
        doc = (ast.get_docstring(node) or "").partition("\n")[0]
        return _op(function, doc, tuple(params), _rule(function))

    def _check_names(self, node: ast.FunctionDef, rest: list[ast.arg]) -> None:
        """Arguments are given by name. Raises _Unreadable where one cannot be."""
        only = next((a for a in node.args.posonlyargs if a in rest), None)
        if only is None:
            return
        args = ast.arguments(**{**vars(node.args), "posonlyargs": []})
        args.args = [*node.args.posonlyargs, *node.args.args]
        raise _Unreadable(
            node,
            f"`{only.arg}` of `{node.name}` has no name for callers, as it stands before a `/`",
            help=f"def {node.name}({ast.unparse(args)}) -> {ast.unparse(node.returns or only)}:",
        )

    def _annotation(self, given: ast.arg, is_batched: bool) -> Type:
        if given.annotation is None:
            message = f"`{given.arg}` has no type"
            raise _Unreadable(given, message, help=f"{given.arg}: bytes")
        kind = self._type(given.annotation)
        return self._element(given.annotation, kind) if is_batched else kind

    def _element(self, node: ast.AST, kind: Type) -> Type:
        if not isinstance(kind, ListOf):
            raise _Unreadable(
                node, "a batched operator takes and gives lists", f"list[{_text(node)}]"
            )
        return kind.item

    def _param(self, given: ast.arg, default: ast.expr | None, *, is_named: bool = False) -> Param:
        kind = _KINDS.get(_name(given.annotation) if given.annotation else "", "value")
        try:
            value = ast.literal_eval(default) if default is not None else None
        except (ValueError, TypeError, RecursionError, MemoryError):
            value = None
        return Param(
            given.arg,
            kind,
            "",
            value,
            is_named=is_named,
            is_required=default is None,
            is_live=True,
            type=self._said(given.annotation),
        )

    # Types

    def _said(self, annotation: ast.expr | None) -> Type:
        """The type of an argument; one that no type of the language says may be anything."""
        with contextlib.suppress(_Unreadable):
            return taken(self._type(annotation)) if annotation is not None else UNKNOWN
        return UNKNOWN

    def _type(self, node: ast.expr) -> Type:
        """The type that an annotation says. Raises _Unreadable."""
        if isinstance(node, ast.Constant) and node.value is None:
            raise _Unreadable(node, "an operator gives something")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in self.records:
                return self._record(node.value)
            return self._written(node, node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._union(node, [node.left, node.right])
        if isinstance(node, ast.Subscript):
            return self._subscript(node)
        name = _name(node)
        if name in _PLAIN:
            return NAMED[_PLAIN[name]]
        if name in _ARRAYS:
            return ANY_ARRAY
        if name == "Any":
            return UNKNOWN
        if name in self.records:
            return self._record(name)
        if name in self.aliases:
            return self._alias(node, name)
        message = f"`{ast.unparse(node)}` is no type of the language"
        if name in _LISTS:
            raise _Unreadable(node, message, help="list[str]")
        if name.lower().endswith(("array", "tensor", "image", "mat")):
            raise _Unreadable(node, message, help='Annotated[np.ndarray, "tensor<f32, 512>"]')
        raise _Unreadable(node, message, note=_TYPES)

    def _union(self, node: ast.expr, sides: list[ast.expr]) -> Type:
        others = [s for s in sides if not (isinstance(s, ast.Constant) and s.value is None)]
        if len(others) != 1 or len(sides) != 2:
            raise _Unreadable(node, "a type is one type, or one or None", help="str | None")
        return optional(self._type(others[0]))

    def _subscript(self, node: ast.Subscript) -> Type:
        name, inner = _name(node.value), node.slice
        if name in ("Optional", "NotRequired"):
            return optional(self._type(inner))
        if name in ("list", "List", "Sequence"):
            return ListOf(self._type(inner))
        if name in _ARRAYS:
            return ANY_ARRAY
        parts = inner.elts if isinstance(inner, ast.Tuple) else []
        if name == "Union" and parts:
            return self._union(node, parts)
        if name == "Annotated" and len(parts) > 1:
            said = parts[1]
            if isinstance(said, ast.Constant) and isinstance(said.value, str):
                return self._written(said, said.value)
            return self._type(parts[0])
        message = f"`{ast.unparse(node)}` is no type of the language"
        if name in _LISTS:
            raise _Unreadable(node, message, help=f"list[{ast.unparse((parts or [inner])[0])}]")
        raise _Unreadable(node, message, note=_TYPES)

    @contextlib.contextmanager
    def _once(self, node: ast.AST, name: str) -> Iterator[None]:
        if name in self._resolving:
            raise _Unreadable(node, f"`{name}` would hold itself")
        self._resolving.add(name)
        try:
            yield
        finally:
            self._resolving.discard(name)

    def _alias(self, node: ast.expr, name: str) -> Type:
        """A name that the file gives to an annotation: `Vector = Annotated[...]`."""
        with self._once(node, name):
            return self._type(self.aliases[name])

    def _record(self, name: str) -> Record:
        if name not in self.types:
            with self._once(self.records[name], name):
                self.types[name] = self._fields(self.records[name])
        return self.types[name]

    def _fields(self, node: ast.ClassDef) -> Record:
        """The record of a class, with the fields of those it is derived from first."""
        fields: dict[str, Type] = {}
        defaults: set[str] = set()
        for inherited in (_name(b) for b in node.bases):
            if inherited in self.records:
                base = self._record(inherited)
                fields |= dict(base.fields)
                defaults |= base.defaults
        is_made = node.name in self.classes  # and no dict, which has no defaults
        may_lack = any(
            k.arg == "total" and isinstance(k.value, ast.Constant) and k.value.value is False
            for k in node.keywords
        )
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                if _name(part.annotation) in _NO_FIELDS:
                    continue
                name, kind = part.target.id, self._type(part.annotation)
                fields[name] = optional(kind) if may_lack else kind
                # A field that may be null is null where it is missing, as everywhere.
                is_null = isinstance(fields[name], Optional)
                is_filled = is_made and not is_null and _is_filled(part.value)
                (defaults.add if is_filled else defaults.discard)(name)
        return Record(tuple(fields.items()), node.name, frozenset(defaults))

    def _written(self, node: ast.expr, text: str) -> Type:
        """A type in the language's own words."""
        program, problems, _ = parse_leniently(Source("", f"type it = {text}"))
        module = Module(Source("", ""), "", self.path.parent)
        module.types = WrittenTypes(module, problems.append)
        for item in program.items:
            module.types.declare(item)  # type: ignore[arg-type]
        kind = module.types.declared("it")
        if problems or kind is None:
            if not problems:
                raise _Unreadable(node, f"`{text}` is no type of the language")
            first = problems[0]
            mended = first.help if first.fix is not None and first.fix.text == text else None
            raise _Unreadable(
                node,
                f"`{text}` is no type of the language: {first.message}",
                help=f'"{mended}"' if mended else self._unquoted(text),
                note=first.note,
            )
        return Record(kind.fields) if isinstance(kind, Record) and kind.name == "it" else kind

    def _unquoted(self, text: str) -> str | None:
        """An annotation of Python's own, which says a type where it is not in quotes."""
        try:
            self._type(ast.parse(text, mode="eval").body)
        except (_Unreadable, SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        return text


def _name(node: ast.AST | None) -> str:
    """The last name of `a.b.c`, `a.b.c(...)` or `a.b.c[...]`."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _annotated(args: ast.arguments) -> ast.arguments:
    """The same parameters, those of the item with a type where they have none."""
    bare = len(args.posonlyargs) + len(args.args) - len(args.defaults)
    positional = [
        a if a.annotation is not None or at >= max(1, bare) else ast.arg(a.arg, ast.Name("bytes"))
        for at, a in enumerate([*args.posonlyargs, *args.args])
    ]
    before = len(args.posonlyargs)
    parts = {**vars(args), "posonlyargs": positional[:before], "args": positional[before:]}
    return ast.arguments(**parts)


def _text(node: ast.AST) -> str:
    """An annotation as it is written, without the quotes of one that is a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node)


def _records(parsed: ast.Module) -> Iterator[ast.ClassDef]:
    """The classes that are records: TypedDict, NamedTuple and dataclasses."""
    typed_dicts = set(_typed_dicts(parsed))
    for node in parsed.body:
        if not isinstance(node, ast.ClassDef):
            continue
        is_dataclass = any(_name(d) == "dataclass" for d in node.decorator_list)
        is_tuple = "NamedTuple" in map(_name, node.bases)
        if is_dataclass or is_tuple or node.name in typed_dicts:
            yield node


def _typed_dicts(parsed: ast.Module) -> Iterator[str]:
    """The names of the classes that are TypedDicts, which are dicts at run time."""
    found = {"TypedDict"}
    for node in parsed.body:
        if isinstance(node, ast.ClassDef) and found & {_name(b) for b in node.bases}:
            found.add(node.name)
            yield node.name


def _is_filled(value: ast.expr | None) -> bool:
    """Whether a field has a value where a caller gives none: a default, or one of its class."""
    if _name(value) != "field" or not isinstance(value, ast.Call):
        return value is not None
    said = {k.arg: k.value for k in value.keywords}
    init = said.get("init")
    is_made = isinstance(init, ast.Constant) and init.value is False
    return is_made or bool(said.keys() & {"default", "default_factory"})


def _aliases(parsed: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The names that are given to something at the top of a file."""
    for node in parsed.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            if isinstance(node.targets[0], ast.Name):
                yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def _named(parsed: ast.Module) -> Iterator[str]:
    """The names at the top of a file of what is no function of its own."""
    yield from dict(_aliases(parsed))
    for node in parsed.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (a.asname or a.name for a in node.names)


def _rule(function: PythonFunction) -> Callable[[Type, Any], Type]:
    def rule(given: Type, params: Any) -> Type:
        if not isinstance(given, Unknown) and not fits(given, function.takes):
            raise Mismatch(str(function.takes))
        return function.gives

    return rule


def _op(
    function: PythonFunction,
    doc: str,
    params: tuple[Param, ...],
    rule: Callable[[Type, Any], Type],
) -> Op:
    return Op(
        function.shown, doc, "python", function.takes, rule, params, SETTINGS, function=function
    )
