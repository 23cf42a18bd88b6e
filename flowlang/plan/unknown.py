"""A name that is no stage where it stands: what is said of it, and what was likely meant.

Layer 2.
"""

from __future__ import annotations

from flowlang.diagnostics import Diagnostic, Label
from flowlang.plan.arguments import did_you_mean
from flowlang.plan.expression import field_type
from flowlang.plan.graph import Node
from flowlang.plan.module import PythonFile
from flowlang.plan.ops import OPS
from flowlang.plan.scope import Scope
from flowlang.plan.values import nearest
from flowlang.syntax import tree

# What others call it.
_FOREIGN = {
    **dict.fromkeys(("onnx", "onnxruntime", "tensorrt", "model", "infer", "predict"), "trt"),
    **dict.fromkeys(("imdecode", "imread", "load", "read", "open"), "decode"),
    **dict.fromkeys(("grayscale", "greyscale", "grey"), "gray"),
    **dict.fromkeys(("center_crop", "centre_crop"), "crop"),
    **dict.fromkeys(("nms", "yolo"), "boxes"),
    **dict.fromkeys(("each", "foreach", "for_each"), "map"),
    **dict.fromkeys(("select", "where"), "filter"),
    **dict.fromkeys(("concat", "implode"), "join"),
    **dict.fromkeys(("sort", "sorted", "sort_by", "order_by", "first", "head", "take"), "top"),
    **dict.fromkeys(("limit", "max_by"), "top"),
}


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def unknown_stage(call: tree.Call, item: Node, scope: Scope) -> Diagnostic:
    """The complaint about a name that is no stage here, with what is meant by it."""
    name, place = str(call.path), Label(call.path.span)
    values = scope.names()
    if name in values:
        message = f"`{name}` is a value, and takes no arguments"
        return Diagnostic("not-a-stage", message, place, help=name, fix=call.span)
    if name in scope.constants:
        message = f"`{name}` is a param, and takes no arguments"
        return Diagnostic("not-a-stage", message, place, help=name, fix=call.span)
    if name in scope.module.uses:
        first = (n for n in scope.module.callable_names() if n.startswith(f"{name}."))
        message = f"`{name}` is a file, and a stage belongs here"
        return Diagnostic("not-a-stage", message, place, help=next(first, None))
    if name in ("null", "None"):
        message = f"there is no value `{name}`"
        note = "`.a ?? 0` is 0 where `.a` is null; `if .b then { a: .c } else {}` gives null as `a`"
        return Diagnostic("unknown-operator", message, place, note=note)
    if name in scope.lets:
        message = f"`{name}` is used before it is declared"
        return Diagnostic("unknown-name", message, place, note="lets are read in order")
    if call.path.names[0] == "in":
        return Diagnostic(
            "not-a-stage",
            "`in` is the item of a flow that has a body",
            place,
            note="flow name { return in -> decode }"
            if name == "in"
            else f"`{name.removeprefix('in')}` is a field of what arrives",
        )
    known = [*OPS, *scope.module.callable_names(), *values]
    message = f"there is no operator or flow named `{name}`"
    file, _, last = name.rpartition(".")
    if file in scope.module.uses:  # what its names have in common makes none of them like it
        used = scope.module.uses[file]
        if isinstance(used, PythonFile) and last in used.others:
            note = f"`{used.path.name}` has a `{last}`, but operators are what it writes with `def`"
            return Diagnostic("unknown-operator", message, place, note=note)
        inside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == file]
        near = nearest(last, inside)
        meant = f"did you mean `{file}.{near}`?" if near else None
        has = f"`{file}` has {_some(inside)}" if inside and not near else None
        return Diagnostic("unknown-operator", message, place, help=meant, note=has)
    meant = did_you_mean(name, [k for k in known if k != "in"])
    if meant is None and (op := next((o for o in OPS.values() if name in o.words), None)):
        given = [arg.span.text for arg in call.args or ()]
        mended = f"{op.name}({', '.join([*given, name])})"
        note = f"`{name}` is a word of `{op.name}`"
        return Diagnostic("unknown-operator", message, place, help=mended, note=note, fix=call.span)
    if name in _FOREIGN:
        meant = f"did you mean `{_FOREIGN[name]}`?"
    if call.args is None and field_type(item.type, name) is not None:
        meant = f"did you mean `.{name}`?"
    elif elsewhere := [k for k in known if k.endswith(f".{name}")]:
        meant = f"did you mean `{elsewhere[0]}`?"
    return Diagnostic("unknown-operator", message, place, help=meant)
