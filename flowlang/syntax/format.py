"""Tree to canonical text: what `flowlang fmt` writes, and how messages show expressions.

Layer 1. The tree becomes a document that `layout` fits into lines. The comments of the file become
parts of it: each stands before the first element able to start a line that it stood before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flowlang.syntax import tree
from flowlang.syntax.layout import (
    HARD,
    NOTHING,
    SOFT,
    SPACE,
    WIDTH,
    Doc,
    Group,
    Line,
    Nest,
    WhenBroken,
    flat,
    render,
)
from flowlang.syntax.remarks import Remarks

_Part: TypeAlias = tree.Arg | tree.RecordField | tree.Arm | tree.Input | tree.TypeField
_Element: TypeAlias = tree.Expr | tree.TypeExpr | _Part
_Statement: TypeAlias = tree.Let | tree.Entry | tree.Expr
_Prefixed: TypeAlias = list[tuple[str, tree.Expr]]

_LEVELS = (("or",), ("and",), ("==", "!=", "<", "<=", ">", ">="), ("+", "-"), ("*", "/"))
_LEVEL = {operator: level for level, row in enumerate(_LEVELS) for operator in row}
_COMMA = WhenBroken(",")


def format_program(program: tree.Program) -> str:
    """The canonical text of a file, with all its comments. Ends in a line end."""
    return render(_Writer(Remarks.of(program)).program(program))


def format_expr(expr: tree.Expr) -> str:
    """An expression on one line, however long; without comments."""
    return flat(_Writer(Remarks((), "")).doc(expr)) or ""


def format_type(type_expr: tree.TypeExpr) -> str:
    """A type on one line, however long; without comments."""
    return flat(_Writer(Remarks((), "")).doc(type_expr)) or ""


def _quoted(value: str) -> str:
    """A string with JSON escapes, where plain characters would not do or not show."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _lead_end(node: _Element | _Statement) -> int:
    """Where an element's first words end, which no line end divides; comments there go before."""
    while True:
        match node:
            case tree.Pipeline(steps=(first, *_)) | tree.Fallback(choices=(first, *_)):
                node = first
            case tree.Arm(patterns=(first, *_)) | tree.Binary(left=first):
                node = first
            case tree.Unary(value=first) | tree.If(condition=first) | tree.Repeat(stage=first):
                node = first
            case tree.Arg(name=None, value=first):
                node = first
            case tree.Ascribe(kind):
                node = kind
            case tree.Call(path, (_, *_)):
                return path.span.end
            case tree.TypeExpr(tree.Path() as path, (_, *_)):
                return path.span.end
            case tree.RecordField(_, None) | tree.Call() | tree.TypeExpr(tree.Path()):
                return node.span.end
            case tree.Number() | tree.String() | tree.Bool() | tree.Range() | tree.Current():
                return node.span.end
            case tree.Record(()) | tree.ListOf(()):
                return node.span.end
            case _:
                return node.span.start


def _is_bracketed(node: tree.Expr) -> bool:
    """Whether its first line ends in an opening bracket where it is split."""
    if isinstance(node, tree.Repeat):
        node = node.stage
    if isinstance(node, tree.Call):
        return bool(node.args)
    return isinstance(node, (tree.Record, tree.ListOf, tree.Match, tree.Group))


def _prefixed(prefix: str, nodes: Sequence[tree.Expr]) -> _Prefixed:
    return [(prefix if at else "", node) for at, node in enumerate(nodes)]


def _operands(node: tree.Binary) -> _Prefixed:
    """`a + b - c` as ("", a), ("+ ", b), ("- ", c)."""
    rows: _Prefixed = []
    level = _LEVEL[node.operator]
    left: tree.Expr = node
    while isinstance(left, tree.Binary) and _LEVEL[left.operator] == level:
        right = left.right
        is_level = isinstance(right, tree.Binary) and _LEVEL[right.operator] == level
        inside = _operands(right) if isinstance(right, tree.Binary) and is_level else [("", right)]
        rows += [*reversed(inside[1:]), (f"{left.operator} ", inside[0][1])]
        left = left.left
    return [("", left), *reversed(rows)]


def _branches(node: tree.If) -> _Prefixed:
    """`if a then b else c` as ("if ", a), ("then ", b), ("else ", c)."""
    rows: _Prefixed = [("if ", node.condition), ("then ", node.then)]
    while isinstance(node.otherwise, tree.If):
        node = node.otherwise
        rows += [("else if ", node.condition), ("then ", node.then)]
    return [*rows, ("else ", node.otherwise)]


@dataclass(frozen=True, slots=True)
class _Declaration:
    """Documents of a declaration; where it has a `=` to align, `head` is what stands before it."""

    kind: type[tree.Item]
    gap: Doc
    is_adjacent: bool
    head: Doc
    rest: Doc

    def widths(self) -> tuple[int, int] | None:
        """Columns of its head and of all of it, if it has a `=` and fits on a line."""
        head, line = flat(self.head), flat((self.head, self.rest))
        if self.rest == NOTHING or head is None or line is None or len(line) > WIDTH:
            return None
        return len(head), len(line)


def _paddings(rows: Sequence[_Declaration]) -> list[int]:
    """How many blanks each row needs for runs of rows to have their `=` in one column."""
    paddings = [0] * len(rows)
    run: list[tuple[int, int, int]] = []
    for at, row in enumerate(rows):
        widths = row.widths()
        joins = bool(run) and row.is_adjacent and row.kind is rows[at - 1].kind
        if widths and joins:
            longer = [*run, (at, *widths)]
            column = max(head for _, head, _ in longer)
            if all(column - head + line <= WIDTH for _, head, line in longer):
                run = longer
                paddings[run[0][0] : at + 1] = [column - head for _, head, _ in run]
                continue
        run = [(at, *widths)] if widths else []
    return paddings


class _Writer:
    """Makes the documents of one file from first to last, taking its comments on the way."""

    def __init__(self, remarks: Remarks) -> None:
        self._remarks = remarks

    def program(self, program: tree.Program) -> Doc:
        parts: list[Doc] = []
        after: int | None = None
        if program.edition is not None:
            start, after = self._remarks.edition()
            gap, _ = self._remarks.between(None, start, start)
            parts += [gap, "flowlang", self._word(after, str(program.edition)), HARD]
        if program.pipeline is not None:
            bare = program.pipeline
            gap, _ = self._remarks.between(after, bare.span.start, _lead_end(bare))
            parts += [gap, self.doc(bare)]
            after = bare.span.end
        if program.items:
            rows = self._declarations(program.items, after)
            for row, padding in zip(rows, _paddings(rows), strict=True):
                parts += [row.gap, row.head, " " * padding, row.rest, HARD]
            after = program.items[-1].span.end
        last, _ = self._remarks.between(after, None, self._remarks.end)
        return (*parts, last)

    def _declarations(self, items: Sequence[tree.Item], after: int | None) -> list[_Declaration]:
        rows: list[_Declaration] = []
        was_block = False
        for item in items:
            is_block = isinstance(getattr(item, "body", item), (tree.Body, tree.Schedule))
            is_parted = after is not None and (is_block or was_block)
            start = item.span.start
            gap, is_adjacent = self._remarks.between(after, start, start, is_parted=is_parted)
            rows.append(_Declaration(type(item), gap, is_adjacent, *self._declaration(item)))
            after, was_block = item.span.end, is_block
        return rows

    def _declaration(self, item: tree.Item) -> tuple[Doc, Doc]:
        """A declaration up to its `=` and from there on, or all of it and nothing."""
        match item:
            case tree.Use(path, name):
                return (f"use {_quoted(path.value)}", self._word(item.span.end, f"as {name}")), ""
            case tree.Param(name, kind, default):
                typed: Doc = (":", self._follow(kind)) if kind else NOTHING
                return (f"param {name}", typed), (" =", self._assigned(default))
            case tree.TypeDef(name, kind):
                return (f"type {name} =", self._follow(kind)), NOTHING
            case tree.Flow(body=body):
                head = self._header(item)
                if not isinstance(body, tree.Body):
                    return head, (" =", self._assigned(body))
                statements = [*body.lets, body.result]
                return (head, self._block(" {", statements, body.span.end)), NOTHING
            case tree.Schedule(name, entries):
                opening = f"schedule {name} {{" if name else "schedule {"
                return self._block(opening, entries, item.span.end), NOTHING

    def _header(self, flow: tree.Flow) -> Doc:
        """A flow up to its `=` or body."""
        parts: list[Doc] = ["export flow " if flow.is_exported else "flow ", flow.name]
        if flow.inputs:
            end = self._remarks.closer(flow.inputs[-1].span.end)
            parts.append(self._enclosed("(", flow.inputs, end, ")"))
        if flow.signature:
            taken, given = flow.signature
            parts += [": ", self.doc(taken), " -> ", self.doc(given)]
        return tuple(parts)

    # Statements in braces

    def _block(self, opening: str, statements: Sequence[_Statement], end: int) -> Doc:
        """Statements a line each; a single one on the line of its braces where it fits."""
        separator = SPACE if len(statements) == 1 else HARD
        parts: list[Doc] = []
        after: int | None = None
        for statement in statements:
            start = statement.span.start
            gap, _ = self._remarks.between(after, start, _lead_end(statement))
            parts += [separator, gap, self._statement(statement)]
            after = statement.span.end
        last, _ = self._remarks.between(after, None, end)
        if not statements and last == NOTHING:
            return f"{opening}}}"
        return Group(
            (opening, Nest((*parts, HARD if not parts else NOTHING, last)), separator, "}")
        )

    def _statement(self, statement: _Statement) -> Doc:
        match statement:
            case tree.Let(name, value):
                return (f"let {name} =", self._assigned(value))
            case tree.Entry(path, args, count, place):
                end = self._remarks.closer(args[-1].span.end) if args else 0
                call = self._call(path, args, end)
                return (call, self._word(place.start, f"x{count}")) if place else call
        return ("return ", self.doc(statement))

    # What stands behind a name

    def _word(self, end: int, word: str) -> Doc:
        """A word behind a blank; below the comments before it, if there are any."""
        remark = self._remarks.before(end)
        return Nest((remark, word)) if remark else f" {word}"

    def _follow(self, node: tree.Expr | tree.TypeExpr, space: str = " ") -> Doc:
        """A value on the line of its name; below the comments before it, if there are any."""
        remark = self._remarks.before(_lead_end(node))
        doc = self.doc(node)
        return Nest((remark, doc)) if remark else (space, doc)

    def _assigned(self, node: tree.Expr) -> Doc:
        """A value on the line of its `=`, or where it is too long and no bracket, below."""
        if _is_bracketed(node):
            return self._follow(node)
        remark = self._remarks.before(_lead_end(node))
        return Group(Nest((SPACE, remark, self.doc(node, is_below=True))))

    # Expressions and types

    def doc(self, node: _Element, *, is_below: bool = False) -> Doc:
        """An element, the comments before it being taken.

        `is_below` says that it starts a line when split, so that its further lines can be flush.
        """
        match node:
            case tree.Pipeline(steps):
                return self._chain(_prefixed("-> ", steps), is_below)
            case tree.Fallback(choices):
                return self._chain(_prefixed("?? ", choices), is_below)
            case tree.Binary():
                return self._chain(_operands(node), is_below)
            case tree.If():
                return self._chain(_branches(node), is_below)
            case tree.Unary(operator, value):
                return ("not " if operator == "not" else operator, self.doc(value))
            case tree.Repeat(stage, count, place):
                return (self.doc(stage), self._word(place.start, f"x{count}"))
            case tree.Call(path, args):
                return self._call(path, args, node.span.end)
            case tree.Group(value):
                return self._group(node)
            case tree.Record(fields):
                return self._enclosed("{", fields, node.span.end, "}", SPACE)
            case tree.ListOf(items):
                return self._enclosed("[", items, node.span.end, "]")
            case tree.Match(subject, arms):
                opening = f"match {format_expr(subject)} {{" if subject else "match {"
                return self._enclosed(opening, arms, node.span.end, "}", SPACE)
            case tree.Ascribe(kind):
                return ("as ", self.doc(kind))
            case tree.TypeExpr():
                return self._type(node)
            case tree.Number(digits, unit):
                return f"{digits}{unit}"
            case tree.String(text):
                return _quoted(text)
            case tree.Bool(truth):
                return "true" if truth else "false"
            case tree.Range(parts):
                return "..".join(f"{p.digits}{p.unit}" for p in parts)
            case tree.Current(names):
                return "".join(f".{name}" for name in names)
        return self._part(node)

    def _part(self, node: _Part) -> Doc:
        """What brackets hold besides expressions."""
        match node:
            case tree.Arg(None, value):
                return self.doc(value)
            case tree.Arg(name, value):
                return (f"{name}=", self._follow(value, NOTHING))
            case tree.RecordField(name, value):
                return (f"{name}:", self._follow(value)) if value else name or "..."
            case tree.Arm(patterns, value):
                test = self._chain(_prefixed("| ", patterns)) if patterns else "else"
                return (test, " =>", self._follow(value))
            case tree.TypeField(name, kind):
                return (f"{name}:", self._follow(kind))
            case tree.Input(name, kind, default):
                typed = (f"{name}:", self._follow(kind))
                return (typed, " =", self._follow(default)) if default else typed

    def _chain(self, rows: _Prefixed, is_below: bool = False) -> Doc:
        """Expressions on one line, or each on a line that starts with its prefix."""
        (prefix, first), *others = rows
        parts: list[Doc] = []
        head: Doc = (prefix, self.doc(first))
        after = first.span.end
        for prefix, node in others:
            remark = self._remarks.before(_lead_end(node), after)
            parts += [SPACE, remark, prefix, self.doc(node)]
            after = node.span.end
        return Group((head, tuple(parts) if is_below else Nest(tuple(parts))))

    def _call(self, path: tree.Path, args: Sequence[tree.Arg] | None, end: int) -> Doc:
        if args is None:
            return str(path)
        if len(args) == 1 and self._is_hugged(args[0], path.span.end, end):
            return (f"{path}(", self.doc(args[0].value), ")")
        return self._enclosed(f"{path}(", args, end, ")")

    def _is_hugged(self, arg: tree.Arg, start: int, end: int) -> bool:
        """Whether an only argument shares its brackets' lines: `map({`."""
        inner = arg.value.span
        return (
            arg.name is None
            and isinstance(arg.value, (tree.Record, tree.ListOf, tree.Match))
            and _lead_end(arg.value) == inner.start
            and not self._remarks.are_between(start, inner.start)
            and not self._remarks.are_between(inner.end, end)
        )

    def _group(self, group: tree.Group) -> Doc:
        remark = self._remarks.before(_lead_end(group.value))
        inner = self.doc(group.value, is_below=True)
        last = self._remarks.before(group.span.end, group.value.span.end)
        return Group(("(", Nest((SOFT, remark, inner, last)), SOFT, ")"))

    def _type(self, node: tree.TypeExpr) -> Doc:
        mark = "?" if node.optional else ""
        end = node.span.end
        if node.name is None:
            return self._enclosed("{", node.fields, end, "}" + mark, SPACE)
        if not node.arguments:
            return f"{node.name}{mark}"
        return self._enclosed(f"{node.name}<", node.arguments, end, ">" + mark, comma=NOTHING)

    def _enclosed(
        self,
        opening: str,
        elements: Sequence[_Element | str],
        end: int,
        closing: str,
        edge: Line = SOFT,
        comma: Doc = _COMMA,
    ) -> Doc:
        """Elements in brackets that close at `end`: on one line, or on a line each."""
        if not elements:
            return opening + closing
        parts: list[Doc] = []
        after: int | None = None
        for element in elements:
            parts += [",", SPACE] if parts else [edge]
            if isinstance(element, str):
                parts.append(element)
                after = None
                continue
            parts += [self._remarks.before(_lead_end(element), after), self.doc(element)]
            after = element.span.end
        last = self._remarks.before(end, after)
        return Group((opening, Nest((*parts, comma, last)), edge, closing))
