"""Programs of several files: flow files in use by others, and operators out of Python files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from flowlang.diagnostics import CompileError, Diagnostic, Source, render
from flowlang.plan.check import NO_CHOICES, Plan, check_source, compile_source
from flowlang.plan.declare import Choices
from flowlang.plan.explain import explain_physical, explain_plan
from flowlang.plan.ops import Op
from flowlang.plan.physical import Machine, PhysicalPlan, lower
from flowlang.plan.signature import read_python
from tests.standins import write_model

Write: TypeAlias = Callable[[str, str], Path]

LIB = """
param size = 224
param models = "."
param sized = size + 32
type pair = { a: int, b: int }
flow prep = resize(size) -> rgb
flow net = trt("{models}/net.onnx")
flow part(k: int, n: int = 2) = top(k + n)
export flow alone(k: int = 2) = net -> top(k)
schedule { net(batch=1..4, wait=3ms) x1 }
schedule prod { net(batch=1..8) }
"""


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models beside the program, and others in `lib`."""
    folder = tmp_path_factory.mktemp("modules")
    port = [("data", "f32", ("N", 9))]
    for path in (folder / "net.onnx", folder / "lib" / "net.onnx", folder / "lib" / "own.onnx"):
        write_model(path, port, [("logits", "f32", ("N", 9))])
    (folder / "lib" / "lib.flow").write_text(LIB, "utf-8")
    return folder


@pytest.fixture(autouse=True)
def write(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file of the program."""
    monkeypatch.chdir(furnished)

    def put(name: str, text: str) -> Path:
        path = furnished / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    return put


def plan(text: str, choices: Choices = NO_CHOICES) -> Plan:
    return compile_source(Source("app.flow", text), choices)


def physical(text: str, choices: Choices = NO_CHOICES) -> PhysicalPlan:
    return lower([plan(text, choices)], Machine(4))


def found(text: str, choices: Choices = NO_CHOICES) -> list[Diagnostic]:
    return [d for d in check_source(Source("app.flow", text), choices)[1] if d.severity == "error"]


def told(text: str, choices: Choices = NO_CHOICES) -> str:
    """The only error of a program, as it is printed."""
    (error,) = found(text, choices)
    return render(error)


def kind(text: str) -> str:
    (flow,) = plan(text).flows
    return f"{flow.input.type} -> {flow.output.type}"


# Flow files

USE = 'use "lib/lib.flow" as lib\n'


def test_flows_types_and_params_stand_behind_their_files_name() -> None:
    """What another file declares is used by the file's name, wherever such a thing may stand."""
    assert kind(USE + "export flow f = lib.net -> top(2)") == "tensor<f32, 9> -> list<label>"
    assert kind(USE + "export flow f = decode -> lib.prep").endswith("image<rgb, u8, hwc, 224x224>")
    assert kind(USE + "export flow f: lib.pair -> int = .a + .b") == "pair -> int"
    assert kind(USE + "export flow f = decode -> resize(lib.size)").endswith("224x224>")
    assert kind(USE + "export flow f = decode -> resize(lib.sized)").endswith("256x256>")
    assert kind(USE + "export flow f: bytes -> int = lib.size") == "bytes -> int"
    assert kind(USE + 'export flow f = trt("{lib.models}/net.onnx")').startswith("tensor<f32, 9>")
    assert kind(USE + "param mine = lib.size / 2\nexport flow f = decode -> resize(mine)").endswith(
        "112x112>"
    )
    assert kind(USE + "export flow f: int -> bool = pass > lib.size") == "int -> bool"
    assert kind(USE + "export flow f: str -> int = match pass { lib.models => 1, else => 2 }")


def test_paths_are_looked_for_beside_the_file_that_names_them(write: Write) -> None:
    """The same words in two files name two files."""
    write("lib/inner.flow", 'flow net = trt("own.onnx")')
    assert kind('use "lib/inner.flow" as inner\nexport flow f = inner.net')
    assert "own.onnx" in told('export flow f = trt("own.onnx")')
    write("lib/outer.flow", 'use "inner.flow" as inner\nflow net = inner.net')
    assert kind('use "lib/outer.flow" as outer\nexport flow f = outer.net -> outer.inner.net')


def test_types_of_the_files_of_a_file_are_reached_like_its_flows(write: Write) -> None:
    """Behind the names of both, whether they are declared or a Python file's."""
    write("lib/p.py", "def far(x: int) -> 'list<int>': ...\n")
    write("lib/chain.flow", 'use "lib.flow" as it\nuse "p.py" as p\nflow net = it.net')
    use = 'use "lib/chain.flow" as c\n'
    assert kind(use + "export flow f: c.it.pair -> int = .a") == "pair -> int"
    assert kind(use + "export flow f: c.p.far -> int = 3") == "list<int> -> int"
    assert "no type `c.it.pear`" in told(use + "export flow f: c.it.pear -> int = 3")
    assert "did you mean `c.it.pair`?" in told(use + "export flow f: c.it.pear -> int = 3")
    assert "no type `c.no.pair`" in told(use + "export flow f: c.no.pair -> int = 3")
    write("lib/chain.flow", 'use "nowhere.flow" as it\nflow net = decode')
    assert "nowhere.flow" in told(use + "export flow f: c.it.pair -> int = 3")


def test_arguments_reach_flows_of_other_files() -> None:
    """By position, by name and with defaults; and requests bring those that are live."""
    assert kind(USE + "export flow f = lib.net -> lib.part(1)")
    assert kind(USE + "export flow f(k: int) = lib.net -> lib.part(n=3, k=k)")
    assert "needs its `k`" in told(USE + "export flow f = lib.net -> lib.part(n=3)")


def test_a_flow_of_another_file_need_not_be_exported_there() -> None:
    """`export` decides what a file serves when it is served, not what others may use."""
    assert kind(USE + "export flow f = lib.alone(3)")
    assert [f.name for f in plan(USE + "flow f = lib.net").flows] == ["f"]


def test_a_file_in_use_twice_is_one_thing(write: Write) -> None:
    """Whatever names lead there, a flow has one stage, one batcher and one engine."""
    write("lib/other.flow", 'use "lib.flow" as it\nflow again = it.net')
    text = (
        'use "lib/other.flow" as c\nuse "lib/lib.flow" as a\nuse "lib/../lib/lib.flow" as b\n'
        "export flow f = { x: a.net, y: b.net, z: c.again, w: c.it.net -> top(2) }"
    )
    models = [s for s in physical(text).stages if s.model]
    assert [(s.name, s.batch, s.wait_s, s.instances) for s in models] == [
        ("a.net", (1, 4, 4), 0.003, 1)
    ]


def test_schedules_of_files_count_and_those_of_their_users_count_more() -> None:
    """A named schedule is laid over all files, and the program's own file has the last word."""
    prod = Choices({}, {}, "prod")

    def batch(text: str, choices: Choices = NO_CHOICES) -> tuple[tuple[int, int, int], float]:
        (stage,) = (s for s in physical(text, choices).stages if s.model)
        return stage.batch, stage.wait_s

    text = USE + "export flow f = lib.net\n"
    assert batch(text) == ((1, 4, 4), 0.003)
    assert batch(text, prod) == ((1, 8, 8), 0.003)
    assert batch(text + "schedule { lib.net(batch=1..2) }") == ((1, 2, 2), 0.003)
    assert batch(text + "schedule prod { lib.net(wait=1ms) }", prod) == ((1, 8, 8), 0.001)
    assert batch(text + "schedule { lib.net(batch=1..2) }", prod) == ((1, 8, 8), 0.003)


def test_a_flow_of_another_file_has_no_entrance_here() -> None:
    """What belongs to a served flow is refused for a part, and let be where its file is served."""
    for setting in ("slo=3ms", "queue=3"):
        error = told(USE + f"export flow f = lib.net\nschedule {{ lib.alone({setting}) }}")
        assert "`lib.alone` is served nowhere in this file" in error
    assert not found(USE + "export flow f = lib.net\nschedule { f(slo=3ms) }")


def test_the_own_schedule_of_an_exported_part_does_no_harm(write: Write) -> None:
    """A file that is served by itself too may keep its deadlines."""
    write("lib/slow.flow", "export flow a = decode\nschedule { a(slo=3s, queue=9) }")
    (program,) = physical('use "lib/slow.flow" as s\nexport flow f = s.a').programs
    assert (program.slo_s, program.queue) == (None, 256)


@pytest.mark.parametrize("order", [0, 1])
def test_params_are_overridden_by_their_files_name(write: Write, order: int) -> None:
    """`--set lib.size` counts wherever the file is used, in whichever order the files are."""
    write("lib/user.flow", 'use "lib.flow" as it\nflow sized = it.prep')
    uses = [USE, 'use "lib/user.flow" as user\n']
    text = (
        uses[order] + uses[1 - order] + "export flow f = decode -> { a: lib.prep, b: user.sized }"
    )
    choices = Choices({"lib.size": "100"}, {})
    types = str(plan(text, choices).flows[0].output.type)
    assert types.count("100x100") == 2
    assert "param lib.size = 100  (--set)" in explain_plan(plan(text, choices))
    error = told(text, Choices({"user.it.size": "100"}, {}))
    assert "the flow has no param named `user.it.size`" in error
    assert "help: lib.size" in error


def test_a_param_without_its_files_name_is_another() -> None:
    """`--set size` is not that of a file in use, which the message says how to name."""
    error = told(USE + "export flow f = lib.net", Choices({"size": "3"}, {}))
    assert "did you mean `lib.size`?" in error


def test_what_is_wrong_with_a_mention() -> None:
    """Names that lead nowhere are told with what was meant, and as what they are."""
    said = {
        "lib": "error[not-a-stage]: `lib` is a file, and a stage belongs here",
        "lib.nope": "error[unknown-operator]: there is no operator or flow named `lib.nope`",
        "lib.nett": "= help: did you mean `lib.net`?",
        "lib.net.x": "error[unknown-operator]: there is no operator or flow named `lib.net.x`",
        "lib.net(3)": "note: `lib.net` takes none",
        "lib.net x3": "= help: schedule { lib.net x3 }",
        "lib.size(3)": "error[not-a-stage]: `lib.size` is a param, and takes no arguments",
    }
    for mention, words in said.items():
        assert words in told(USE + f"export flow f = {mention}")
    assert "did you mean `lib.pair`?" in told(USE + "export flow f: lib.pear -> int = .a")
    assert "there is no type `nope.pair`" in told(USE + "export flow f: nope.pair -> int = .a")
    assert "there is no flow named `lib.nett`" in told(
        USE + "export flow f = lib.net\nschedule { lib.nett(batch=1) }"
    )
    assert "is a value" not in told(USE + "export flow f = decode -> lib.size")


def test_mistakes_of_a_file_in_use_are_told_at_their_place(write: Write) -> None:
    """They have the file's name, and what its user makes of the broken names is let pass."""
    write("lib/bad.flow", "flow prep = resize(224) rgb\nflow other = resise(3)\nflow good = rgb\n")
    use = 'use "lib/bad.flow" as bad\n'
    (error,) = found(use + "export flow f = decode -> bad.good")
    assert (error.slug, str(error.span)) == ("missing-arrow", "lib/bad.flow:1:25")
    slugs = [d.slug for d in found(use + "export flow f = decode -> bad.prep -> bad.other")]
    assert slugs == ["missing-arrow", "unknown-operator"]


def test_only_what_is_used_of_a_file_needs_its_models(write: Write) -> None:
    """A library may name models that this machine does not have."""
    write("lib/rich.flow", 'flow net = trt("nowhere.onnx")\nflow ok = rgb')
    use = 'use "lib/rich.flow" as rich\n'
    assert kind(use + "export flow f = decode -> rich.ok")
    assert "missing-file" in told(use + "export flow f = decode -> rich.net")


@pytest.mark.parametrize(
    ("name", "text", "slug"),
    [
        ("empty", "", "empty-program"),
        ("itself", 'use "itself.flow" as itself\nflow a = rgb', "import-cycle"),
        ("home", 'use "../app.flow" as home\nflow a = rgb', "import-cycle"),
    ],
)
def test_files_that_cannot_be_used(write: Write, name: str, text: str, slug: str) -> None:
    """What is no program, and what would need itself, is told where it is found."""
    write(f"lib/{name}.flow", text)
    program = f'use "lib/{name}.flow" as it\nexport flow f = decode -> it.a'
    write("app.flow", program)
    assert (slug, f"lib/{name}.flow") in [(d.slug, d.span.source.name) for d in found(program)]


def test_a_file_that_is_not_there_or_no_flow() -> None:
    """Missing files, folders and other kinds of files are told at their name."""
    said = {"lib/lob.flow": 'did you mean "lib/lib.flow"?', "lib": "neither", "net.onnx": "neither"}
    for name, words in said.items():
        (error,) = found(f'use "{name}" as it\nexport flow f = decode -> it.a')
        assert error.span.text == f'"{name}"'
        assert words in render(error)


def test_long_ways_through_files(write: Write) -> None:
    """A hundred files, each using the one before, are read once each."""
    write("lib/c0.flow", "param size = 8\nflow a = resize(size)")
    for i in range(1, 100):
        text = f'use "c{i - 1}.flow" as before\nuse "c0.flow" as first\nflow a = before.a'
        write(f"lib/c{i}.flow", text)
    text = 'use "lib/c99.flow" as last\nexport flow f = decode -> last.a'
    assert kind(text).endswith("8x8>")
    assert len(explain_physical(physical(text))) < 1000


PARTS = [
    "flow prep(size: int) = resize(size) -> rgb",
    'flow prep(size: int) = resize(size) -> rgb\nflow net = trt("net.onnx")',
    'flow net = trt("net.onnx")\nflow words(k: int) = net -> top(k)',
    "type pair = { a: int, b: int }",
    "param size = 224",
]


@pytest.mark.parametrize("text", PARTS)
def test_a_file_of_parts_is_right_and_cannot_be_served(text: str) -> None:
    """Checking it says in a hint that it serves nothing; whoever wants it served is told why."""
    checked, (hint,) = check_source(Source("app.flow", text))
    assert checked is not None
    assert not checked.flows
    assert hint.severity == "hint"
    assert "a file of parts" in (hint.note or "")
    with pytest.raises(CompileError) as caught:
        compile_source(Source("app.flow", text))
    (error,) = caught.value.diagnostics
    assert (error.severity, error.slug, error.message) == ("error", hint.slug, hint.message)


@pytest.mark.parametrize("text", PARTS[:3])
def test_a_file_of_parts_is_checked(text: str) -> None:
    """What is wrong in its flows is told, whatever their parameters will be."""
    wrong = text.replace("rgb", "rbg").replace("net ->", "net -> soft ->")
    assert {d.slug for d in found(wrong)} == {"unknown-operator"}


def test_a_flow_alone_is_a_part_for_its_parameters_only() -> None:
    """Only what another flow could give it is no error, and not of one that is exported."""
    assert "must be known" in told("flow f(k: int): { n: int } -> bytes = resize(.n)")
    assert "must be known" in told("export flow f(size: int) = decode -> resize(size)")


def test_exporting_is_proposed_where_it_mends() -> None:
    """A flow that cannot be served is not proposed for it."""
    flows = "flow a = decode\nflow b(k: int) = {}"
    (hint,) = check_source(Source("app.flow", flows.format("a -> resize(k)")))[1]
    assert hint.help is None
    (hint,) = check_source(Source("app.flow", flows.format("a -> rgb")))[1]
    assert hint.help == "export flow b"


# Python files

IMPORTS = """
from __future__ import annotations
import dataclasses
import typing as t
from typing import Annotated, Any, List, NamedTuple, NotRequired, Optional, Sequence, TypedDict
import numpy as np
import numpy.typing as npt
import flowlang
from flowlang import batched
"""
RECORDS = """
Vector = Annotated[np.ndarray, "tensor<f32, 4>"]
Words: t.TypeAlias = "list[str]"
class Found(TypedDict):
    a: int
    b: str | None
class Maybe(TypedDict, total=False):
    a: int
class More(Found):
    c: NotRequired[int]
class Point(NamedTuple):
    x: float
    y: float = 0.0
@dataclasses.dataclass(frozen=True)
class Shape:
    points: list[Point]
    name: Optional[str]
@dataclasses.dataclass
class Circle(Shape):
    SIDES: t.ClassVar[int] = 0
    r: "float"
    def area(self) -> float: return 3.0
@dataclasses.dataclass
class Ring(Circle):
    r: float
    hole: float = dataclasses.field(default=0.5, repr=False)
    marks: list[Point] = dataclasses.field(default_factory=list)
    told: int = dataclasses.field(repr=False)
    width: float = dataclasses.field(init=False)
    note: str | None = "none"
@dataclasses.dataclass
class Thin(Ring):
    hole: float
    told: int = 1
"""
FOUND = "{ a: int, b: str? }"
ANNOTATIONS: dict[str, str] = {
    "int": "int",
    "float": "float",
    "str": "str",
    "bool": "bool",
    "bytes": "bytes",
    "'box'": "box",
    "'list<{ a: int }>'": "list<{ a: int }>",
    "'image<rgb>'": "image<rgb, u8, hwc>",
    "'Found'": FOUND,
    "list[int]": "list<int>",
    "List[list[str]]": "list<list<str>>",
    "t.Sequence[bytes]": "list<bytes>",
    "int | None": "int?",
    "None | int": "int?",
    "Optional[int]": "int?",
    "t.Optional[list[int]]": "list<int>?",
    "t.Union[None, int]": "int?",
    "np.ndarray": "tensor<any>",
    "npt.NDArray[np.float32]": "tensor<any>",
    "np.ndarray[t.Any, np.dtype[np.float32]]": "tensor<any>",
    "Annotated[np.ndarray, 'tensor<f32, 3x?x?>']": "tensor<f32, 3x?x?>",
    "t.Annotated[np.ndarray, 'image', 'more']": "image<undecided, u8, hwc>",
    "Annotated[int, 3]": "int",
    "Vector": "tensor<f32, 4>",
    "list[Vector]": "list<tensor<f32, 4>>",
    "Any": "unknown",
    "Found": FOUND,
    "Maybe": "{ a: int? }",
    "More": "{ a: int, b: str?, c: int? }",
    "Point": "{ x: float, y: float }",
    "list[Shape]": "list<{ points: list<{ x: float, y: float }>, name: str? }>",
    "Circle": "{ points: list<{ x: float, y: float }>, name: str?, r: float }",
    "Ring": "{ points: list<{ x: float, y: float }>, name: str?, r: float, hole: float, "
    "marks: list<{ x: float, y: float }>, told: int, width: float, note: str? }",
}
_POINTS = "list<{ x: float, y: float? }>"
_RING = f"{{ points: {_POINTS}, name: str?, r: float, hole: float?, marks: {_POINTS}?"
# What may be left out of what is given to an operator, where that is not all the same.
TAKEN: dict[str, str] = {
    "Point": "{ x: float, y: float? }",
    "list[Shape]": f"list<{{ points: {_POINTS}, name: str? }}>",
    "Circle": f"{{ points: {_POINTS}, name: str?, r: float }}",
    "Ring": f"{_RING}, told: int, width: float?, note: str? }}",
    "Thin": f"{_RING.replace('hole: float?', 'hole: float')}, told: int?, width: float?, "
    "note: str? }",
}
ANNOTATIONS["Thin"] = ANNOTATIONS["Ring"]


def read(folder: Path, text: str) -> dict[str, Op]:
    """The operators of a Python file."""
    path = folder / "read.py"
    path.write_text(IMPORTS + RECORDS + text, "utf-8")
    problems: list[Diagnostic] = []
    file = read_python(path, "p", problems.append)
    assert file is not None
    assert not problems
    return file.operators


def spelled(kind: object) -> str:
    """A type with all its records spelled out."""
    from flowlang.plan.types import ListOf, Optional, Record

    if isinstance(kind, Record):
        return "{ " + ", ".join(f"{n}: {spelled(k)}" for n, k in kind.fields) + " }"
    if isinstance(kind, ListOf):
        return f"list<{spelled(kind.item)}>"
    return f"{spelled(kind.item)}?" if isinstance(kind, Optional) else str(kind)


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_what_an_annotation_says(furnished: Path, annotation: str) -> None:
    """An annotation is the type of what arrives, and of what comes out; batched, of one of them.

    Fields with defaults may be missing in what arrives.
    """
    taken = TAKEN.get(annotation, ANNOTATIONS[annotation])
    ops = read(
        furnished,
        f"def takes(x: {annotation}) -> int: ...\n"
        f"def gives(x: int) -> {annotation}: ...\n"
        f"@batched\ndef each(x: list[{annotation}]) -> list[{annotation}]: ...\n",
    )
    assert [op.function.problem for op in ops.values()] == [None] * 3
    assert spelled(ops["takes"].function.takes) == taken
    assert spelled(ops["gives"].function.gives) == ANNOTATIONS[annotation]
    each = ops["each"].function
    assert each.is_batched
    assert spelled(each.takes) == taken
    assert spelled(each.gives) == ANNOTATIONS[annotation]


@pytest.mark.parametrize(
    ("signature", "message", "place"),
    [
        ("f(x) -> int", "`x` has no type", "x"),
        ("f(x: int)", "`f` does not say what it gives", "def f(x: int): ..."),
        ("f(x: int) -> None", "an operator gives something", "None"),
        ("f() -> int", "`f` takes its item first, and then parameters with names", None),
        ("f(*x: int) -> int", "`f` takes its item first, and then parameters with names", None),
        ("f(x: int, **k: int) -> int", "`f` takes its item first, and then parameters", None),
        ("f(x: int, k: int = 3, /) -> int", "`k` of `f` has no name for callers", None),
        ("f(x: complex) -> int", "`complex` is no type of the language", "complex"),
        ("f(x: dict[str, int]) -> int", "`dict[str, int]` is no type", "dict[str, int]"),
        ("f(x: tuple[int, int]) -> int", "`tuple[int, int]` is no type", "tuple[int, int]"),
        ("f(x: int | str) -> int", "a type is one type, or one or None", "int | str"),
        ("f(x: t.Union[int, str]) -> int", "a type is one type, or one", "t.Union[int, str]"),
        ("f(x: t.Union[int]) -> int", "`t.Union[int]` is no type", "t.Union[int]"),
        ("f(x: int) -> list", "`list` is no type of the language", "list"),
        ("f(x: 'tensor<f32, many>') -> int", "no type of the language", "'tensor<f32, many>'"),
        ("f(x: 'nope') -> int", "`nope` is no type of the language", "'nope'"),
        ("f(x: list['a b']) -> int", "no type of the language", "'a b'"),
    ],
)  # fmt: skip
def test_what_a_signature_cannot_say(
    write: Write, signature: str, message: str, place: str | None
) -> None:
    """A function that cannot be an operator is told so where it is written, and only if used."""
    write("p.py", f"{IMPORTS}\ndef {signature}: ...\ndef fine(x: bytes) -> int: ...\n")
    assert kind('use "p.py" as p\nexport flow a = p.fine')
    (error,) = found('use "p.py" as p\nexport flow a = p.f')
    assert error.slug == "bad-signature"
    assert message in error.message
    assert error.span.source.name.endswith("p.py")
    assert place is None or error.span.text == place


@pytest.mark.parametrize(
    ("signature", "mended"),
    [
        ("f(x)", "f(x: bytes) -> str"),
        ("f(x, /, y, k=3, *, n=4)", "f(x: bytes, /, y: bytes, k=3, *, n=4) -> str"),
        ("f(x: 'int | None') -> int", "f(x: int | None) -> int"),
        ("f(x: 'list[Found]') -> int", "f(x: list[Found]) -> int"),
        ("f(x: int) -> tuple[int, int]", "f(x: int) -> list[int]"),
        ("f(x: t.Iterator[str]) -> int", "f(x: list[str]) -> int"),
    ],
)
def test_the_signature_that_is_proposed_is_one(write: Write, signature: str, mended: str) -> None:
    """Taking the help in place of what is wrong makes the function an operator."""
    text = f"{IMPORTS}{RECORDS}\ndef {signature}: ...\n"
    path = write("p.py", text)
    (error,) = found('use "p.py" as p\nexport flow a = p.f')
    span, help_text = error.span, (error.help or "").removesuffix(":")
    whole = f"{help_text}: ..." if help_text.startswith("def ") else help_text
    text = text[: span.start] + whole + text[span.end :]
    assert f"def {mended}: ..." in text
    path.write_text(text, "utf-8")
    assert kind('use "p.py" as p\nexport flow a = p.f')


def test_fields_that_an_operator_takes_are_picked_out_of_more(write: Write) -> None:
    """The help is a record of just those; not where the call names what it would leave behind."""
    write("p.py", "def f(x: int, y: int, *, z: int = 0) -> int: ...\n")
    flow = 'use "p.py" as p\nexport flow a: { y: int, q: int, x: int } -> int = '
    (error,) = found(flow + "p.f(z=3)")
    assert error.help == "{ x: .x, y: .y } -> p.f(z=3)"
    assert kind(flow + error.help)
    (error,) = found(flow + "p.f(z=.q)")
    assert error.help is None


def test_a_type_that_cannot_be_read_is_told_where_a_flow_names_it(write: Write) -> None:
    """The reason is the file's; no other type is proposed for it."""
    write("p.py", f"{IMPORTS}class R(TypedDict):\n    c: complex\ndef r(x: int) -> R: ...\n")
    for name in ("R", "r"):
        error = told(f'use "p.py" as p\nexport flow f: p.{name} -> int = .c')
        assert "`complex` is no type of the language" in error
        assert "p.py:" in error


def test_a_default_that_cannot_be_read_is_left_to_python(write: Write) -> None:
    """What is no literal, or none that could be made, is the function's own affair."""
    write("p.py", "def f(x: int, *, d: dict = {[1]: 2}, e: int = len('abc')) -> int: ...\n")
    assert kind('use "p.py" as p\nexport flow a = p.f(e=4)') == "int -> int"


def test_a_record_that_cannot_be_read_is_told_alike_to_all_who_use_it(write: Write) -> None:
    """The reason is the field's, however often the record is asked for."""
    write(
        "p.py",
        IMPORTS + "class R(TypedDict):\n    c: complex\n"
        "def a(x: int) -> R: ...\ndef b(x: int) -> R: ...\nclass Ring(TypedDict):\n    r: Ring\n"
        "def c(x: int) -> list[Ring]: ...\n",
    )
    errors = found('use "p.py" as p\nexport flow f = p.a\nexport flow g = p.b\nexport flow h = p.c')
    assert {d.message for d in errors} == {
        "`complex` is no type of the language",
        "`Ring` would hold itself",
    }


def test_only_functions_at_the_top_are_operators(furnished: Path) -> None:
    """Not those with a leading underscore, methods, classes, names, or what runs under an `if`."""
    ops = read(
        furnished,
        "def _own(x: int) -> int: ...\nname = len\nlow = lambda x: x\nclass C:\n"
        "    def method(self, x: int) -> int: ...\nif True:\n    def later(x: int) -> int: ...\n"
        'def f(x: int) -> int:\n    """Does it.\n\n    Well."""\n'
        "    def inner(y: int) -> int: ...\n",
    )
    assert list(ops) == ["f"]
    assert ops["f"].doc == "Does it."


def test_reading_runs_nothing(write: Write) -> None:
    """A file is read for checking, never run."""
    write("p.py", "raise SystemExit('run')\ndef f(x: int) -> int: ...\n")
    assert kind('use "p.py" as p\nexport flow a = p.f') == "int -> int"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(x: int) -> int\n    return x\n", "this is no Python"),
        ("\0", "this is no Python: it holds null bytes"),
        ("x = " + "(" * 1000, "this is no Python"),
        ("x = " + "-" * 100_000 + "1", None),
    ],
)
def test_files_that_are_no_python(write: Write, text: str, words: str | None) -> None:
    """A broken file is told once, at its place, and what mentions it is let pass."""
    write("p.py", text)
    errors = found('use "p.py" as p\nexport flow a = p.f -> p.g(3)')
    if words is not None:
        assert [d.slug for d in errors] == ["not-python"]
        assert words in errors[0].message


def test_a_file_that_is_no_text_is_read_as_far_as_it_goes(furnished: Path) -> None:
    """Bytes that are no UTF-8 spoil no function beside them."""
    (furnished / "p.py").write_bytes(b"# caf\xe9\ndef f(x: int) -> int: ...\n")
    assert kind('use "p.py" as p\nexport flow a = p.f') == "int -> int"


# Arguments of Python operators

ARGUMENTS = """
def f(x: int, scale: float = 1.0, sure: bool = False, n: int = 3, *, mode: str = "a",
      items: list[int] = [1], m: int | None = None, free=None, function: str = "a",
      rows: list[list[float]] = []) -> int: ...
def needs(x: int, *, side: int) -> int: ...
def two(a: int, b: str, *, k: int = 1) -> int: ...
"""
FITS = (
    *("f", "f(2)", "f(0.5, true)", "f(50%, sure, 4)", "f(sure)", "f(2, false, 4)", "f(n=4)"),
    *("f(rows=[[1, 0.5], []])", 'f(function="b")', "f(items=[])", "f(items=[k])"),
    *('f(mode="b")', "f(items=[1, 2])", "f(m=3)", "f(free=3)", 'f(free="a")', "needs(side=3)"),
    *("f(k)", "f(n=k)", "f(n=k + 1)", "f(scale=k / 2)", "f(m=k)", "f(free=in)", "needs(side=k)"),
    *("f(batch=1..4)", "f(timeout=5s)", "f(wait=2ms)", "f x4"),
)
MISFITS: dict[str, tuple[str, str]] = {
    "f(true)": ("wrong-kind", "`scale` of `p.f` is a number, and `true` is true or false"),
    "f(1, 3)": ("wrong-kind", "`sure` of `p.f` is true or false, and `3` is a number"),
    "f(1, true, 2, 3)": ("too-many-arguments", "`p.f` takes `mode` by name"),
    'f(mode="a", mode="b")': ("given-twice", "`mode` of `p.f` is given twice"),
    "f(1, scale=2)": ("given-twice", "`scale` of `p.f` is given twice"),
    "f(mode=b)": ("wrong-kind", "`mode` of `p.f` is a string, and `b` is a word"),
    "f(sides=3)": ("unknown-parameter", "`p.f` has no parameter `sides`"),
    "f(x=3)": ("unknown-parameter", "`p.f` has no parameter `x`"),
    "f(fast)": ("unknown-word", "`fast` is no word of `p.f` and no param in scope"),
    "f(n=0.5)": ("wrong-kind", "`n` of `p.f` is a whole number, and `0.5` is a number with a"),
    "f(n=k / 2)": ("wrong-kind", "`n` of `p.f` is a whole number, and `k / 2` gives float"),
    'f(m="a")': ("wrong-kind", '`m` of `p.f` is int?, and `"a"` is a string'),
    "f(m=k / 2)": ("wrong-kind", "`m` of `p.f` is int?, and `k / 2` gives float"),
    "f(items=5)": ("wrong-kind", "`items` of `p.f` is list<int>, and `5` is a number"),
    'f(items=["a"])': ("wrong-kind", "`items` of `p.f` is list<int>, and"),
    'f(items=[1, "a"])': ("wrong-kind", "`items` of `p.f` is list<int>, and"),
    "f(items=[foo, bar])": ("unknown-name", "there is no param named `foo`"),
    "f(rows=[1])": ("wrong-kind", "`rows` of `p.f` is list<list<float>>, and `[1]` is a list"),
    "f(gpu=1)": ("unknown-parameter", "`p.f` has no parameter `gpu`"),
    "needs": ("missing-parameter", "`p.needs` needs its `side`"),
    "needs(3)": ("too-many-arguments", "`p.needs` takes `side` by name"),
    "two": ("type-mismatch", "`p.two` cannot take what the flow's input gives"),
}
AROUND = 'use "p.py" as p\nexport flow a(k: int = 2): int -> int {{ return in -> p.{} }}'


@pytest.mark.parametrize("call", FITS)
def test_arguments_fit(write: Write, call: str) -> None:
    """By position as in Python, by name, bare words for flags, and live ones."""
    write("p.py", ARGUMENTS)
    assert kind(AROUND.format(call)) == "int -> int"


@pytest.mark.parametrize("call", MISFITS)
def test_arguments_do_not_fit(write: Write, call: str) -> None:
    """One wrong argument is one error, with the operator's name as it is mentioned."""
    write("p.py", ARGUMENTS)
    slug, message = MISFITS[call]
    errors = [d for d in found(AROUND.format(call)) if d.slug != "missing-parameter"]
    errors = errors or found(AROUND.format(call))
    assert [d.slug for d in errors] == [slug]
    assert message in errors[0].message


def test_an_item_may_have_no_name_for_callers(write: Write) -> None:
    """Items are given by position, whatever they are called."""
    write("p.py", "def f(a: int, b: str, /, *, k: int = 1) -> int: ...\n")
    assert kind('use "p.py" as p\nexport flow a = p.f(k=3)') == "{ a: int, b: str } -> int"


def test_several_items_are_a_record(write: Write) -> None:
    """In any order of fields, with all of them and no others."""
    write("p.py", ARGUMENTS)
    text = 'use "p.py" as p\nexport flow a{} = p.two'
    assert kind(text.format("")) == "{ a: int, b: str } -> int"
    assert kind(text.format(": { b: str, a: int } -> int")) == "{ b: str, a: int } -> int"
    for wrong in ("{ a: int }", "{ a: int, b: str, c: int }", "{ a: float, b: str }"):
        assert "cannot take" in told(text.format(f": {wrong} -> int"))


def test_a_result_has_its_type_on_the_way(write: Write) -> None:
    """An operator's name is the type it gives, and its result flows on as any value."""
    write("p.py", IMPORTS + RECORDS + "def look(x: bytes) -> Found: ...\n"
          "def see(image: 'image') -> Annotated[np.ndarray, 'image<rgb>']: ...\n"
          "def find(image: np.ndarray) -> 'list<box>': ...\n")  # fmt: skip
    use = 'use "p.py" as p\n'
    assert kind(use + "export flow f: bytes -> p.look = p.look") == "bytes -> Found"
    assert kind(use + "export flow f: bytes -> p.Found = p.look") == "bytes -> Found"
    assert kind(use + 'export flow f = p.look -> .b ?? "none"') == "bytes -> str"
    text = "export flow f {\n  let seen = in -> decode -> p.see\n"
    text += "  return seen -> p.find -> map(crop(seen) -> resize(8))\n}"
    assert kind(use + text) == "bytes -> list<image<rgb, u8, hwc, 8x8>>"
    assert "there is no type `p.see2`" in told(use + "export flow f: bytes -> p.see2 = decode")


def test_python_operators_are_stages_of_their_own(write: Write) -> None:
    """One instance and no batch, unless they are batched or it is written; and a timeout."""
    write("p.py", "from flowlang import batched\ndef f(x: int) -> int: ...\n"
          "@batched\ndef g(x: list[int]) -> list[int]: ...\n")  # fmt: skip
    text = (
        'use "p.py" as p\nflow h = p.f\nflow i = p.g(batch=1..8) x2\n'
        "export flow a: int -> int = p.f -> p.f -> p.g -> h -> h -> i\n"
        "schedule { h(timeout=2s) x3 }"
    )
    shapes = [(s.name, s.batch, s.instances, s.timeout_s) for s in physical(text).stages]
    assert shapes == [
        ("p.f", (1, 1, 1), 1, 30.0),
        ("p.f", (1, 1, 1), 1, 30.0),
        ("p.g", (1, 64, 64), 1, 30.0),
        ("p.f", (1, 1, 1), 3, 2.0),
        ("p.g", (1, 8, 8), 2, 30.0),
    ]


def test_python_files_are_read_beside_their_flow(write: Write) -> None:
    """Another file's operators are reached through it, and are the same ones."""
    write("lib/ops.py", "def f(x: int) -> int: ...\n")
    write("lib/ops.flow", 'use "ops.py" as ops\nflow h = ops.f')
    text = 'use "lib/ops.flow" as lib\nuse "lib/ops.py" as ops\nexport flow a = lib.ops.f -> ops.f'
    assert kind(text) == "int -> int"
    assert kind('use "lib/ops.flow" as lib\nexport flow a = lib.h -> lib.h') == "int -> int"


# What Python files import


def test_files_that_a_python_file_imports_are_files_of_the_plan(write: Write) -> None:
    """All that would be run, of its folder: packages on the way too, and circles end."""
    write(
        "lib/ops.py",
        "import os, near\ndef f(x: int) -> int:\n    from pack import leaf\n    return x\n",
    )
    write("lib/near.py", "import ops\nfrom pack.deep.down import x\nimport broken, missing\n")
    write("lib/broken.py", "def\n")
    (write("lib/notes.txt", "").parent / "pack" / "deep").mkdir(parents=True, exist_ok=True)
    for name in ("__init__", "leaf", "side", "deep/down"):
        write(f"lib/pack/{name}.py", "")
    write("lib/pack/leaf.py", "from . import side\nfrom .deep import down\n")
    files = plan('use "lib/ops.py" as ops\nexport flow f = ops.f\n').files
    folder = Path("lib").resolve()
    names = ("near", "broken", "pack/__init__", "pack/leaf", "pack/side", "pack/deep/down")
    assert {str(folder / f"{name}.py") for name in (*names, "ops")} == {*files} - {"app.flow"}
