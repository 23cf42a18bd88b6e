"""A physical plan as a picture: stages and what is between them, top to bottom, in SVG.

Layer 2. A graph is laid out in rows, each unit below all that it needs; a control node is a frame
around the graphs of its bodies, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from flowlang.plan.explain import body_labels, node_text
from flowlang.plan.physical import FlowProgram, PhysicalPlan, Steps, Unit

CHARACTER, LINE, PAD, GAP = 7.2, 17, 10, 22  # pixels
MOST_CHARACTERS = 60
_STYLE = (
    "text{font:12px ui-monospace,monospace;fill:currentColor}"
    "rect{fill:none;stroke:currentColor;rx:6}"
    ".stage{fill:#3b82f622}.value{stroke-dasharray:3 3}.frame{stroke-opacity:.4}"
    "path{fill:none;stroke:currentColor;stroke-opacity:.5;marker-end:url(#end)}"
)


@dataclass(slots=True)
class _Box:
    """A rectangle with its lines of text, and the graphs inside it. Places are set in the end."""

    kind: str
    lines: list[str]
    inner: list[_Graph]
    x: float = 0.0
    y: float = 0.0

    @property
    def text_height(self) -> float:
        return len(self.lines) * LINE

    @property
    def width(self) -> float:
        text = max((len(line) for line in self.lines), default=0) * CHARACTER
        return max(text, sum(g.width for g in self.inner) + GAP * (len(self.inner) - 1)) + 2 * PAD

    @property
    def height(self) -> float:
        inner = max((g.height for g in self.inner), default=0.0)
        return self.text_height + inner + 2 * PAD + (PAD if self.inner else 0)


@dataclass(slots=True)
class _Graph:
    """Boxes in rows, and which of them feed which."""

    rows: list[list[_Box]]
    edges: list[tuple[_Box, _Box]]

    @property
    def width(self) -> float:
        return max(sum(b.width for b in row) + GAP * (len(row) - 1) for row in self.rows)

    @property
    def height(self) -> float:
        return sum(max(b.height for b in row) for row in self.rows) + GAP * (len(self.rows) - 1)


def plan_svg(physical: PhysicalPlan, program: FlowProgram) -> str:
    """One flow of a physical plan as an SVG document; it takes the colour of the text around it."""
    names = [str(program.input), *(f"{p.name}: {p.type}" for p in program.plan.parameters)]
    graph = _graph(program.steps, physical, names, f"gives {program.output}")
    _place(graph, PAD, PAD)
    width, height = graph.width + 2 * PAD, graph.height + 2 * PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="the stages of flow {escape(program.name)}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="end" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0L6 3L0 6" style="marker-end:none"/></marker>'
        "</defs>",
        *_drawn(graph),
        "</svg>",
    ]
    return "".join(parts)


def _graph(steps: Steps, physical: PhysicalPlan, names: list[str], result: str) -> _Graph:
    """A graph's boxes: what comes in, its units, and what goes out."""
    boxes: dict[int, _Box] = {}
    rows: dict[int, int] = {}
    for slot, name in enumerate(names):
        boxes[slot], rows[slot] = _Box("value", [_cut(name)], []), 0
    edges: list[tuple[int, int]] = []
    for unit in steps.units:
        boxes[unit.output] = _unit(unit, physical)
        rows[unit.output] = 1 + max((rows.get(i, 0) for i in unit.inputs), default=0)
        edges += [(i, unit.output) for i in dict.fromkeys(unit.inputs) if i in boxes]
    last = max(rows.values()) + 1
    end = -1
    boxes[end], rows[end] = _Box("value", [_cut(result)], []), last
    edges.append((steps.result, end))
    used = {slot for edge in edges for slot in edge}
    ordered: list[list[_Box]] = [[] for _ in range(last + 1)]
    for slot, row in rows.items():
        if slot in used or slot == 0:
            ordered[row].append(boxes[slot])
    return _Graph(
        [row for row in ordered if row],
        [(boxes[a], boxes[b]) for a, b in edges if a in boxes],
    )


def _unit(unit: Unit, physical: PhysicalPlan) -> _Box:
    if unit.stage is None:
        labels = body_labels(unit.node)
        inner = [
            _graph(body, physical, [label], "gives")
            for label, body in zip(labels, unit.bodies, strict=True)
        ]
        return _Box("frame" if inner else "value", [_cut(node_text(unit.node))], inner)
    stage = physical.stages[unit.stage]
    low, _, most = stage.batch
    batch = f"  batch {low}..{most}" if most > 1 else ""
    head = f"{stage.index + 1} {stage.name}  {stage.device} x{stage.instances}{batch}"
    return _Box("stage", [_cut(head), *(_cut(node_text(n)) for n in stage.nodes)], [])


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _place(graph: _Graph, x: float, y: float) -> None:
    """Give every box its place, the rows centred one below the other."""
    whole = graph.width
    for row in graph.rows:
        left = x + (whole - sum(b.width for b in row) - GAP * (len(row) - 1)) / 2
        for box in row:
            box.x, box.y = left, y
            inner_x = left + PAD
            for inner in box.inner:
                _place(inner, inner_x, y + PAD + box.text_height + PAD)
                inner_x += inner.width + GAP
            left += box.width + GAP
        y += max(b.height for b in row) + GAP


def _drawn(graph: _Graph) -> list[str]:
    out = []
    for start, end in graph.edges:
        x1, y1 = start.x + start.width / 2, start.y + start.height
        x2, y2 = end.x + end.width / 2, end.y
        bend = (y2 - y1) / 2
        out.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} '
            f'{x2:.0f} {y2:.0f}"/>'
        )
    for box in (box for row in graph.rows for box in row):
        out.append(
            f'<rect class="{box.kind}" x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" '
            f'height="{box.height:.0f}"/>'
        )
        for number, line in enumerate(box.lines):
            y = box.y + PAD + LINE * (number + 0.75)
            out.append(f'<text x="{box.x + PAD:.0f}" y="{y:.0f}">{escape(line)}</text>')
        for inner in box.inner:
            out += _drawn(inner)
    return out
