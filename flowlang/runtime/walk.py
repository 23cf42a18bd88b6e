"""A request's way through the steps of its flow: what is there, what is missing, what comes next.

Layer 3. Pure logic, without locks, clocks or queues. A control node starts walks through the steps
of its bodies: `map` one for each element, `if` and `match` one, `??` one choice after the other.
What such a walk gives, or fails with, is an event for the walk that started it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flowlang.diagnostics import BadRequest, RequestError, StageFailed
from flowlang.plan import graph
from flowlang.plan.expression import compute, failure, function_of, is_plain
from flowlang.plan.physical import Steps, Unit
from flowlang.runtime.request import UNANSWERED, Request, strip
from flowlang.syntax.wording import one_line


class Track:
    """Steps made ready to be walked: which units wait for which slot."""

    def __init__(self, steps: Steps) -> None:
        self.units = steps.units
        self.slots = steps.slots
        self.result = steps.result
        self.captures = steps.captures
        self.bodies = [[Track(body) for body in unit.bodies] for unit in steps.units]
        self.plain = [_plain_body(unit) for unit in steps.units]
        self.consumers: list[list[int]] = [[] for _ in range(steps.slots)]
        for index, unit in enumerate(steps.units):
            for slot in set(unit.inputs):
                self.consumers[slot].append(index)
        self.missing = [len(set(u.inputs)) for u in steps.units]
        self.sourceless = [i for i, u in enumerate(steps.units) if not u.inputs]


def _plain_body(unit: Unit) -> Callable[..., Any] | None:
    """The body of a `map` as a function, where no element needs a stage."""
    body = unit.node.bodies[0] if unit.node.op == graph.MAP else None
    return function_of(body) if body is not None and is_plain(body) else None


class Gather:
    """The elements of a `map` on their way: results in order, and how many are still missing."""

    __slots__ = ("left", "results")

    def __init__(self, count: int) -> None:
        self.left = count
        self.results: list[Any] = [DROPPED] * count


class Dropped:
    """What stands for an element of a `map` that failed and is left out."""


DROPPED = Dropped()


class Walk:
    """One way through a track. `parent` and `unit` say which control node started it.

    `index` is the element of a `map`, or the choice of a `??`; `gather` is the map's.
    """

    __slots__ = (
        "gather", "index", "is_over", "missing", "parent", "request", "track", "unit", "values",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        track: Track,
        parent: Walk | None = None,
        unit: int = 0,
        index: int = 0,
        gather: Gather | None = None,
    ) -> None:
        self.request = request
        self.track = track
        self.parent = parent
        self.unit = unit
        self.index = index
        self.gather = gather
        self.values: list[Any] = [UNANSWERED] * track.slots
        self.missing = list(track.missing)
        self.is_over = False

    @property
    def is_given_up(self) -> bool:
        """Whether this walk, or one that waits for it, has ended."""
        walk: Walk | None = self
        while walk is not None:
            if walk.is_over:
                return True
            walk = walk.parent
        return False


class Work:
    """A stage's unit that can be worked on now, with the value it is given."""

    __slots__ = ("unit", "value", "walk")

    def __init__(self, walk: Walk, unit: int, value: Any) -> None:
        self.walk = walk
        self.unit = unit
        self.value = value


class Ended:
    """The end of a request: its result, or the error it failed with."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


def begin(request: Request, track: Track, values: Sequence[Any]) -> Iterator[Work | Ended]:
    """A request set on its way, with its item and its parameters."""
    return _go(_started(Walk(request, track), values))


def arrive(walk: Walk, unit: int, outcome: Any) -> Iterator[Work | Ended]:
    """The outcome of a stage's unit, which may be an error: what can be done now."""
    if isinstance(outcome, RequestError):
        return _go([(walk, -1, outcome)])
    return _go([(walk, walk.track.units[unit].output, outcome)])


_Arrivals = list[tuple[Walk, int, Any]]  # a walk's slot and its value; or slot -1 and an error


def _started(walk: Walk, values: Sequence[Any]) -> _Arrivals:
    """What arrives in a walk at its start, the last one first."""
    arrivals: _Arrivals = [(walk, slot, value) for slot, value in enumerate(values)]
    arrivals += [
        (walk, unit.output, compute(unit.node, ()))
        for unit in (walk.track.units[i] for i in walk.track.sourceless)
    ]
    arrivals.reverse()
    return arrivals


def _go(arrivals: _Arrivals) -> Iterator[Work | Ended]:
    """Let everything arrive, and all that follows from it without a stage."""
    while arrivals:
        walk, slot, value = arrivals.pop()
        if walk.is_given_up:
            continue
        if slot < 0:
            yield from _fail(walk, value, arrivals)
            continue
        walk.values[slot] = value
        track = walk.track
        if slot == track.result:
            yield from _give(walk, value, arrivals)
            continue
        for index in track.consumers[slot]:
            walk.missing[index] -= 1
            if walk.missing[index] == 0:
                unit = track.units[index]
                values = [walk.values[s] for s in unit.inputs]
                if unit.stage is not None:
                    yield Work(walk, index, values[0] if len(values) == 1 else tuple(values))
                else:
                    _take(walk, index, unit, values, arrivals)


def _take(walk: Walk, index: int, unit: Unit, values: list[Any], arrivals: _Arrivals) -> None:
    """A unit that needs no stage: glue is computed, a control node starts its bodies."""
    op = unit.node.op
    try:
        if op == graph.MAP:
            _scatter(walk, index, unit, values, arrivals)
        elif op == graph.ROUTE:
            params = unit.node.params
            chosen = params["cases"].get(values[1], params["otherwise"])
            _enter(walk, index, chosen, values[0], values, arrivals)
        elif op == graph.FALLBACK:
            _enter(walk, index, 0, values[0], values, arrivals)
        else:
            arrivals.append((walk, unit.output, compute(unit.node, values)))
    except RequestError as error:
        arrivals.append((walk, -1, strip(error)))
    except Exception as error:
        message = f"{_shown(unit)} failed: {failure(error)}"
        # An expression is known by its sign: no other name of it stands in the file.
        stage = str(unit.node.params.get("operator", op))
        place = str(unit.node.span)
        arrivals.append((walk, -1, StageFailed(message, stage=stage, place=place)))


def _shown(unit: Unit) -> str:
    text = one_line(unit.node.span)
    return f"`{text if len(text) <= 40 else f'{text[:37]}...'}`"


def _enter(
    walk: Walk, index: int, body: int, item: Any, values: Sequence[Any], arrivals: _Arrivals
) -> None:
    """Start one body of a unit."""
    child = Walk(walk.request, walk.track.bodies[index][body], walk, index, body)
    arrivals += _started(child, [item, *_captured(child.track, values)])


def _captured(track: Track, values: Sequence[Any]) -> list[Any]:
    return [values[source] for _, source in track.captures]


def _scatter(
    walk: Walk, index: int, unit: Unit, values: Sequence[Any], arrivals: _Arrivals
) -> None:
    """Start the body of a `map` for each element. Raises BadRequest where there are too many."""
    elements, most = values[0], unit.node.params["max"]
    if len(elements) > most:
        source = unit.node.inputs[0]
        of = f"`{source.params['name']}` is " if source.op == graph.FIELD else ""
        message = f"map failed: {of}a list of {len(elements):,} elements, and `max` is {most:,}"
        raise BadRequest(message, stage="map", place=str(unit.node.span))
    track = walk.track.bodies[index][0]
    captured = _captured(track, values)
    results = _computed(walk.track.plain[index], elements, captured)
    if results is not None or not elements:
        arrivals.append((walk, unit.output, results or []))
        return
    gather = Gather(len(elements))
    started: list[_Arrivals] = []
    for number, element in enumerate(elements):
        child = Walk(walk.request, track, walk, index, number, gather)
        started.append(_started(child, [element, *captured]))
    for each in reversed(started):
        arrivals += each


def _computed(
    plain: Callable[..., Any] | None, elements: Sequence[Any], captured: Sequence[Any]
) -> list[Any] | None:
    """What all elements give at once; None where they have to be walked, to see which one fails."""
    if plain is None:
        return None
    try:
        return [plain(element, *captured) for element in elements]
    except Exception:
        return None


def _give(walk: Walk, value: Any, arrivals: _Arrivals) -> Iterator[Work | Ended]:
    """A walk has its result: hand it to whoever waits for it."""
    walk.is_over = True
    parent = walk.parent
    if parent is None:
        yield Ended(value)
        return
    unit = parent.track.units[walk.unit]
    if walk.gather is not None:
        _collect(walk, walk.gather, value, arrivals)
    elif unit.node.op == graph.FALLBACK and value is None and unit.node.params["skips_null"]:
        if not _next_choice(walk, parent, arrivals):
            arrivals.append((parent, unit.output, None))
    else:
        arrivals.append((parent, unit.output, value))


def _collect(walk: Walk, gather: Gather, value: Any, arrivals: _Arrivals) -> None:
    """One element of a `map` is done."""
    parent = walk.parent
    if parent is None:
        return
    gather.results[walk.index] = value
    gather.left -= 1
    if gather.left == 0:
        results = [r for r in gather.results if r is not DROPPED]
        arrivals.append((parent, parent.track.units[walk.unit].output, results))


def _next_choice(walk: Walk, parent: Walk, arrivals: _Arrivals) -> bool:
    """Start the choice of a `??` behind one that gave nothing. False if it was the last."""
    following = walk.index + 1
    if following >= len(parent.track.bodies[walk.unit]):
        return False
    values = [parent.values[s] for s in parent.track.units[walk.unit].inputs]
    _enter(parent, walk.unit, following, values[0], values, arrivals)
    return True


def _fail(walk: Walk, error: RequestError, arrivals: _Arrivals) -> Iterator[Work | Ended]:
    """A walk has failed: whoever can go on without it does, else the request ends with it."""
    walk.is_over = True
    while (parent := walk.parent) is not None:
        node = parent.track.units[walk.unit].node
        if node.op == graph.FALLBACK and _next_choice(walk, parent, arrivals):
            return
        if walk.gather is not None and node.params["on_error"] != "fail":
            value = None if node.params["on_error"] == "null" else DROPPED
            _collect(walk, walk.gather, value, arrivals)
            return
        walk = parent
        walk.is_over = True
    yield Ended(error)
