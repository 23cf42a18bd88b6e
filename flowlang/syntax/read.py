"""lark's tree of a text to ours.

Layer 1. What the grammar lets through and the language does not (reserved words as names, an
edition nobody knows) is collected on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, Label, Source, Span
from flowlang.syntax import tree
from flowlang.syntax.scan import RESERVED, Outline

if TYPE_CHECKING:
    from lark import Token, Tree

MAX_DIGITS = 9  # of a number of copies
EDITION = 1

_BINARY = {"or_expr": "or", "and_expr": "and"}


def _doc_comments(found: Outline) -> dict[int, str]:
    """By number of the line after a run of `##` comments, their text."""
    docs: dict[int, str] = {}
    lines: list[str] = []
    last_line = -1
    for comment in found.comments:
        if not comment.is_own_line or not comment.text.startswith("##"):
            continue
        line = comment.span.line
        if lines and line != last_line + 1:
            docs[last_line + 1] = "\n".join(lines)
            lines = []
        lines.append(comment.text[2:].strip())
        last_line = line
    if lines:
        docs[last_line + 1] = "\n".join(lines)
    return docs


class Reader:
    """lark's tree of one text to ours; collects what the grammar lets through and we do not."""

    def __init__(self, source: Source, found: Outline) -> None:
        self.source = source
        self.diagnostics: list[Diagnostic] = []
        self.docs = _doc_comments(found)

    def is_head(self, end: int) -> bool:
        """Whether no more than comments and the edition stand before `end`."""
        blank = re.sub(r"#[^\n]*", lambda c: " " * len(c.group()), self.source.text[:end])
        code = blank.strip()
        if re.fullmatch(r"flowlang\s+[0-9]+", code):
            at = blank.index(code)
            self.edition(Span(self.source, at, at + len(code)))
            return True
        return not code

    # Places and names

    def span(self, node: Tree[Token] | Token) -> Span:
        where: Any = node if hasattr(node, "start_pos") else node.meta
        return Span(self.source, where.start_pos, where.end_pos)

    def name(self, token: Token, *, may_be_x: bool = True) -> str:
        """A declared name: reserved words are refused, and `x4` where it would read as a copy."""
        text, why = str(token), None
        if text in RESERVED:
            why = "is a word of the language, so it cannot be a name"
        elif not may_be_x and re.fullmatch(r"x[0-9]+", text):
            why = f"after a stage means {text[1:]} copies, so it cannot name a flow"
        if why is not None:
            span = self.span(token)
            message = f"`{text}` {why}"
            self.diagnostics.append(
                Diagnostic("reserved-word", message, Label(span), help=f"{text}_", fix=span)
            )
        return text

    # Files and declarations

    def program(self, node: Tree[Token], found: Outline) -> tree.Program:
        rest: list[Any] = list(node.children)
        edition: Any = rest.pop(0) if getattr(rest[0], "data", "") == "version" else None
        number = self.edition(self.span(edition)) if edition is not None else None
        span = Span(self.source, 0, len(self.source.text))
        first = rest[0]
        if getattr(first, "data", None) in _ITEMS:
            items = tuple(_ITEMS[str(c.data)](self, c) for c in rest)
            return tree.Program(number, items, None, span, found.comments)
        return tree.Program(number, (), self.expr(first), span, found.comments)

    def edition(self, span: Span) -> int:
        """The edition of `flowlang 1`; another one is refused."""
        number = re.sub(r"#[^\n]*", "", span.text).split()[-1].removeprefix("flowlang")
        if number.lstrip("0") != str(EDITION):
            self.diagnostics.append(
                Diagnostic(
                    "unknown-edition",
                    f"this flowlang knows edition {EDITION} of the language, not {number[:20]}",
                    Label(span),
                    help=f"flowlang {EDITION}",
                    fix=span,
                )
            )
        return EDITION

    def doc(self, node: Tree[Token]) -> str | None:
        """The `##` comments right above a declaration that starts its line."""
        span = self.span(node)
        line_start = self.source.text.rfind("\n", 0, span.start) + 1
        is_first = not self.source.text[line_start : span.start].strip()
        return self.docs.get(span.line) if is_first else None

    def use(self, node: Any) -> tree.Use:
        path, name = node.children
        return tree.Use(
            self.string(path), self.name(name), self.span(name), self.doc(node), self.span(node)
        )

    def param(self, node: Any) -> tree.Param:
        name, kind, default = node.children
        return tree.Param(
            self.name(name),
            self.type(kind) if kind is not None else None,
            self.expr(default),
            self.span(name),
            self.doc(node),
            self.span(node),
        )

    def type_def(self, node: Any) -> tree.TypeDef:
        name, kind = node.children
        return tree.TypeDef(
            self.name(name), self.type(kind), self.span(name), self.doc(node), self.span(node)
        )

    def flow(self, node: Any) -> tree.Flow:
        exported, name, inputs, given, gives, body = node.children
        return tree.Flow(
            self.name(name, may_be_x=False),
            tuple(self.input(i) for i in inputs.children if i) if inputs is not None else (),
            (self.type(given), self.type(gives)) if given is not None else None,
            self.body(body) if getattr(body, "data", "") == "body" else self.expr(body),
            exported is not None,
            self.span(name),
            self.doc(node),
            self.span(node),
        )

    def input(self, node: Any) -> tree.Input:
        name, kind, default = node.children
        value = self.expr(default) if default is not None else None
        return tree.Input(self.name(name), self.type(kind), value, self.span(node))

    def body(self, node: Any) -> tree.Body:
        *lets, result = node.children
        return tree.Body(
            tuple(
                tree.Let(
                    self.name(let.children[0]),
                    self.expr(let.children[1]),
                    self.span(let.children[0]),
                    self.span(let),
                )
                for let in lets
            ),
            self.expr(result),
            self.span(node),
        )

    def schedule(self, node: Any) -> tree.Schedule:
        name, *entries = node.children
        return tree.Schedule(
            self.name(name) if name is not None else None,
            tuple(self.entry(e) for e in entries),
            self.doc(node),
            self.span(node),
        )

    def entry(self, node: Any) -> tree.Entry:
        path, args, count = node.children
        return tree.Entry(
            self.path(path),
            self.args(args) if args is not None else None,
            self.copies(count) if count is not None else None,
            self.span(count) if count is not None else None,
            self.span(node),
        )

    # Expressions

    def expr(self, node: Any) -> tree.Expr:
        if not hasattr(node, "data"):
            return self.token(node)
        return _EXPRESSIONS[str(node.data)](self, node)

    def token(self, token: Token) -> tree.Expr:
        if token.type == "STRING":
            return self.string(token)
        text = str(token)
        digits = re.match(r"[0-9.]+([eE][+-]?[0-9]+)?", text)
        split = (
            digits.end() if digits and token.type != "QUANTITY" else len(text.rstrip("usmKiBMG%"))
        )
        return tree.Number(text[:split], text[split:], self.span(token))

    def string(self, token: Token) -> tree.String:
        text = str(token)
        try:
            value = json.loads(text, strict=False)
        except ValueError:
            self.diagnostics.append(
                Diagnostic(
                    "bad-escape",
                    "this string has an escape that does not exist",
                    Label(self.span(token)),
                    help='write a backslash as "\\\\"',
                )
            )
            return tree.String(text[1:-1], self.span(token), True)
        return tree.String(value, self.span(token))

    def path(self, node: Any) -> tree.Path:
        first, *fields = node.children
        return tree.Path((str(first), *(str(f)[1:] for f in fields)), self.span(node))

    def args(self, node: Any) -> tuple[tree.Arg, ...]:
        return tuple(
            tree.Arg(
                str(a.children[0]) if a.children[0] is not None else None,
                self.expr(a.children[1]),
                self.span(a),
            )
            for a in node.children
            if a is not None
        )

    def bare(self, node: Any) -> tree.Call:
        return tree.Call(self.stage_path(node), None, self.span(node))

    def stage_path(self, node: Any) -> tree.Path:
        path = self.path(node)
        if path.names[0] in RESERVED and path.names[0] != "in":
            self.diagnostics.append(
                Diagnostic(
                    "reserved-word",
                    f"`{path.names[0]}` is a word of the language, so no stage has this name",
                    Label(self.span(node.children[0])),
                )
            )
        return path

    def call(self, node: Any) -> tree.Call:
        path, args = node.children
        return tree.Call(self.stage_path(path), self.args(args), self.span(node))

    def repeat(self, node: Any) -> tree.Repeat:
        stage, count = node.children
        copies = self.copies(count)
        return tree.Repeat(self.expr(stage), copies, self.span(count), self.span(node))

    def copies(self, token: Token) -> int:
        """N of `xN`; more digits than any machine has instances are refused."""
        digits = str(token)[1:]
        if len(digits) > MAX_DIGITS:
            self.diagnostics.append(
                Diagnostic("out-of-range", "this is too large a number", Label(self.span(token)))
            )
            return 1
        return int(digits)

    def binary(self, node: Any) -> tree.Expr:
        """`a op b op c`, left to right; `and` and `or` give the same in whatever order."""
        word = _BINARY.get(str(node.data))
        if word is not None:
            return tree.joined(word, [self.expr(operand) for operand in node.children])
        first, *rest = node.children
        left = self.expr(first)
        for sign, right in zip(rest[::2], rest[1::2], strict=True):
            value = self.expr(right)
            left = tree.Binary(str(sign.children[0]), left, value, left.span.to(value.span))
        return left

    def unary(self, node: Any) -> tree.Unary:
        operator = "not" if node.data == "negate" else "-"
        return tree.Unary(operator, self.expr(node.children[0]), self.span(node))

    def cond(self, node: Any) -> tree.If:
        condition, then, otherwise = (self.expr(c) for c in node.children)
        return tree.If(condition, then, otherwise, self.span(node))

    def record(self, node: Any) -> tree.Record:
        fields = []
        for child in filter(None, node.children):
            if child.data == "spread":
                fields.append(tree.RecordField(None, None, self.span(child)))
                continue
            name, value = child.children
            fields.append(
                tree.RecordField(
                    self.name(name),
                    self.expr(value) if value is not None else None,
                    self.span(child),
                )
            )
        return tree.Record(tuple(fields), self.span(node))

    def match(self, node: Any) -> tree.Match:
        subject, *arms = node.children
        return tree.Match(
            self.subject(subject) if subject is not None else None,
            tuple(self.arm(a) for a in arms),
            self.span(node),
        )

    def subject(self, node: Any) -> tree.Expr:
        first = node.children[0]
        return self.bare(first) if hasattr(first, "data") else self.current(node)

    def arm(self, node: Any) -> tree.Arm:
        *patterns, value = node.children
        is_else = getattr(patterns[0], "type", "") == "ELSE"
        return tree.Arm(
            () if is_else else tuple(self.expr(p) for p in patterns),
            self.expr(value),
            self.span(node),
        )

    def current(self, node: Any) -> tree.Current:
        return tree.Current(tuple(str(f)[1:] for f in node.children), self.span(node))

    # Types

    def type(self, node: Any) -> tree.TypeExpr:
        optional = getattr(node.children[-1], "type", "") == "OPTIONAL"
        parts = [c for c in node.children if c is not None and hasattr(c, "data")]
        tokens = [c for c in node.children[:-1] if c is not None]
        named = [c for c in parts if c.data == "tname"]
        fields = tuple(
            tree.TypeField(str(f.children[0]), self.type(f.children[1]), self.span(f))
            for f in parts
            if f.data == "tfield"
        )
        arguments = tuple(
            self.type(c) if hasattr(c, "data") else str(c)
            for c in tokens
            if getattr(c, "type", "") in ("SHAPE", "INT", "OPTIONAL")
            or getattr(c, "data", "") == "type"
        )
        name = self.path(named[0]) if named else None
        return tree.TypeExpr(name, arguments, fields, optional, self.span(node))


_ITEMS: dict[str, Callable[[Reader, Any], tree.Item]] = {
    "use": Reader.use,
    "param": Reader.param,
    "type_def": Reader.type_def,
    "flow": Reader.flow,
    "schedule": Reader.schedule,
}

_EXPRESSIONS: dict[str, Callable[[Reader, Any], tree.Expr]] = {
    "pipeline": lambda r, n: tree.Pipeline(tuple(r.expr(c) for c in n.children), r.span(n)),
    "fallback": lambda r, n: tree.Fallback(tuple(r.expr(c) for c in n.children), r.span(n)),
    "ascribe": lambda r, n: tree.Ascribe(r.type(n.children[0]), r.span(n)),
    "or_expr": Reader.binary,
    "and_expr": Reader.binary,
    "compare": Reader.binary,
    "sum": Reader.binary,
    "product": Reader.binary,
    "negate": Reader.unary,
    "minus": Reader.unary,
    "repeat": Reader.repeat,
    "cond": Reader.cond,
    "path": Reader.bare,
    "call": Reader.call,
    "current": Reader.current,
    "list": lambda r, n: tree.ListOf(
        tuple(r.expr(c) for c in n.children if c is not None), r.span(n)
    ),
    "record": Reader.record,
    "match": Reader.match,
    "group": lambda r, n: tree.Group(r.expr(n.children[0]), r.span(n)),
    "true": lambda r, n: tree.Bool(True, r.span(n)),
    "false": lambda r, n: tree.Bool(False, r.span(n)),
    "range": lambda r, n: tree.Range(
        tuple(r.token(c) for c in n.children if c is not None),  # type: ignore[misc]
        r.span(n),
    ),
}
