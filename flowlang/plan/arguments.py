"""The arguments of a call, fitted to the operator's parameters and settings.

Layer 2. Every argument that does not fit gives its own diagnostic; what fits is kept, so that one
wrong argument hides no other.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.lines import read_lines
from flowlang.plan.ops import SIDES, Op, Param
from flowlang.plan.schedule import SETTINGS, Given, fit_setting
from flowlang.plan.types import (
    BOOL,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    ListOf,
    Type,
    Unknown,
    fits,
    unify,
)
from flowlang.plan.values import Constant, Refused, evaluate, nearest, refuse
from flowlang.syntax import tree

Report = Callable[[Diagnostic], None]


@dataclass(slots=True)
class Bound:
    """A call's arguments: algorithm parameters (defaults filled in), where they stand, settings.

    `live` has the expressions whose values each request brings, `bodies` those that are run on each
    element of a list.
    """

    params: dict[str, Any]
    spans: dict[str, Span] = field(default_factory=dict)
    settings: dict[str, Given] = field(default_factory=dict)
    live: dict[str, tree.Expr] = field(default_factory=dict)
    bodies: dict[str, tree.Expr] = field(default_factory=dict)
    is_whole: bool = True


class Names(Protocol):
    """What bare names among arguments can stand for."""

    @property
    def constants(self) -> Mapping[str, Constant]:
        """The params, and the arguments of the flow that are known before anything runs."""

    def is_live(self, expr: tree.Expr) -> bool:
        """Whether an expression needs the item or a value of the flow."""


# What others call a setting, and a parameter.
_FOREIGN_SETTINGS = {
    **dict.fromkeys(("max_batch_size", "max_batch", "preferred_batch_size"), "batch"),
    **dict.fromkeys(("max_queue_delay", "max_delay", "batching_timeout"), "wait"),
}
_FOREIGN = {
    **_FOREIGN_SETTINGS,
    **dict.fromkeys(("confidence", "conf_thres", "conf_threshold", "score", "min_score"), "conf"),
    **dict.fromkeys(("iou_thres", "iou_threshold", "nms", "nms_threshold"), "iou"),
    **dict.fromkeys(("classes", "labels", "class_names"), "names"),
    **dict.fromkeys(("max_det", "limit"), "max"),
    **dict.fromkeys(("sep", "delimiter"), "separator"),
    **dict.fromkeys(("angle", "deg"), "degrees"),
    "height": "h",
    "width": "w",
    "key": "by",
    "charset": "keys",
}
_COPIES = frozenset({"instances", "instance_num", "replicas", "copies", "workers", "num_workers"})


def setting_meant(arg: tree.Arg, of: object) -> str | None:
    """What an argument says that stands for a setting, where it says so in another way.

    `of` is what it is given to: `xN` stands behind that.
    """
    value = arg.value.span.text
    if arg.name is None and re.fullmatch("x[1-9][0-9]*", value):
        return f"behind the parentheses: {of}(...) {value}"
    if arg.name in _COPIES and value.isdigit():
        return f"behind the parentheses: {of}(...) x{value}"
    like = _FOREIGN_SETTINGS.get(arg.name or "")
    value = f"1..{value}" if like == "batch" and value.isdigit() else value
    return f"did you mean `{like}`?   {like}={value}" if like else None


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    like = nearest(word, known)
    return f"did you mean `{like}`?" if like else None


class Binder:
    """Binds the calls of one file; `folder` is where the files it names are looked for."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder = folder
        self.report = report

    def bind(self, call: tree.Call, op: Op, names: Names) -> Bound:
        bound = Bound({p.name: p.default for p in op.params})
        bare = () if op.kind == "python" else ("word", "flag")  # whose places are Python's
        free = [p for p in op.params if not p.is_named and p.kind not in bare]
        for arg in call.args or ():
            try:
                self._bind_one(call, op, arg, free, bound, names)
            except Refused as refused:
                bound.is_whole = False
                if refused.diagnostic:
                    self.report(refused.diagnostic)
        if bound.is_whole:
            self._check_whole(call, op, bound)
        return bound

    def _bind_one(
        self,
        call: tree.Call,
        op: Op,
        arg: tree.Arg,
        free: list[Param],
        bound: Bound,
        names: Names,
    ) -> None:
        if self._bind_expression(call, op, arg, free, bound, names):
            return
        if isinstance(arg.value, tree.Repeat):
            raise self._replica(call, op, arg.value)
        if arg.name is not None and op.param(arg.name) is None and arg.name not in op.settings:
            raise self._unknown_parameter(op, arg.name, arg)
        given = evaluate(arg.value, names.constants)
        if arg.name is not None:
            self._bind_named(call, op, arg, given, bound)
            return
        if given.kind == "word":
            param = op.param_of_word(given.value)
            if param is None:
                raise self._unknown_word(op, arg, given, names)
            value: Any = True if param.kind == "flag" else given.value
        else:
            places = [p for p in free if p.kind != "value" or op.kind == "python"]
            if not places:
                raise self._too_many(call, op, given.span, bound)
            param = places[0]
            value = self.fit_param(op, param, given)
        if param in free:
            free.remove(param)
        self._put(op, param, value, arg.span, bound)

    def _bind_expression(
        self, call: tree.Call, op: Op, arg: tree.Arg, free: list[Param], bound: Bound, names: Names
    ) -> bool:
        """Take an argument that is no constant. False where it has to be one."""
        param = op.param(arg.name) if arg.name is not None else next(iter(free), None)
        if param is not None and param.is_body:
            if param in free:
                free.remove(param)
            bound.bodies[param.name] = arg.value
            self._put(op, param, None, arg.value.span, bound)
            return True
        if not names.is_live(arg.value) and not (op.kind == "python" and _is_record(arg.value)):
            return False
        if arg.name is None:
            if op.kind == "python" and not free:
                raise self._too_many(call, op, arg.value.span, bound)
            param = next((p for p in free if p.kind == "value" or p.is_live), None)
        if param is None or not (param.kind == "value" or param.is_live):
            if param is None and arg.name is not None:
                return False  # no such parameter, or a setting: complained about as such
            known = param or next(iter(free), None)
            name = f"`{known.name}` of `{op.name}`" if known else f"what `{op.name}` is told"
            raise refuse(
                "not-a-constant",
                f"{name} must be known before anything runs",
                arg.value.span,
                label="comes with each request",
            )
        if param in free:
            free.remove(param)
        bound.live[param.name] = arg.value
        self._put(op, param, None, arg.value.span, bound)
        return True

    def _too_many(self, call: tree.Call, op: Op, span: Span, bound: Bound) -> Refused:
        message = f"`{op.name}` has no place for this argument"
        first = bound.spans.get("size")
        help_text = None
        places = [a.value.span for a in call.args or () if a.name is None]
        named = [p.name for p in op.params if p.is_named and p.name not in bound.spans]
        if op.kind == "python" and named:
            message = f"`{op.name}` takes `{named[0]}` by name"
            help_text = f"{named[0]}={span.text}"
        elif op.name == "cut" and span.text.isdecimal():
            if places[0] != span:
                return Refused(None)  # told of the first
            message = "`cut` takes the height `h` of its pieces, or their width `w`"
            help_text = f"name the side: cut(w={span.text})"
        elif first and places[1:2] == [span] and span.text.isdecimal():
            sides = f"h={span.text}, w={first.text}"
            help_text = f"name the sides so they cannot be swapped: {op.name}({sides})"
        return refuse("too-many-arguments", message, span, help=help_text, note=_signature(op))

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
            return
        first = bound.settings.get(name)
        if first:
            message = f"`{name}` of `{op.name}` is given twice"
            label = Label(first.span, "first here")
            raise refuse("given-twice", message, given.span, secondary=(label,))
        bound.settings[name] = given_setting(name, given, arg)

    def _unknown_parameter(self, op: Op, name: str, arg: tree.Arg) -> Refused:
        span = Span(arg.span.source, arg.span.start, arg.span.start + len(name))
        known = [*(p.name for p in op.params), *op.settings]
        like = _FOREIGN[name] if _FOREIGN.get(name) in known else nearest(name, known)
        value = arg.value.span.text
        help_text = f"did you mean `{like}`?   {like}={value}" if like else None
        if like is None and name in SETTINGS:
            help_text = f"in a schedule block, on a flow: schedule {{ flow({name}={value}) }}"
        if arg.name in _COPIES or like in op.settings:
            help_text = setting_meant(arg, op.name) or help_text
        return refuse(
            "unknown-parameter",
            f"`{op.name}` has no parameter `{name}`",
            span,
            help=help_text,
            note=_signature(op),
        )

    def _unknown_word(self, op: Op, arg: tree.Arg, given: Constant, names: Names) -> Refused:
        help_text = did_you_mean(given.value, [*op.words, *(n for n in names.constants if n)])
        words = f"words of `{op.name}`: {' '.join(op.words)}" if op.words else _signature(op)
        param = op.param(given.value)
        if given.value == "in":
            help_text, words = None, "`in` is the item of a flow that has a body in braces"
        if op.kind in ("model", "image", "python"):
            help_text = setting_meant(arg, op.name) or help_text
        if param is not None:
            other = next((w for w in param.words if w != param.default), None)
            help_text = f"{param.name}={other}" if other else None
            words = words if other else f"`{param.name}` of `{op.name}` is {_wants(param)}"
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
        if param.kind == "file" and kind == "str":
            return find_text(given, self.folder)
        if param.kind == "model" and kind == "str":
            return find_file(given, self.folder)
        if param.kind == "flag" and kind == "bool":
            return value
        if param.kind == "word" and kind == "word" and value in param.words:
            return value
        if param.kind == "value" and op.kind == "python" and _is_of(given, param.type):
            return _listed(value)
        if param.kind == "numbers":
            numbers = value if kind == "list" else (value,) if kind in ("int", "float") else ()
            if len(numbers) in (1, 3) and all(type(n) in (int, float) for n in numbers):
                return tuple(float(n) for n in numbers)
        raise _wrong_kind(op, param, given)

    def _in_bounds(self, op: Op, param: Param, given: Constant) -> Any:
        low, high = param.low, param.high
        if (low is not None and given.value < low) or (high is not None and given.value > high):
            raise refuse(
                "out-of-range",
                f"`{param.name}` of `{op.name}` is between {low:g} and {high:g}",
                given.span,
            )
        return given.value

    def _check_whole(self, call: tree.Call, op: Op, bound: Bound) -> None:
        missing = [p for p in op.params if p.is_required and p.name not in bound.spans]
        for param in missing:
            bound.is_whole = False
            self.report(
                Diagnostic(
                    "missing-parameter",
                    f"`{op.name}` needs its `{param.name}`" + (param.doc and f": {param.doc}"),
                    Label(call.span),
                    note=_signature(op),
                )
            )
        if unused := _without_effect(op, bound):
            bound.is_whole = False
            self.report(_ignored(call, op, bound, *unused))
        elif all(op.param(s.name) for s in SIDES):
            self._check_sides(call, op, bound)
        if op.param("mean"):
            self._check_levels(call, op, bound)
        if op.name == "rotate" and bound.params["degrees"] not in (90, 180, 270, None):
            bound.is_whole = False
            problem = "`degrees` of `rotate` is 90, 180 or 270"
            self.report(Diagnostic("out-of-range", problem, Label(bound.spans["degrees"])))
        if op.name == "cut":
            self._check_cut(call, bound)

    def _check_cut(self, call: tree.Call, bound: Bound) -> None:
        """Pieces have one length, along one side, and each begins behind the one before."""
        sides = [n for n in ("h", "w") if n in bound.spans]
        if len(sides) != 1:
            slug = "conflicting-parameters" if sides else "missing-parameter"
            problem = "`cut` takes the height `h` of its pieces, or their width `w`"
            told = Diagnostic(slug, problem, Label(call.span), help="cut(w=512)", fix=call.span)
        elif bound.params["overlap"] >= bound.params[sides[0]]:
            problem = "pieces overlap by less than their length"
            told = Diagnostic("out-of-range", problem, Label(bound.spans["overlap"]))
        else:
            return
        bound.is_whole = False
        self.report(told)

    def _check_sides(self, call: tree.Call, op: Op, bound: Bound) -> None:
        """A size is one number, or `h` and `w`, as the way of fitting asks."""
        if "image" in bound.live or (op.name == "pad" and bound.params["multiple"]):
            return  # of a box, or as far as the next multiple
        sides = [bound.params[n] for n in ("h", "w") if n in bound.spans]
        fit = bound.params.get("fit", "stretch")
        slug, problem, size = "conflicting-parameters", None, max(sides, default=224)
        if "size" in bound.spans and sides:
            problem = f"`{op.name}` takes one number for both sides, or `h` and `w`"
            size = bound.params["size"]
        elif fit in ("shorter", "least") and sides:
            problem = f"`fit={fit}` takes one number, the length of the shorter side"
            size = min(sides)
        elif "size" not in bound.spans and not sides:
            slug, problem = "missing-parameter", f"`{op.name}` needs a size"
        elif fit in ("letterbox", "pad") and len(sides) == 1:
            slug, problem = "missing-parameter", f"`fit={fit}` needs both sides"
        if problem:
            bound.is_whole = False
            if slug == "missing-parameter" and {"multiple", "most"} & bound.spans.keys():
                bound.params["fit"] = "shorter"  # which leaves a side for them to decide
                bound.spans.setdefault("fit", call.span)
            mended = with_sides(op, bound.params, bound.spans, size, size)
            place = Label(call.span)
            self.report(Diagnostic(slug, problem, place, help=mended, fix=call.span))

    def _check_levels(self, call: tree.Call, op: Op, bound: Bound) -> None:
        """`mean` and `std` go together, and a preset stands for both."""
        given = [n for n in ("mean", "std") if n in bound.spans]
        preset = bound.params.get("preset")
        if op.param("preset") and (preset is not None) == bool(given):
            problem = "`normalize` takes either a word or both `mean` and `std`"
            mended, words = f"normalize({preset or 'imagenet'})", "imagenet unit signed"
            slug = "conflicting-parameters" if preset else "missing-parameter"
            note = f"words of `normalize`: {words}"
            told = Diagnostic(slug, problem, Label(call.span), help=mended, note=note)
            bound.is_whole = False
            self.report(replace(told, fix=call.span))
        elif len(given) == 1:
            missing = "std" if given == ["mean"] else "mean"
            problem = f"`{op.name}` takes `mean` and `std` together, and has no `{missing}`"
            bound.is_whole = False
            self.report(Diagnostic("missing-parameter", problem, Label(bound.spans[given[0]])))
        elif given and not all(bound.params["std"]):
            bound.is_whole = False
            self.report(
                Diagnostic(
                    "out-of-range", "`std` divides, so it is not 0", Label(bound.spans["std"])
                )
            )


def _without_effect(op: Op, bound: Bound) -> tuple[str, list[str]] | None:
    """Why some of the arguments would change nothing beside the others, and which; or None."""

    def given(*names: str) -> list[str]:
        return [n for n in names if n in bound.spans and bound.params[n] is not False]

    params = bound.params
    cases: list[tuple[list[str], str]] = []
    if op.name == "crop" and "image" in bound.live:
        cases = [(given("size", "h", "w"), "what is cut out of `{}` has the size of its box")]
    elif op.name == "crop":
        cases = [(given("upright"), "`upright` is for boxes and quads, and this cuts the centre")]
    elif op.name == "resize":
        is_filled = params["fit"] in ("letterbox", "pad")
        is_fixed = params["size"] is not None and params["fit"] not in ("shorter", "least")
        is_fixed |= {"h", "w"} <= bound.spans.keys()
        if is_fixed:
            why = "`{}` is for sides that the picture decides, and both are given here"
            cases.append((given("multiple", "most"), why))
        if not is_filled:
            why = (
                "`{}` is the level of what `fit=letterbox` and `fit=pad` add, and nothing is added"
            )
            cases.append((given("fill"), why))
    elif op.name == "boxes":
        head = params["head"]
        unused = ("iou", "names") if head == "db" else ("threshold", "unclip")
        cases = [(given(*unused), f"`{{}}` changes nothing of what `{head}` finds")]
    found = [(names, why) for names, why in cases if names]
    if not found:
        return None
    names, why = found[0]
    shown = bound.live["image"].span.text if "image" in bound.live else names[0]
    return why.format(shown), [n for names, _ in found for n in names]


def _ignored(call: tree.Call, op: Op, bound: Bound, why: str, names: list[str]) -> Diagnostic:
    """What is said of arguments that change nothing; its help is the call without them.

    Only `crop` can be left with none, and it needs a size.
    """
    places = [bound.spans[n] for n in names]
    kept = [
        arg.span.text
        for arg in call.args or ()
        if not any(arg.span.start <= p.start and p.end <= arg.span.end for p in places)
    ]
    mended = f"{call.path.span.text}({', '.join(kept or ['224'])})"
    if op.name == "crop" and "image" in bound.live:
        sides = [
            p.text if n == "size" else f"{n}={p.text}" for n, p in zip(names, places, strict=True)
        ]
        mended = f"{mended} -> resize({', '.join(sides)})"
    return Diagnostic("conflicting-parameters", why, Label(places[0]), help=mended, fix=call.span)


def find_file(given: Constant, folder: Path) -> Path:
    """A file named in the flow, looked for beside it. Raises Refused where there is none."""
    path = folder / str(given.value)
    if os.path.isfile(path):
        return path
    before, slash, name = str(given.value).rpartition("/")
    like = _file_like(name, _files_in(path.parent))
    note = "files are looked for in the folder of the flow"
    if not str(given.value).isprintable():
        note = "`\\` starts an escape in a string; folders are written with `/`"
    raise refuse(
        "missing-file",
        f"there is no file `{given.value}`",
        given.span,
        help=f'did you mean "{before}{slash}{like}"?' if like else None,
        note=note,
    )


def find_text(given: Constant, folder: Path) -> Path:
    """A word list named in the flow, which can be read. Raises Refused where it cannot."""
    path = find_file(given, folder)
    try:
        read_lines(path)
    except ValueError:
        message = f"`{given.value}` is not text in UTF-8"
        note = "names and characters stand in a text file, one a line; save it as UTF-8"
        raise refuse("not-text", message, given.span, note=note) from None
    except OSError as error:
        message = f"`{given.value}` cannot be read: {error.strerror}"
        raise refuse("missing-file", message, given.span) from None
    return path


def _wrong_kind(op: Op, param: Param, given: Constant) -> Refused:
    text, value = given.span.text, str(given.value)
    message = f"`{param.name}` of `{op.name}` is {_wants(param)}, and `{text}` is {given.noun}"
    if param.kind == given.kind == "word":
        message = f"`{value}` is no word for `{param.name}` of `{op.name}`"
    note = f"{param.name}: {' '.join(param.words)}" if param.words else None
    if note is None and given.kind == "word":
        note = f"there is no param named `{value}`"
    if value == "in":
        note = "`in` is the item of a flow that has a body in braces"
    is_quoted = given.kind == "str" and (
        value in param.words or (param.kind == "int" and value.isdecimal())
    )
    help_text = value if is_quoted else did_you_mean(value, param.words)
    if param.name == "size" and given.kind == "list" and [*map(type, given.value)] == [int, int]:
        h, w = given.value
        help_text = f"name the sides so they cannot be swapped: {op.name}(h={h}, w={w})"
    return refuse(
        "wrong-kind",
        message,
        given.span,
        help=help_text,
        note=note,
        fix=given.span if is_quoted else None,
    )


def given_setting(name: str, given: Constant, arg: tree.Arg) -> Given:
    """A setting as it is written in a call or a schedule. Raises Refused where it does not fit."""
    try:
        return Given(fit_setting(SETTINGS[name], given), given.span)
    except Refused as refused:
        told = refused.diagnostic
        if told and told.help and told.help.startswith(f"{name}="):
            raise Refused(replace(told, fix=arg.span)) from None
        raise


def with_sides(
    op: Op, params: Mapping[str, Any], given: Iterable[str], h: int | None, w: int | None
) -> str:
    """The call of a sizing operator with other sides, and the rest of its arguments kept."""
    sides = [str(h)] if h == w else [f"{n}={v}" for n, v in (("h", h), ("w", w)) if v]
    rest = [
        n if params[n] is True else f"{n}={params[n]}"
        for n in given
        if n not in ("size", "h", "w") and params[n] is not False
    ]
    return f"{op.name}({', '.join([*sides, *rest])})"


def _file_like(name: str, files: list[str]) -> str | None:
    """The file that a misspelt name means: one with its suffix, if there is any."""
    stem, dot, suffix = name.rpartition(".")
    ending = dot + suffix
    alike = [file.removesuffix(ending) for file in files if dot and file.endswith(ending)]
    if not alike:
        return nearest(name, files)
    like = nearest(stem, alike)
    return like + ending if like else None


def _files_in(folder: Path) -> list[str]:
    """Names of files that a misspelt one can be held against; of a huge folder the first ones."""
    try:
        with os.scandir(folder) as entries:
            return [e.name for e in itertools.islice(entries, 1000) if e.is_file()]
    except (OSError, ValueError):
        return []


def _is_of(given: Constant, wanted: Type) -> bool:
    """Whether an argument of a Python operator is of its type."""
    if given.kind not in ("int", "float", "str", "bool", "list", "percent"):
        return False
    kind = type_of(given.value)
    return isinstance(wanted, Unknown) or (kind is not None and fits(kind, wanted))


def type_of(value: Any) -> Type | None:
    """The type of what stands in the file, or None where a list is of several."""
    if not isinstance(value, tuple):
        return {bool: BOOL, int: INT, float: FLOAT, str: STR}.get(type(value))
    kinds = [type_of(part) for part in value]
    kind = kinds[0] if kinds else UNKNOWN
    for other in kinds[1:]:
        kind = unify(kind, other) if kind is not None and other is not None else None
    return ListOf(kind) if kind is not None else None


def _is_record(expr: tree.Expr) -> bool:
    """Whether an expression is a record, or a list of them: none is a constant."""
    if isinstance(expr, tree.Group):
        return _is_record(expr.value)
    if isinstance(expr, tree.ListOf):
        return any(map(_is_record, expr.items))
    return isinstance(expr, tree.Record)


def _listed(value: Any) -> Any:
    """A list as Python has it, and what is in it too."""
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def _wants(param: Param) -> str:
    """What a parameter takes, in words."""
    if not isinstance(param.type, Unknown) and param.kind == "value":
        return str(param.type)
    return {
        "int": "a whole number",
        "number": "a number",
        "str": "a string",
        "file": "the name of a file",
        "model": "the name of a file",
        "flag": "true or false",
        "word": "a word",
        "numbers": "a number, or a list of three",
        "value": "a value of the flow",
    }[param.kind]


def _signature(op: Op) -> str | None:
    """What an operator can be told, as the note under an unknown name."""
    fields = ", ".join(op.function.fields) if op.function is not None else ""
    algorithm = " ".join(p.name for p in op.params)
    settings = " ".join(op.settings)
    parts = [f"item: {{ {fields} }}"] if fields else []
    parts += [f"algorithm: {algorithm}"] if algorithm else []
    parts += [f"schedule: {settings}"] if settings else []
    return "   ".join(parts) or f"`{op.name}` takes no arguments"
