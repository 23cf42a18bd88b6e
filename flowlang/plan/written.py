"""Types as they are written in a file, made into types.

Layer 2. What is wrong in one is reported at its place, and it counts as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from flowlang.diagnostics import Diagnostic, Label, Span
from flowlang.plan.arguments import Report
from flowlang.plan.module import Module, PythonFile
from flowlang.plan.types import (
    COLOURS,
    DTYPES,
    NAMED,
    UNKNOWN,
    Image,
    ListOf,
    Record,
    Shape,
    Tensor,
    Type,
    optional,
    why_vast,
)
from flowlang.plan.values import nearest
from flowlang.syntax import tree

BUILT_IN = frozenset({*NAMED, "image", "tensor", "list"})
MAX_NESTED = 64
_VAST = {
    "too-large": "this type has too many parts",
    "too-deep": f"this type is nested more than {MAX_NESTED} deep",
}
# What a word says of an image, of which there is one.
_SAID_OF_IMAGES = {
    **dict.fromkeys((*COLOURS, "undecided"), "colour"),
    **dict.fromkeys(("u8", "f32"), "kind of level"),
}
MAX_DIGITS = 12  # of a side


def _dtype_like(word: str) -> str | None:
    """The dtype that is meant by a word, as numpy and others write it; the word itself if one."""
    named = {"float": "f32", "half": "f16", "double": "f64"}.get(word)
    long = re.fullmatch(r"(float|int|uint)([0-9]+)", word)
    meant = named or (f"{long.group(1)[0]}{long.group(2)}" if long else word)
    return meant if meant in DTYPES else None


class WrittenTypes:
    """The types a file declares, and all those it writes."""

    def __init__(self, module: Module, report: Report) -> None:
        self._module = module
        self._report = report
        self._declared: dict[str, tree.TypeDef] = {}
        self._resolved: dict[str, Type] = {}
        self._resolving: list[str] = []
        self._depth = 0

    def declare(self, item: tree.TypeDef) -> None:
        if item.name in BUILT_IN:
            message = f"`{item.name}` is a type of the language, so it cannot be declared"
            self._error(
                "reserved-word", message, item.name_span, help=f"{item.name}_", fix=item.name_span
            )
            return
        self._declared[item.name] = item

    def resolve_all(self) -> None:
        for item in self._declared.values():
            self._named(item.name, item.name_span)

    def resolve(self, given: tree.TypeExpr) -> Type:
        """The type that is written."""
        if self._depth >= MAX_NESTED:
            self._error("too-deep", _VAST["too-deep"], given.span)
            return UNKNOWN
        self._depth += 1
        kind = self._resolve(given)
        self._depth -= 1
        if slug := why_vast(kind):
            self._error(slug, _VAST[slug], given.span)
            return UNKNOWN
        return optional(kind) if given.optional else kind

    def _error(
        self,
        slug: str,
        message: str,
        span: Span,
        help: str | None = None,  # noqa: A002 - the Diagnostic's own word
        note: str | None = None,
        fix: Span | None = None,
    ) -> None:
        self._report(Diagnostic(slug, message, Label(span), help=help, note=note, fix=fix))

    def _resolve(self, given: tree.TypeExpr) -> Type:
        if given.name is None:
            return self._record(given)
        name = str(given.name)
        if name in self._declared and not given.arguments:
            return self._named(name, given.span)
        if len(given.name.names) > 1 and not given.arguments:
            return self._elsewhere(given)
        if name == "list":
            return self._list(given)
        if name == "image":
            return self._image(given)
        if name == "tensor":
            return self._tensor(given)
        if name in NAMED and not given.arguments:
            return NAMED[name]
        if name not in self._module.lost:
            self._unknown(given, {*BUILT_IN, *self._declared} - {name})
        return UNKNOWN

    def _unknown(self, given: tree.TypeExpr, known: Iterable[str]) -> None:
        """`known` are the types of the file that it is looked for in."""
        file, dot, name = str(given.name).rpartition(".")
        names = sorted(known)
        near = nearest(name, names)
        self._error(
            "unknown-type",
            f"there is no type `{given.name}`",
            given.name.span if given.name is not None else given.span,
            help=f"did you mean `{file}{dot}{near}`?" if near else None,
            note=f"types are {', '.join(names)}" if names and near is None else None,
        )

    def _elsewhere(self, given: tree.TypeExpr) -> Type:
        """A type of a file that is used. A Python operator's name is the type it gives."""
        names = given.name.names if given.name else ("",)
        *files, name = names
        used: Module | PythonFile | None = self._module
        for file in files:
            used = used.uses.get(file) if isinstance(used, Module) else None
        if isinstance(used, PythonFile):
            if name in used.types:
                return used.types[name]
            if name in used.problems:
                self._report(used.problems[name])
                return UNKNOWN
            self._unknown(given, used.types)
        elif isinstance(used, Module):
            declared = used.types.declared(name)
            if declared is not None:
                return declared
            self._unknown(given, used.types.names())
        elif not self._module.is_lost(names):
            self._unknown(given, ())
        return UNKNOWN

    def declared(self, name: str) -> Type | None:
        """A type that this file declares, or None."""
        item = self._declared.get(name)
        return self._named(name, item.name_span) if item is not None else None

    def names(self) -> list[str]:
        """The types that this file declares."""
        return list(self._declared)

    def _record(self, given: tree.TypeExpr) -> Type:
        fields: dict[str, Type] = {}
        for field in given.fields:
            if field.name in fields:
                message = f"this record has two fields named `{field.name}`"
                self._error("duplicate-name", message, field.span)
            fields[field.name] = self.resolve(field.type)
        return Record(tuple(fields.items()))

    def _named(self, name: str, span: Span) -> Type:
        if name in self._resolved:
            return self._resolved[name]
        if name in self._resolving:
            self._error("recursive-type", f"the type `{name}` would hold itself", span)
            return UNKNOWN
        self._resolving.append(name)
        kind = self.resolve(self._declared[name].type)
        self._resolving.pop()
        self._resolved[name] = replace(kind, name=name) if isinstance(kind, Record) else kind
        return self._resolved[name]

    def _list(self, given: tree.TypeExpr) -> Type:
        inner = given.arguments[0] if len(given.arguments) == 1 else None
        if isinstance(inner, tree.TypeExpr):
            return ListOf(self.resolve(inner))
        message = "a list has the type of its items"
        self._error("unknown-type", message, given.span, help="list<label>")
        return UNKNOWN

    def _image(self, given: tree.TypeExpr) -> Type:
        image = Image()
        said: dict[str, str] = {}
        for part in given.arguments:
            word = part if isinstance(part, str) else str(part.name)
            shape = self._shape(part, given) if isinstance(part, str) else None
            what = _SAID_OF_IMAGES.get(word, "size" if shape is not None else word)
            if said.setdefault(what, word) != word:
                message = f"an image has one {what}, and this says `{said[what]}` and `{word}`"
                self._error("unknown-type", message, given.span)
            if word in COLOURS:
                image = Image(word, image.dtype, image.height, image.width)
            elif word in ("u8", "f32"):
                image = Image(image.colour, word, image.height, image.width)
            elif shape is not None and len(shape) == 2:
                image = Image(image.colour, image.dtype, *shape)
            elif word not in ("hwc", "undecided"):
                meant = word.lower() if word.lower() in _SAID_OF_IMAGES else _dtype_like(word)
                is_told = meant in _SAID_OF_IMAGES and given.span.text.count(word) == 1
                mended = given.span.text.replace(word, meant or word)
                self._error(
                    "unknown-type",
                    f"`{word}` says nothing about an image",
                    given.span,
                    help=mended if is_told else "image<rgb, u8, hwc>",
                    fix=given.span if is_told else None,
                    note="a colour (rgb, bgr, gray), levels (u8, f32), a height x width",
                )
        return image

    def _tensor(self, given: tree.TypeExpr) -> Type:
        dtype, *rest = given.arguments or ("",)
        word = dtype if isinstance(dtype, str) else str(dtype.name)
        if word not in DTYPES or len(rest) > 1 or (rest and not isinstance(rest[0], str)):
            meant = _dtype_like(word)
            sides = [side for side in rest if isinstance(side, str)]
            is_told = meant is not None and len(sides) == len(rest)
            shape_text = f", {'x'.join(sides)}" if sides else ""
            message = "a tensor has a dtype and a shape"
            if meant not in (None, word):
                message = f"there is no dtype `{word}`"
            elif is_told and len(rest) > 1:
                message = "the sides of a tensor have an `x` between them"
            self._error(
                "unknown-type",
                message,
                given.span,
                help=f"tensor<{meant}{shape_text}>" if is_told else "tensor<f32, 3x224x224>",
                note=f"dtypes are {' '.join(DTYPES)}",
                fix=given.span if is_told else None,
            )
            return UNKNOWN
        shape = self._shape(rest[0], given) if rest and isinstance(rest[0], str) else None
        return Tensor(word, shape)

    def _shape(self, text: str, given: tree.TypeExpr) -> Shape | None:
        sides = text.split("x")
        if any(len(side) > MAX_DIGITS for side in sides):
            self._error("out-of-range", "this is too large a number", given.span)
            return None
        return tuple(None if side == "?" else int(side) for side in sides)
