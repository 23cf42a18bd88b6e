"""How far the flows of a file reach once unrolled, found out before anything is unrolled.

Layer 2. Flows are inlined where they are mentioned, so one that mentions itself would never end,
and a few lines can stand for more stages than any memory holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.arguments import Report
from flowlang.plan.module import Declared
from flowlang.plan.ops import OPS
from flowlang.syntax import tree

MAX_NESTED = 128  # expressions in one another, through all mentions
MAX_UNROLLED = 20_000  # expressions of all flows together
MAX_CYCLES = 20  # reported


@dataclass(slots=True)
class _Own:
    """A flow's own text: its expressions, how deep they go, and the flows they mention."""

    size: int
    depth: int
    mentions: Counter[str]
    places: dict[str, Span]


class Extents:
    """What each flow mentions, and how large it is with everything it mentions."""

    def __init__(self, flows: Mapping[str, Declared], report: Report) -> None:
        self._flows = flows
        self._report = report
        self._own = {name: _own(declared) for name, declared in flows.items()}
        self._order, self._cycles = self._walk()
        self.mentioned = {m for own in self._own.values() for m in own.mentions}

    def end(self) -> bool:
        """Whether all flows end. Reports those that would run themselves."""
        for cycle, span in self._cycles:
            self._report(_recursive(cycle, span))
        return not self._cycles

    def can_unroll(self, roots: Sequence[str]) -> bool:
        """Whether flows that end are of a size that can be unrolled. Reports why not."""
        depths: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for name in self._order:
            own = self._own[name]
            depths[name] = own.depth + max((depths[m] for m in own.mentions), default=0)
            sizes[name] = own.size + sum(n * sizes[m] for m, n in own.mentions.items())
            if depths[name] > MAX_NESTED:
                self._refuse("too-deep", name, f"nested more than {MAX_NESTED} deep")
                return False
        total = 0
        for name in roots:
            total += sizes[name]
            if total > MAX_UNROLLED:
                self._refuse("too-large", name, f"more than {MAX_UNROLLED} parts")
                return False
        return True

    def _refuse(self, slug: str, name: str, what: str) -> None:
        message = f"with all that it mentions, `{name}` is {what}"
        note = "flows are unrolled at compile time, each mention again"
        place = Label(self._flows[name].flow.name_span)
        self._report(Diagnostic(slug, message, place, note=note))

    def _walk(self) -> tuple[list[str], list[tuple[list[str], Span]]]:
        """The flows, those mentioned before those that mention them; and every way in a circle."""
        order: list[str] = []
        cycles: list[tuple[list[str], Span]] = []
        done: set[str] = set()
        for start in self._own:
            if start in done:
                continue
            path: dict[str, Iterator[tuple[str, Span]]] = {
                start: iter(self._own[start].places.items())
            }
            while path:
                at = next(reversed(path))
                name, span = next(path[at], (None, None))
                if name is None or span is None:
                    done.add(at)
                    order.append(at)
                    path.popitem()
                elif name in path and len(cycles) < MAX_CYCLES:
                    names = list(path)
                    cycles.append(([*names[names.index(name) :], name], span))
                elif name not in path and name not in done:
                    path[name] = iter(self._own[name].places.items())
        return order, cycles


def _recursive(cycle: list[str], span: Span) -> Diagnostic:
    shown = cycle if len(cycle) < 10 else [*cycle[:5], "...", *cycle[-3:]]
    return Diagnostic(
        "recursive-flow",
        f"`{cycle[0]}` would run itself",
        Label(span, " -> ".join(shown)),
        note="flows are unrolled at compile time; repeat over a list with `map`",
    )


def _own(declared: Declared) -> _Own:
    flow = declared.flow
    own = _Own(0, 0, Counter(), {})
    for given in flow.inputs:
        if given.default is not None:  # which sees none of the flow's values
            _add(own, given.default, declared, set())
    hidden = {given.name for given in flow.inputs}
    body = flow.body
    for let in body.lets if isinstance(body, tree.Body) else ():
        _add(own, let.value, declared, hidden)
        hidden.add(let.name)
    _add(own, body.result if isinstance(body, tree.Body) else body, declared, hidden)
    return own


def _add(own: _Own, expr: tree.Expr, declared: Declared, hidden: set[str]) -> None:
    """Count an expression of a flow. Values that have `hidden` names take no arguments."""
    stack: list[tuple[object, int]] = [(expr, 1)]
    while stack:
        part, depth = stack.pop()
        own.size += 1
        own.depth = max(own.depth, depth)
        if isinstance(part, tree.Call):
            found = declared.module.declared(part.path.names)
            is_value = part.args is None and part.path.names[0] in hidden
            if found is not None and not is_value:
                own.mentions[found.name] += 1
                own.places.setdefault(found.name, part.path.span)
        if isinstance(part, tree.Match) and part.subject is None:
            # Each arm stands in the `else` of the one before.
            arms = [(v, n) for n, a in enumerate(part.arms) for v in (*a.patterns, a.value)]
            stack.extend((value, depth + 1 + number) for value, number in reversed(arms))
            continue
        inside = _stages_of(part) if isinstance(part, tree.Call) else children(part)
        stack.extend((child, depth + 1) for child in reversed(inside))


def _stages_of(call: tree.Call) -> list[object]:
    """The arguments of a call but for words of its operator: `imagenet` there is no flow."""
    op = OPS.get(str(call.path))
    if op is None:
        return children(call)
    free = [p for p in op.params if p.is_body and not p.is_named]
    found: list[object] = []
    for arg in call.args or ():
        param = op.param(arg.name) if arg.name is not None else next(iter(free), None)
        free = [p for p in free if p is not param]
        is_bare = isinstance(arg.value, tree.Call) and arg.value.args is None
        if not is_bare or (param is not None and param.is_body):
            found.append(arg.value)
    return found


def calls(expr: object) -> Iterator[tree.Call]:
    """Every call in an expression, in order of writing."""
    stack = [expr]
    while stack:
        part = stack.pop()
        if isinstance(part, tree.Call):
            yield part
        stack.extend(reversed(children(part)))


def children(expr: object) -> list[object]:
    """The expressions directly inside one."""
    match expr:
        case tree.Body(lets, result):
            return [*(let.value for let in lets), result]
        case tree.Pipeline(parts) | tree.Fallback(parts) | tree.ListOf(parts):
            return list(parts)
        case tree.Call(_, args):
            return [arg.value for arg in args or ()]
        case tree.Record(fields):
            return [field_value(field) for field in fields if field.name]
        case tree.Group(value) | tree.Unary(_, value) | tree.Repeat(value):
            return [value]
        case tree.If(condition, then, otherwise):
            return [condition, then, otherwise]
        case tree.Match(subject, arms):
            tests = [p for arm in arms for p in arm.patterns] if subject is None else [subject]
            return [*tests, *(arm.value for arm in arms)]
        case tree.Binary(_, left, right):
            return [left, right]
    return []


def field_value(field: tree.RecordField) -> tree.Expr:
    """What a record's field is made from: `{a}` is `{a: a}`."""
    return field.value or tree.Call(tree.Path((field.name or "",), field.span), None, field.span)


def ungrouped(expr: tree.Expr) -> tree.Expr:
    """An expression without the parentheses around it."""
    while isinstance(expr, tree.Group):
        expr = expr.value
    return expr
