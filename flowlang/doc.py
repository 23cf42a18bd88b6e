"""The pages of `flowlang doc`: the tables of operators and settings, and what a flow file declares.

Layer 4. Everything said here is taken from the tables and the program; nothing is run.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowlang.plan import physical
from flowlang.plan.check import Plan
from flowlang.plan.graph import FlowPlan
from flowlang.plan.ops import TABLE as OPERATORS
from flowlang.plan.ops import Op, Param
from flowlang.plan.schedule import COPIES, OF_REQUESTS, Setting
from flowlang.plan.schedule import TABLE as SETTING_TABLE
from flowlang.plan.signature import SETTINGS as OF_PYTHON
from flowlang.plan.types import Image, Tensor, Type, Unknown
from flowlang.plan.values import BYTES, seconds, shown
from flowlang.syntax import tree
from flowlang.syntax.format import format_expr, format_type

WIDTH = 96
_KINDS = {
    "int": "int",
    "number": "float",
    "str": "str",
    "file": "text file",
    "model": "ONNX file",
    "word": "word",
    "flag": "flag",
    "numbers": "float or three of them",
    "value": "value of the flow",
    "condition": "condition on an element",
    "key": "expression on an element",
    "stage": "stage",
}
# Where the type of the row says less than there is to say: what an operator takes, and gives.
_SAID: Mapping[str, tuple[str | None, str | None]] = {
    "crop": ("image, or a box or quad", None),
    "normalize": ("image of decided colour", "image of floats"),
    "trt": ("what the model takes", "what the model gives"),
    "top": ("tensor<f32, ?>, or a list", "list<label>, or the list"),
    "boxes": ("what the detector gives", "list<detection>, of db list<textline>"),
    "map": ("list", "list of what the stage gives"),
    "filter": ("list", "the same list"),
    "ctc": (None, "str, or reading with `scored`"),
    "argmax": (None, "int, or a tensor of them"),
    "pass": ("anything", "the same"),
}
_DEVICES = {
    "image": "CPU, GPU",
    "model": "CPU, GPU",
    "host": "CPU",
    "map": "where its stage runs",
    "python": "CPU",
}


# One operator


def signature(op: Op, name: str | None = None) -> str:
    """How an operator is called: `top(k, by=..., names=...)`."""
    parts = [_argument(p) for p in op.params]
    return f"{name or op.name}({', '.join(parts)})" if parts else name or op.name


def _argument(param: Param) -> str:
    if param.kind == "flag":
        return param.name
    if not param.is_named:
        return "|".join(param.words) if param.words else param.name
    return f"{param.name}={'...' if param.default is None else _value(param)}"


def _value(param: Param) -> str:
    """A default as it is written in a flow."""
    if isinstance(param.default, bool):
        return "true" if param.default else "false"
    if isinstance(param.default, str) and param.kind != "word":
        return f'"{param.default}"'
    return str(param.default)


def takes(op: Op) -> str:
    """What an operator takes, in words or as a type."""
    return _SAID.get(op.name, (None, None))[0] or _brief(op.takes)


def gives(op: Op) -> str:
    """What an operator gives where it is told nothing, in words or as a type."""
    said = _SAID.get(op.name, (None, None))[1]
    if said:
        return said
    if op.function is not None:
        return _brief(op.function.gives)
    told = {p.name: p.words[0] if p.words and p.default is None else p.default for p in op.params}
    return _brief(op.rule(op.takes, told))


def _brief(kind: Type) -> str:
    if isinstance(kind, Unknown):
        return "anything"
    if isinstance(kind, Image):
        parts = [p for p in (kind.colour, kind.dtype if kind.dtype != "u8" else None) if p]
        return f"image<{', '.join(parts)}>" if parts else "image"
    if isinstance(kind, Tensor) and kind.shape is None:
        return f"tensor<{kind.dtype}>" if kind.dtype != "any" else "tensor"
    return str(kind).replace("image<undecided, u8, hwc>", "image")


def kind_of(param: Param) -> str:
    """What a parameter can be: its words, or its kind and between what."""
    if param.words:
        return " ".join(f"`{word}`" for word in param.words)
    between = f" {_bound(param.low)}..{_bound(param.high)}" if _is_bounded(param) else ""
    return _KINDS[param.kind] + between


def _is_bounded(param: Param) -> bool:
    return None not in (param.low, param.high) and max(map(abs, _bounds(param))) < 1e9


def _bounds(param: Param) -> tuple[float, float]:
    return param.low or 0.0, param.high or 0.0


def _bound(value: float | None) -> str:
    return str(int(value)) if value is not None and value == int(value) else str(value)


def parameter_text(param: Param) -> str:
    """One parameter in a line: what it can be, what it is otherwise, what it means."""
    if param.is_required:
        otherwise = "; required"
    elif param.default in (None, False):
        otherwise = ""
    else:
        otherwise = f"; default `{_value(param)}`"
    live = "; may come with the request" if param.is_live else ""
    said = f": {param.doc}" if param.doc else ""
    return f"{kind_of(param)}{otherwise}{live}{said}"


def setting_text(setting: Setting) -> str:
    """One setting in a line: what it means and how it is written."""
    words = f" ({' '.join(f'`{w}`' for w in setting.words)})" if setting.words else ""
    return f"{setting.doc}{words}; `{setting.name}={setting.example}`"


def flow_text(flow: tree.Flow) -> str:
    """A flow's head as it is written."""
    inputs = ", ".join(
        f"{i.name}: {format_type(i.type)}" + (f" = {format_expr(i.default)}" if i.default else "")
        for i in flow.inputs
    )
    types = " -> ".join(map(format_type, flow.signature)) if flow.signature else ""
    return f"flow {flow.name}{f'({inputs})' if inputs else ''}{f': {types}' if types else ''}"


# Tables


def operators_text() -> str:
    """Every operator with its parameters, for a terminal."""
    return "\n\n".join(operator_text(op) for op in OPERATORS) + "\n"


def operator_text(op: Op) -> str:
    """One operator, for a terminal."""
    lines = [*_wrapped(signature(op), "", "    "), *_wrapped(op.doc, "  ", "  ")]
    lines.append(f"  {takes(op)} -> {gives(op)}")
    width = max((len(p.name) for p in op.params), default=0)
    for param in op.params:
        head = f"    {param.name:<{width}}  "
        lines += _wrapped(parameter_text(param), head, " " * len(head))
    if op.settings:
        lines.append(f"  settings: {' '.join(op.settings)}")
    lines.append(f"  runs on {_DEVICES[op.kind]}; between devices: {op.tolerance}")
    return "\n".join(lines).replace("`", "")


def operator_markdown(op: Op) -> str:
    """One operator as a page of Markdown: its signature, what it does, its parameters."""
    lines = [f"```flow\n{signature(op)}\n```"]
    if op.doc:
        lines.append(op.doc)
    lines.append(f"{_typed(takes(op))} -> {_typed(gives(op))}")
    arguments = [f"- {cell}" for cell in _argument_cells(op)]
    if arguments:
        lines.append("\n".join(arguments))
    lines.append(f"Runs on {_DEVICES[op.kind]}; between devices: {op.tolerance}.")
    return "\n\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def operators_markdown() -> str:
    """Every operator as a row of a Markdown table."""
    rows = [
        (
            f"`{op.name}`",
            _typed(takes(op)),
            _typed(gives(op)),
            op.doc,
            "<br>".join(_argument_cells(op)),
            f"{_DEVICES[op.kind]}: {op.tolerance}" if op.kind == "image" else _DEVICES[op.kind],
        )
        for op in OPERATORS
    ]
    return _table(("operator", "takes", "gives", "does", "arguments", "runs on"), rows)


def _argument_cells(op: Op) -> Iterator[str]:
    for param in op.params:
        equals = "=" if param.is_named and param.kind != "flag" else ""
        yield f"`{param.name}{equals}` {parameter_text(param)}"
    if op.settings:
        yield f"settings {' '.join(f'`{name}`' for name in op.settings)}"


def _typed(text: str) -> str:
    """Words with the types among them as code."""
    return re.sub(r"\w+(<[^ ]+(, [^ ]+)*>)", lambda found: f"`{found.group()}`", text)


def defaults() -> dict[str, str]:
    """What is taken where a setting is not set, in Markdown."""
    from flowlang.runtime.trt import WORKSPACE

    return {
        "batch": "what the model was exported for, else 1 on a CPU, "
        f"`1..{physical.GPU_BATCH}` on a GPU; in Python 1, or `1..{physical.LIGHT_BATCH}` "
        "where it is `@batched`",
        "wait": "`0ms`",
        "timeout": f"none; in Python `{seconds(physical.PYTHON_TIMEOUT_S)}`",
        "gpu": "the first",
        "graphs": "`true`",
        "workspace": f"`{WORKSPACE >> 30}GiB`",
        "max_bytes": f"`{physical.MAX_BYTES // BYTES['MiB']}MiB`",
        "max_pixels": str(physical.MAX_PIXELS),
        "device": "the GPU where there is one",
        "priority": "`normal`",
        "slo": "none",
        "queue": str(physical.QUEUE),
        COPIES: f"one a core on a CPU, {physical.GPU_LANES} on a GPU, "
        f"{physical.LANES_OF_EACH_GPU} on each of several; in Python one",
    }


def settings_markdown() -> str:
    """Every setting, and the number of copies, as rows of a Markdown table."""
    otherwise = defaults()
    rows = [
        (f"`{s.name}`", _owner(s), _meaning(s), f"`{s.example}`", otherwise[s.name])
        for s in SETTING_TABLE
    ]
    copies = "instances in all, spread evenly over `gpu`"
    rows.insert(
        3,
        (
            f"`{COPIES}N`",
            "a model, or an operator on images or in Python",
            copies,
            f"`{COPIES}2`",
            otherwise[COPIES],
        ),
    )
    return _table(("setting", "of", "means", "for example", "default"), rows)


def settings_text() -> str:
    """Every setting, for a terminal."""
    otherwise = defaults()
    lines = []
    for setting in SETTING_TABLE:
        head = f"{setting.name:<10}  "
        text = f"{setting_text(setting)}; of {_owner(setting)}; default {otherwise[setting.name]}"
        lines += _wrapped(text.replace("`", ""), head, " " * len(head))
    return "\n".join(lines) + "\n"


def _owner(setting: Setting) -> str:
    """Whose setting it is."""
    if setting.name == "gpu":
        return "a model or a flow"
    if setting.level == "flow":
        return "a served flow" if setting.name in OF_REQUESTS else "a flow"
    owners = [f"`{op.name}`" for op in OPERATORS if setting.name in op.settings]
    if setting.level == "image":
        return ", ".join(owners)
    return "a model, or an operator in Python" if setting.name in OF_PYTHON else "a model"


def _meaning(setting: Setting) -> str:
    words = f": {' '.join(f'`{w}`' for w in setting.words)}" if setting.words else ""
    return setting.doc + words


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its lines end, the last one too."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in lines)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


TABLES = {"operators": operators_markdown, "settings": settings_markdown}


def replace_tables(text: str) -> str:
    """A page with the tables between its markers, `<!-- operators -->` and such, made anew."""
    for name, table in TABLES.items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(opening)}\n.*?{re.escape(closing)}", re.DOTALL)
        made = f"{opening}\n{table()}{closing}"
        text = pattern.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text


# One file


@dataclass(frozen=True, slots=True)
class Entry:
    """What a page says of one declaration: its head as code, its comment, and lists of more."""

    kind: str
    name: str
    head: str
    doc: str
    rows: tuple[tuple[str, str], ...] = ()


def file_text(program: tree.Program, plan: Plan | None = None) -> str:
    """What a file declares, for a terminal; with inferred types where there is a plan."""
    pages = []
    for entry in _entries(program, plan):
        lines = [entry.head]
        for at, paragraph in enumerate(re.split(r"\n\n+", entry.doc) if entry.doc else ()):
            lines += [*([""] if at else []), *_wrapped(paragraph, "  ", "  ")]
        width = max((len(name) for name, _ in entry.rows), default=0)
        for name, said in entry.rows:
            head = f"    {name:<{width}}  "
            lines += _wrapped(said.replace("`", ""), head, " " * len(head))
        pages.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(pages) + "\n"


def file_markdown(program: tree.Program, plan: Plan | None = None) -> str:
    """What a file declares, as a page of Markdown."""
    title = os.path.basename(program.span.source.name)
    pages = [f"# {title}"]
    kind = ""
    for entry in _entries(program, plan):
        if entry.kind != kind:
            kind = entry.kind
            pages.append(f"## {kind}")
        pages += [f"### {entry.name}", f"```flow\n{entry.head}\n```"]
        if entry.doc:
            pages.append(entry.doc)
        if entry.rows:
            pages.append("\n".join(f"- `{name}`: {said}" for name, said in entry.rows))
    return "\n\n".join(pages) + "\n"


def _entries(program: tree.Program, plan: Plan | None) -> list[Entry]:
    """The declarations of a file: served flows, other flows, params, types, files it uses."""
    plans = {flow.name: flow for flow in plan.flows} if plan else {}
    if program.pipeline is not None:
        return [_bare(program, plans.get("main"))]
    entries = {kind: list[Entry]() for kind in ("Flows", "Parts", "Params", "Types", "Files")}
    flows = [item for item in program.items if isinstance(item, tree.Flow)]
    served = {f.name for f in flows if f.is_exported or len(flows) == 1}
    for item in program.items:
        match item:
            case tree.Flow(name):
                kind = "Flows" if name in served else "Parts"
                head, rows = _flow_head(item, plans.get(name)), _flow_rows(item, program)
                entries[kind].append(Entry(kind, name, head, item.doc or "", rows))
            case tree.Param(name):
                entries["Params"].append(_param(item, plan))
            case tree.TypeDef(name, kind):
                head = f"type {name} = {format_type(kind)}"
                entries["Types"].append(Entry("Types", name, head, item.doc or ""))
            case tree.Use(path, name):
                head = f'use "{path.value}" as {name}'
                entries["Files"].append(Entry("Files", name, head, item.doc or ""))
    return [entry for rows in entries.values() for entry in rows]


def _bare(program: tree.Program, plan: FlowPlan | None) -> Entry:
    """A file that is one pipeline; the `##` comments at its head are its documentation."""
    start = program.pipeline.span.start if program.pipeline else 0
    lines = [
        comment.text[2:].strip()
        for comment in program.comments
        if comment.text.startswith("##") and comment.span.end <= start
    ]
    head = f"flow main: {plan.input.type} -> {plan.output.type}" if plan else "flow main"
    return Entry("Flows", "main", head, "\n".join(lines))


def _flow_head(flow: tree.Flow, plan: FlowPlan | None) -> str:
    """A flow's head as it is written, with the types that were inferred where none are."""
    if flow.signature or plan is None:
        return flow_text(flow)
    return f"{flow_text(flow)}: {plan.input.type} -> {plan.output.type}"


def _flow_rows(flow: tree.Flow, program: tree.Program) -> tuple[tuple[str, str], ...]:
    """What requests can bring, and what schedules set."""
    rows = []
    for given in flow.inputs:
        otherwise = f"default `{format_expr(given.default)}`" if given.default else "required"
        rows.append((given.name, f"{format_type(given.type)}; {otherwise}"))
    for item in program.items:
        if isinstance(item, tree.Schedule):
            title = f"schedule {item.name}" if item.name else "schedule"
            lines = [line for line in item.entries if str(line.path) == flow.name]
            rows += [(title, _settings_of(line)) for line in lines]
    return tuple(rows)


def _settings_of(line: tree.Entry) -> str:
    settings = [f"{a.name}={format_expr(a.value)}" for a in line.args or () if a.name]
    return " ".join([*settings, *([f"{COPIES}{line.count}"] if line.count else [])])


def _param(item: tree.Param, plan: Plan | None) -> Entry:
    typed = f": {format_type(item.type)}" if item.type else ""
    head = f"param {item.name}{typed} = {format_expr(item.default)}"
    values = {p.name: p for p in plan.params} if plan else {}
    value = values.get(item.name)
    changed = value is not None and value.origin != "file"
    rows = ((value.origin, shown(value.value)),) if value is not None and changed else ()
    return Entry("Params", item.name, head, item.doc or "", rows)
