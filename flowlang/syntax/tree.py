"""The syntax tree: one frozen class per construct of `grammar/flow.lark`, each with its Span.

Layer 1. Two trees are equal when they say the same; spans, comments and layout do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flowlang.diagnostics import Span


@dataclass(frozen=True, slots=True)
class Path:
    """`name` or `prefix.name`."""

    names: tuple[str, ...]
    span: Span = field(compare=False, repr=False)

    def __str__(self) -> str:
        return ".".join(self.names)


@dataclass(frozen=True, slots=True)
class Number:
    """`10`, `0.25`, `5ms`: the text of the number and its unit, empty where it has none."""

    digits: str
    unit: str
    span: Span = field(compare=False, repr=False)

    @property
    def is_int(self) -> bool:
        return not self.unit and self.digits.isdigit()


@dataclass(frozen=True, slots=True)
class String:
    """`"..."`: the decoded value, `{param}` interpolations left as written.

    A string that could not be decoded is kept, and `is_broken` spares it further complaints.
    """

    value: str
    span: Span = field(compare=False, repr=False)
    is_broken: bool = field(default=False, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Bool:
    value: bool
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Range:
    """`low..high` or `low..middle..high`, both ends included."""

    parts: tuple[Number, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ListOf:
    """`[a, b]`."""

    items: tuple[Expr, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Current:
    """`.a.b`: a field of the item arriving here."""

    fields: tuple[str, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument: `value` or `name=value`."""

    name: str | None
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Call:
    """`path(args)`; `args` is None for a bare name written without parentheses."""

    path: Path
    args: tuple[Arg, ...] | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Repeat:
    """`stage xN`."""

    stage: Expr
    count: int
    count_span: Span = field(compare=False, repr=False)
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class RecordField:
    """`name: value`, or `{name}` with value None; `...` is a field with name None."""

    name: str | None
    value: Expr | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """`{ a: x, b, ... }`."""

    fields: tuple[RecordField, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class If:
    """`if condition then stage else stage`; `is_match` where a `match` of conditions is meant."""

    condition: Expr
    then: Expr
    otherwise: Expr
    span: Span = field(compare=False, repr=False)
    is_match: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Arm:
    """`a | b => stage`; `else => stage` has no patterns."""

    patterns: tuple[Expr, ...]
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Match:
    """`match subject { arms }`; subject is None in `match { condition => ... }`."""

    subject: Expr | None
    arms: tuple[Arm, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Binary:
    """`left op right` for arithmetic, comparison, `and` and `or`."""

    operator: str
    left: Expr
    right: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Unary:
    """`-value` or `not value`."""

    operator: str
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Fallback:
    """`a ?? b ?? c`."""

    choices: tuple[Expr, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Ascribe:
    """`as type` between arrows."""

    type: TypeExpr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`a -> b -> c`: two steps or more (one step alone is that step)."""

    steps: tuple[Expr, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Group:
    """`( pipeline )`."""

    value: Expr
    span: Span = field(compare=False, repr=False)


Expr: TypeAlias = (
    Call
    | Number
    | String
    | Bool
    | Range
    | ListOf
    | Current
    | Repeat
    | Record
    | If
    | Match
    | Binary
    | Unary
    | Fallback
    | Ascribe
    | Pipeline
    | Group
)


def joined(operator: str, operands: Sequence[Expr]) -> Expr:
    """`a or b or c` as one expression. It is as shallow as can be, for there may be many."""
    if len(operands) == 1:
        return operands[0]
    middle = (len(operands) + 1) // 2
    left, right = joined(operator, operands[:middle]), joined(operator, operands[middle:])
    return Binary(operator, left, right, left.span.to(right.span))


@dataclass(frozen=True, slots=True)
class TypeField:
    name: str
    type: TypeExpr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TypeExpr:
    """`name<arguments>` or `{fields}`, optional with `?`. Shapes and integers are kept as text."""

    name: Path | None
    arguments: tuple[TypeExpr | str, ...]
    fields: tuple[TypeField, ...]
    optional: bool
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Use:
    path: String
    name: str
    name_span: Span = field(compare=False, repr=False)
    doc: str | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    type: TypeExpr | None
    default: Expr
    name_span: Span = field(compare=False, repr=False)
    doc: str | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TypeDef:
    name: str
    type: TypeExpr
    name_span: Span = field(compare=False, repr=False)
    doc: str | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Input:
    """A typed parameter of a flow: `k: int = 5`."""

    name: str
    type: TypeExpr
    default: Expr | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Let:
    name: str
    value: Expr
    name_span: Span = field(compare=False, repr=False)
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Body:
    """`{ let ... return ... }`."""

    lets: tuple[Let, ...]
    result: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Flow:
    """`export flow name(inputs): In -> Out = pipeline`, or with a body."""

    name: str
    inputs: tuple[Input, ...]
    signature: tuple[TypeExpr, TypeExpr] | None
    body: Expr | Body
    is_exported: bool
    name_span: Span = field(compare=False, repr=False)
    doc: str | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a schedule block: `net(batch=1..8) x4`."""

    path: Path
    args: tuple[Arg, ...] | None
    count: int | None
    count_span: Span | None = field(compare=False, repr=False)
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Schedule:
    name: str | None
    entries: tuple[Entry, ...]
    doc: str | None
    span: Span = field(compare=False, repr=False)


Item: TypeAlias = Use | Param | TypeDef | Flow | Schedule


@dataclass(frozen=True, slots=True)
class Comment:
    """A `#` comment, kept for the formatter. `is_own_line` tells it from one after code."""

    text: str
    is_own_line: bool
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Program:
    """A whole file: either `items`, or one bare `pipeline` (the flow `main`)."""

    edition: int | None
    items: tuple[Item, ...]
    pipeline: Expr | None
    span: Span = field(compare=False, repr=False)
    comments: tuple[Comment, ...] = field(default=(), compare=False, repr=False)
