"""The arguments of a call, fitted to the operator's parameters and settings.

Layer 2. Every argument that does not fit gives its own diagnostic; what fits is kept, so that one
wrong argument hides no other.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.ops import SIDES, Op, Param
from flowlang.plan.schedule import SETTINGS, Given, fit_setting
from flowlang.plan.values import Constant, Refused, evaluate, refuse
from flowlang.syntax import tree

Report = Callable[[Diagnostic], None]


@dataclass(slots=True)
class Bound:
    """A call's arguments: algorithm parameters (defaults filled in), where they stand, settings."""

    params: dict[str, Any]
    spans: dict[str, Span] = field(default_factory=dict)
    settings: dict[str, Given] = field(default_factory=dict)
    is_whole: bool = True


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like a misspelt one, if one is like it."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    like = nearest(word, known)
    return f"did you mean `{like}`?" if like else None


class Binder:
    """Binds calls; `names` are the params in scope and `folder` is where files are looked for."""

    def __init__(self, names: Mapping[str, Constant], folder: Path, report: Report) -> None:
        self.names = names
        self.folder = folder
        self.report = report

    def bind(self, call: tree.Call, op: Op) -> Bound:
        bound = Bound({p.name: p.default for p in op.params})
        free = [p for p in op.params if not p.is_named and p.kind not in ("word", "flag")]
        for arg in call.args or ():
            try:
                self._bind_one(call, op, arg, free, bound)
            except Refused as refused:
                bound.is_whole = False
                self.report(refused.diagnostic)
        if bound.is_whole:
            self._check_whole(call, op, bound)
        return bound

    def _bind_one(
        self, call: tree.Call, op: Op, arg: tree.Arg, free: list[Param], bound: Bound
    ) -> None:
        if isinstance(arg.value, tree.Repeat):
            raise self._replica(call, op, arg.value)
        given = evaluate(arg.value, self.names)
        if arg.name is not None:
            self._bind_named(call, op, arg, given, bound)
            return
        if given.kind == "word":
            param = op.param_of_word(given.value)
            if param is None:
                raise self._unknown_word(op, given)
            value: Any = True if param.kind == "flag" else given.value
        else:
            if not free:
                raise refuse(
                    "too-many-arguments",
                    f"`{op.name}` has no place for this argument",
                    given.span,
                    note=_signature(op),
                )
            param = free[0]
            value = self.fit_param(op, param, given)
        if param in free:
            free.remove(param)
        self._put(op, param, value, arg.span, bound)

    def _put(self, op: Op, param: Param, value: Any, span: Span, bound: Bound) -> None:
        if param.name in bound.spans:
            raise refuse(
                "given-twice",
                f"`{param.name}` of `{op.name}` is given twice",
                span,
                secondary=(Label(bound.spans[param.name], "first here"),),
            )
        bound.params[param.name] = value
        bound.spans[param.name] = span

    def _bind_named(
        self, call: tree.Call, op: Op, arg: tree.Arg, given: Constant, bound: Bound
    ) -> None:
        name = arg.name or ""
        param = op.param(name)
        if param is not None:
            self._put(op, param, self.fit_param(op, param, given), given.span, bound)
        elif name in op.settings:
            if name in bound.settings:
                raise refuse("given-twice", f"`{name}` of `{op.name}` is given twice", arg.span)
            bound.settings[name] = Given(fit_setting(SETTINGS[name], given), given.span)
        else:
            raise self._unknown_parameter(op, name, arg)

    def _unknown_parameter(self, op: Op, name: str, arg: tree.Arg) -> Refused:
        span = Span(arg.span.source, arg.span.start, arg.span.start + len(name))
        like = nearest(name, [*(p.name for p in op.params), *op.settings])
        value = arg.value.span.text
        help_text = f"did you mean `{like}`?   {like}={value}" if like else None
        if like is None and name in SETTINGS:
            help_text = f"in a schedule block, on a flow: schedule {{ flow({name}={value}) }}"
        return refuse(
            "unknown-parameter",
            f"`{op.name}` has no parameter `{name}`",
            span,
            help=help_text,
            note=_signature(op),
        )

    def _unknown_word(self, op: Op, given: Constant) -> Refused:
        help_text = did_you_mean(given.value, [*op.words, *self.names])
        words = f"words of `{op.name}`: {' '.join(op.words)}" if op.words else None
        return refuse(
            "unknown-word",
            f"`{given.value}` is no word of `{op.name}` and no param in scope",
            given.span,
            help=help_text,
            note=words,
        )

    def _replica(self, call: tree.Call, op: Op, value: tree.Repeat) -> Refused:
        number = value.stage.span.text
        sided = op.param("h") is not None and number.isdigit()
        return refuse(
            "replica-of-value",
            f"`x{value.count}` copies a stage, but `{number}` is a number",
            value.count_span,
            help=f"name the sides so they cannot be swapped: {op.name}(h={value.count}, w={number})"
            if sided
            else None,
        )

    def fit_param(self, op: Op, param: Param, given: Constant) -> Any:
        """The value of a parameter from a constant. Raises Refused where it does not fit."""
        value, kind = given.value, given.kind
        if param.kind == "int" and kind == "int":
            return self._in_bounds(op, param, given)
        if param.kind == "number" and kind in ("int", "float", "percent"):
            return self._in_bounds(op, param, given)
        if param.kind == "str" and kind == "str":
            return value
        if param.kind in ("file", "model") and kind == "str":
            return self.file(given)
        if param.kind == "flag" and kind == "bool":
            return value
        if param.kind == "word" and kind == "word" and value in param.words:
            return value
        if param.kind == "numbers":
            numbers = value if kind == "list" else (value,) if kind in ("int", "float") else ()
            if len(numbers) in (1, 3) and all(type(n) in (int, float) for n in numbers):
                return tuple(float(n) for n in numbers)
        raise refuse(
            "wrong-kind",
            f"`{param.name}` of `{op.name}` is {_wants(param)}, and this is {given.noun}"
            if not (param.kind == "word" and kind == "word")
            else f"`{value}` is no word for `{param.name}` of `{op.name}`",
            given.span,
            help=did_you_mean(str(value), param.words) if param.words else None,
            note=f"{param.name}: {' '.join(param.words)}" if param.words else None,
        )

    def _in_bounds(self, op: Op, param: Param, given: Constant) -> Any:
        low, high = param.low, param.high
        if (low is not None and given.value < low) or (high is not None and given.value > high):
            raise refuse(
                "out-of-range",
                f"`{param.name}` of `{op.name}` is between {low:g} and {high:g}",
                given.span,
            )
        return given.value

    def file(self, given: Constant) -> Path:
        """A file named in the flow, looked for beside it. Raises Refused where there is none."""
        path = self.folder / str(given.value)
        if path.is_file():
            return path
        folder = path.parent
        like = None
        if folder.is_dir():
            like = nearest(path.name, [p.name for p in folder.iterdir() if p.is_file()])
        text = str(given.value)
        shown = text[: len(text) - len(path.name)] + like if like else None
        raise refuse(
            "missing-file",
            f"there is no file `{given.value}`",
            given.span,
            help=f'did you mean "{shown}"?' if shown else None,
            note="files are looked for in the folder of the flow",
        )

    def _check_whole(self, call: tree.Call, op: Op, bound: Bound) -> None:
        missing = [p for p in op.params if p.is_required and p.name not in bound.spans]
        for param in missing:
            bound.is_whole = False
            self.report(
                Diagnostic(
                    "missing-parameter",
                    f"`{op.name}` needs its `{param.name}`: {param.doc}",
                    Label(call.span),
                    note=_signature(op),
                )
            )
        if all(op.param(s.name) for s in SIDES):
            self._check_sides(call, op, bound)
        if op.name == "normalize":
            self._check_levels(call, bound)

    def _check_sides(self, call: tree.Call, op: Op, bound: Bound) -> None:
        named = [n for n in ("h", "w") if n in bound.spans]
        problem = None
        if "size" in bound.spans and named:
            problem = f"`{op.name}` takes both sides at once, or `h` and `w`, and this gives both"
        elif "size" not in bound.spans and not named:
            problem = f"`{op.name}` needs a size"
        elif bound.params.get("fit", "stretch") == "shorter" and named:
            problem = "`fit=shorter` takes one number, the length of the shorter side"
        elif bound.params.get("fit", "stretch") in ("letterbox", "pad") and len(named) == 1:
            problem = f"`fit={bound.params['fit']}` needs both sides"
        if problem:
            bound.is_whole = False
            self.report(
                Diagnostic("missing-parameter", problem, Label(call.span), help=f"{op.name}(224)")
            )

    def _check_levels(self, call: tree.Call, bound: Bound) -> None:
        has_preset = bound.params["preset"] is not None
        levels = [n for n in ("mean", "std") if n in bound.spans]
        if has_preset == bool(levels) or len(levels) == 1:
            bound.is_whole = False
            self.report(
                Diagnostic(
                    "missing-parameter",
                    "`normalize` takes either a word or both `mean` and `std`",
                    Label(call.span),
                    help="normalize(imagenet)",
                    note="words of `normalize`: imagenet unit signed",
                )
            )
        elif levels and not all(bound.params["std"]):
            bound.is_whole = False
            self.report(
                Diagnostic(
                    "out-of-range", "`std` divides, so it is not 0", Label(bound.spans["std"])
                )
            )


def _wants(param: Param) -> str:
    return {
        "int": "a whole number",
        "number": "a number",
        "str": "a string",
        "file": "the name of a file",
        "model": "the name of a file",
        "flag": "true or false",
        "word": "a word",
        "numbers": "a number, or a list of three",
    }[param.kind]


def _signature(op: Op) -> str | None:
    """What an operator can be told, as the note under an unknown name."""
    algorithm = " ".join(p.name for p in op.params)
    settings = " ".join(op.settings)
    parts = [f"algorithm: {algorithm}"] if algorithm else []
    parts += [f"schedule: {settings}"] if settings else []
    return "   ".join(parts) or f"`{op.name}` takes no arguments"
