"""What `flowlang explain` prints: the plan of each program under tests/golden, and its stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowlang.diagnostics import CompileError, Source
from flowlang.plan.check import NO_CHOICES, Plan, compile_source
from flowlang.plan.declare import Choices
from flowlang.plan.explain import explain_physical, explain_plan
from flowlang.plan.physical import Machine, lower
from tests.cases import REGENERATE

pytestmark = pytest.mark.usefixtures("folder")

GOLDEN = Path(__file__).parents[1] / "golden"
PROGRAMS = sorted(GOLDEN.glob("*.flow"))
EACH_PROGRAM = pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
CPU, GPU = Machine(4), Machine(8, "gpu", (0, 1))


def compiled(file: Path, choices: Choices = NO_CHOICES) -> Plan:
    return compile_source(Source(file.name, file.read_text("utf-8")), choices)


def compare(text: str, name: str) -> None:
    """Hold a text against the golden file of this name."""
    golden = GOLDEN / f"{name}.txt"
    if REGENERATE:
        golden.write_text(text, "utf-8")
    assert text == golden.read_text("utf-8")


@EACH_PROGRAM
def test_the_plan_is_explained(file: Path) -> None:
    """Operators, types and inserted conversions are printed as they stand in the golden file."""
    compare(explain_plan(compiled(file)), f"{file.stem}.plan")


@EACH_PROGRAM
def test_the_stages_on_a_cpu_are_explained(file: Path) -> None:
    """Stages, batches and instances for four cores are printed as in the golden file."""
    plan = compiled(file)
    compare(explain_physical(lower([plan], CPU)), f"{file.stem}.cpu")


@pytest.mark.parametrize("name", ["smallest", "scheduled", "fanout", "fixed"])
def test_the_stages_on_gpus_are_explained(name: str) -> None:
    """The same file planned for two GPUs is printed as in the golden file."""
    plan = compiled(GOLDEN / f"{name}.flow")
    compare(explain_physical(lower([plan], GPU)), f"{name}.gpu")


def test_a_named_schedule_is_laid_over_the_unnamed_one() -> None:
    """What `--schedule prod` sets replaces what the unnamed block set, and leaves the rest."""
    plan = compiled(GOLDEN / "shared.flow", Choices({}, {}, "prod"))
    compare(explain_physical(lower([plan], CPU)), "shared.prod")


def test_the_origin_of_each_param_is_shown() -> None:
    """`explain` tells the file's defaults, the environment's values and `--set` apart."""
    choices = Choices({"size": "224", "is_exact": "false"}, {"MODELS": "models", "SIZE": "1"})
    text = explain_plan(compiled(GOLDEN / "params.flow", choices))
    shown = [line for line in text.splitlines() if line.startswith("param ")]
    assert shown == [
        'param models = "models"  (environment)',
        "param size = 224  (--set)",
        "param pause = 2ms  (file)",
        "param room = 512MiB  (file)",
        "param sizes = 1..4..8  (file)",
        "param is_exact = false  (--set)",
    ]


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("match .n { 1 => 1, else => 0 }", ["match", "when 1"]),
        ("match .n { 0 => 1, 1 => 2, else => 0 }", ["match", "when 0", "when 1"]),
        ("if .b then 1 else 0", ["if", "when true"]),
        ("match .b { false => 1, else => 0 }", ["match", "when false"]),
        ('match .s { "a\\"{{" => 1, else => 0 }', ["match", 'when "a\\"{{"']),
    ],
)
def test_choices_are_shown_as_they_are_written(body: str, lines: list[str]) -> None:
    """`if` and `match` are told apart, and the values of a `match` are those of the language."""
    text = explain_plan(
        compile_source(Source("app.flow", f"flow f: {{ n: int, b: bool, s: str }} -> int = {body}"))
    )
    printed = [line.split("  of ")[0] for line in text.splitlines()]
    assert printed[2].split()[-1] == lines[0]
    for when in lines[1:]:
        assert any(when in line for line in printed)


def test_texts_are_shown_as_they_are_written() -> None:
    """Quotes, backslashes and braces in arguments, values and params are escaped."""
    text = (
        'param sign = "\\"{{\\\\\\n"\nparam signs = ["a", true]\n'
        'flow f: list<str> -> { a: str, b: str } = { a: join(", \\""), b: sign }'
    )
    printed = explain_plan(compile_source(Source("app.flow", text)))
    assert 'join(", \\"")' in printed
    assert 'param sign = "\\"{{\\\\\\n"  (file)' in printed
    assert 'param signs = ["a", true]  (file)' in printed


def test_the_same_program_always_gives_the_same_text() -> None:
    """Nothing in the text depends on the run: no address, no order of a set."""
    for file in PROGRAMS:
        first, second = compiled(file), compiled(file)
        assert explain_plan(first) == explain_plan(second)
        texts = [explain_physical(lower([plan], CPU)) for plan in (first, second)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("setting", "gpus", "place"),
    [
        ("", (0, 1), "gpu:0 x3"),
        ("", (1,), "gpu:1 x3"),
        (", gpu=1", (0, 1), "gpu:1 x3"),
        (", gpu=1..1", (1,), "gpu:1 x3"),
        (", gpu=1..3", (0, 1, 2, 3), "gpu:1..3 x6"),
    ],
)
def test_a_stage_says_which_gpus_it_runs_on(
    setting: str, gpus: tuple[int, ...], place: str
) -> None:
    """The first of those that the device leaves, where the flow does not name any."""
    text = f'decode -> resize(224) -> rgb -> trt("resnet50.onnx"{setting})'
    plan = compile_source(Source("app.flow", text))
    assert f" {place}  batch " in explain_physical(lower([plan], Machine(8, "gpu", gpus)))


def test_a_gpu_that_the_device_leaves_alone_is_not_there() -> None:
    """`--device gpu:1` is no leave to run on another one."""
    plan = compile_source(Source("app.flow", 'trt("vector.onnx", gpu=0)'))
    with pytest.raises(CompileError, match=r"there is no gpu 0 to run on \(there is 1\)"):
        lower([plan], Machine(8, "gpu", (1,)))
