"""Operators in Python: a user's functions, called in lanes of their own.

Layer 3. A function that raises fails its item, or its batch where it takes batches; its traceback
goes to the log and never to a client. What it gives is held against its declared type.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flowlang.diagnostics import EngineError, RequestError, StageFailed
from flowlang.plan.graph import Live
from flowlang.plan.physical import StagePlan
from flowlang.plan.signature import PythonFunction
from flowlang.runtime.conform import NotOfType, conforming

log = logging.getLogger("flowlang.python")

_loading = threading.RLock()
_modules: dict[tuple[str, int], ModuleType] = {}  # by path and time of change: each is run once


def function_of(wanted: PythonFunction) -> Callable[..., Any]:
    """The function an operator is. Raises EngineError where its file cannot be run or lacks it."""
    with _loading:
        module = _module_of(wanted.path)
    function = getattr(module, wanted.name, None)
    if not callable(function):
        raise EngineError(f"`{wanted.path.name}` was run and has no function `{wanted.name}`")
    found: Callable[..., Any] = function
    return found


def _module_of(path: Path) -> ModuleType:
    key = (os.path.realpath(path), path.stat().st_mtime_ns)
    if key in _modules:
        return _modules[key]
    name = f"flowlang_{path.stem}_{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, key[0])
    if spec is None or spec.loader is None:
        raise EngineError(f"`{path.name}` cannot be imported")
    module = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(key[0])
    if folder not in sys.path:
        sys.path.append(folder)  # so that the file finds those beside it
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            raise
        log.error("`%s` cannot be imported", path.name, exc_info=error)
        raise EngineError(
            f"`{path.name}` cannot be imported: {type(error).__name__}: {error}"
        ) from error
    _modules[key] = module
    return module


class PythonInstance:
    """One lane that calls one function."""

    def __init__(self, plan: StagePlan, function: Callable[..., Any]) -> None:
        node = plan.nodes[0]
        self._wanted: PythonFunction = node.params["function"]
        self._function = function
        self._place = str(node.span)
        self._fields = {"stage": self._wanted.shown, "place": self._place}  # of a line in the log
        self._conform = conforming(self._wanted.gives)
        params = {n: v for n, v in node.params.items() if n != "function"}
        self._live = {n: v.index for n, v in params.items() if isinstance(v, Live)}
        given = {n for n in params if n in node.param_spans}
        self._fixed = {n: v for n, v in params.items() if n in given and n not in self._live}

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

    def _call(self, item: Any, given: Mapping[str, Any]) -> Any:
        item = _locked(item)
        try:
            if self._wanted.fields:
                return self._conform(
                    self._function(*(item[f] for f in self._wanted.fields), **given)
                )
            return self._conform(self._function(item, **given))
        except BaseException as error:  # `sys.exit()` too ends an item, and not a lane
            return self._failure(error)

    def _call_batched(self, items: list[Any], given: list[Mapping[str, Any]]) -> list[Any]:
        """Items told the same share a call; where it fails, they are tried one by one."""
        outcomes: list[Any] = [None] * len(items)
        groups: list[tuple[Mapping[str, Any], list[int]]] = []
        for index, each in enumerate(given):
            group = next((g for told, g in groups if told == each), None)
            if group is None:
                groups.append((each, [index]))
            else:
                group.append(index)
        for told, members in groups:
            results = self._try_batch([items[i] for i in members], told)
            for index, result in zip(members, results, strict=True):
                outcomes[index] = result
        return outcomes

    def _try_batch(self, items: list[Any], told: Mapping[str, Any]) -> list[Any]:
        items = [_locked(item) for item in items]
        try:
            results = list(self._batch(items, told))
            if len(results) != len(items):
                raise NotOfType(f"{len(items)} items gave {len(results)} results")
            return [self._conform(r) for r in results]
        except BaseException as error:
            if len(items) == 1:
                return [self._failure(error)]
        return [self._try_batch([item], told)[0] for item in items]

    def _batch(self, items: list[Any], told: Mapping[str, Any]) -> Any:
        fields = self._wanted.fields
        columns = [[item[f] for item in items] for f in fields] if fields else [items]
        return self._function(*columns, **told)

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
        message = f"`{shown}` failed: {type(error).__name__}: {error}"
        return StageFailed(message, stage=shown, place=self._place)


_PLAIN = frozenset({int, float, str, bool, bytes})


def _locked(value: Any) -> Any:
    """An item whose arrays cannot be written to: other branches of the flow see the same ones.

    Its lists and records are the operator's own, to change as it likes.
    """
    if isinstance(value, dict):
        return {name: _locked(part) for name, part in value.items()}
    if isinstance(value, list):  # perhaps a long one, of numbers
        return [part if type(part) in _PLAIN else _locked(part) for part in value]
    if not hasattr(value, "setflags"):
        return value
    view = value[...]
    view.setflags(write=False)
    return view
