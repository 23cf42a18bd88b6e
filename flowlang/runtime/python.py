"""Operators in Python: a user's functions, called in lanes of their own.

Layer 3. A function that raises fails its item, or its batch where it takes batches; its traceback
goes to the log and never to a client. What it gives is held against its declared type.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flowlang.diagnostics import EngineError, RequestError, StageFailed
from flowlang.plan import graph
from flowlang.plan.graph import Live
from flowlang.plan.physical import StagePlan
from flowlang.plan.signature import PythonFunction
from flowlang.plan.types import Type
from flowlang.runtime.conform import Conform, NotOfType, building, conforming
from flowlang.runtime.modules import Keeper
from flowlang.runtime.request import in_words

log = logging.getLogger("flowlang.python")

_loading = threading.RLock()
# By path, the folders that somebody keeps, as they were when they were last asked for.
_keepers: weakref.WeakValueDictionary[str, Keeper] = weakref.WeakValueDictionary()


def module_of(path: Path, kept: dict[str, Keeper]) -> ModuleType:
    """A file of operators, run. Raises EngineError where it cannot be.

    Its folder is that of `kept`, by path. One that is not among them is as it is now, shared with
    whoever else keeps it so, and kept from then on.
    """
    real = os.path.realpath(path)
    place = os.path.dirname(real)
    with _loading:
        if place not in kept:
            kept[place] = _keeper_of(place)
        folder = kept[place].folder
        if place not in sys.path:
            sys.path.append(place)  # for names that come as text: those in pickles, plugins
        try:
            return folder.module(real)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                raise
            log.error("`%s` cannot be imported", path.name, exc_info=error)
            reason = str(error).replace(f"{folder.name}.", "")
            raise EngineError(
                f"`{path.name}` cannot be imported: {type(error).__name__}: {reason}"
            ) from error


def _keeper_of(place: str) -> Keeper:
    keeper = _keepers.get(place)
    if keeper is None or not keeper.folder.is_current():
        keeper = _keepers[place] = Keeper(place)
    return keeper


class PythonInstance:
    """One lane that calls one function."""

    def __init__(self, plan: StagePlan, module: ModuleType) -> None:
        node = plan.nodes[0]
        self._wanted: PythonFunction = node.params[graph.FUNCTION]
        function = getattr(module, self._wanted.name, None)
        if not callable(function):
            file, name = self._wanted.path.name, self._wanted.name
            raise EngineError(f"`{file}` was run and has no function `{name}`")
        self._function: Callable[..., Any] = function
        self._build = self._building(self._wanted.takes, module)
        self._told = {n: self._building(kind, module) for n, kind in self._wanted.arguments}
        self._place = str(node.span)
        self._fields = {"stage": self._wanted.shown, "place": self._place}  # of a line in the log
        self._conform = conforming(self._wanted.gives)
        given = {n: v for n, v in node.params.items() if n in node.param_spans}
        self._live = {n: v.index for n, v in given.items() if isinstance(v, Live)}
        self._fixed = {n: v for n, v in given.items() if n not in self._live}

    def warm(self) -> None:
        """Nothing: what a made-up item would do in foreign code cannot be known."""

    def run(self, values: Sequence[Any]) -> list[Any]:
        items = [v[0] if self._live else v for v in values]
        given: list[Mapping[str, Any]] = [
            {**self._fixed, **{n: v[i] for n, i in self._live.items()}}
            if self._live
            else self._fixed
            for v in values
        ]
        if not self._wanted.is_batched:
            return [self._call(i, g) for i, g in zip(items, given, strict=True)]
        return self._call_batched(items, given)

    def close(self) -> None: ...

    def _building(self, kind: Type, module: ModuleType) -> Conform:
        return building(kind, vars(module), self._wanted.classes) or _same

    def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a call is told, its own as the item is."""
        return {name: self._told[name](_locked(value)) for name, value in given.items()}

    def _call(self, item: Any, given: Mapping[str, Any]) -> Any:
        item = _locked(item)
        try:
            item, told = self._build(item), self._arguments(given)
            if self._wanted.fields:
                return self._conform(
                    self._function(*(item[f] for f in self._wanted.fields), **told)
                )
            return self._conform(self._function(item, **told))
        except BaseException as error:  # `sys.exit()` too ends an item, and not a lane
            return self._failure(error)

    def _call_batched(self, items: list[Any], given: list[Mapping[str, Any]]) -> list[Any]:
        """Items told the same share a call; where it fails, they are tried one by one."""
        outcomes: list[Any] = [None] * len(items)
        groups: list[tuple[Mapping[str, Any], list[int]]] = []
        for index, each in enumerate(given):
            group = next((g for told, g in groups if _is_same(told, each)), None)
            if group is None:
                groups.append((each, [index]))
            else:
                group.append(index)
        for told, members in groups:
            results = self._try_batch([items[i] for i in members], told)
            for index, result in zip(members, results, strict=True):
                outcomes[index] = result
        return outcomes

    def _try_batch(self, given: list[Any], told: Mapping[str, Any]) -> list[Any]:
        items = [_locked(item) for item in given]
        try:
            items = [self._build(item) for item in items]
            results = list(self._batch(items, told))
            if len(results) != len(items):
                raise NotOfType(f"{len(items)} items gave {len(results)} results")
            return [self._conform(r) for r in results]
        except BaseException as error:
            if len(items) == 1:
                return [self._failure(error)]
        return [self._try_batch([item], told)[0] for item in given]

    def _batch(self, items: list[Any], told: Mapping[str, Any]) -> Any:
        fields = self._wanted.fields
        columns = [[item[f] for item in items] for f in fields] if fields else [items]
        return self._function(*columns, **self._arguments(told))

    def _failure(self, error: BaseException) -> RequestError:
        """What an item fails with. The function's own traceback is for the log."""
        shown = self._wanted.shown
        if isinstance(error, NotOfType):
            message = f"`{shown}` is declared to give {self._wanted.gives}, and {error}"
            log.error("%s (%s)", message, self._place, extra=self._fields)
            return StageFailed(message, stage=shown, place=self._place)
        if isinstance(error, RequestError):
            error.stage, error.place = error.stage or shown, error.place or self._place
            return error
        log.error("`%s` failed (%s)", shown, self._place, exc_info=error, extra=self._fields)
        message = f"`{shown}` failed: {in_words(error)}"
        if isinstance(error, ValueError) and "read-only" in str(error):
            message += " (arrays are shared between the branches of a flow: write to a copy of it)"
        return StageFailed(message, stage=shown, place=self._place)


def _same(value: Any) -> Any:
    return value


def _is_same(one: Any, other: Any) -> bool:
    """Whether two arguments are alike in value and type; arrays are where they are one array."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[n], other[n]) for n in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) in _PLAIN and one == other


_PLAIN = frozenset({int, float, str, bool, bytes})


def _locked(value: Any) -> Any:
    """An item whose arrays cannot be written to: other branches of the flow see the same ones.

    They are plain arrays, whatever flowlang knows of them. Its lists and records are the operator's
    own, to change as it likes.
    """
    if isinstance(value, dict):
        return {name: _locked(part) for name, part in value.items()}
    if isinstance(value, list):  # perhaps a long one, of numbers
        return [part if type(part) in _PLAIN else _locked(part) for part in value]
    if not hasattr(value, "setflags"):
        return value
    import numpy as np

    view = value.view(np.ndarray) if isinstance(value, np.ndarray) else value[...]
    view.setflags(write=False)
    return view
