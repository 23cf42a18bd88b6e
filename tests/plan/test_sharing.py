"""Several files planned together: a model that two of them name is one stage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from flowlang.diagnostics import CompileError, FlowError, Source
from flowlang.plan.check import compile_source
from flowlang.plan.explain import explain_physical
from flowlang.plan.files import compile_files
from flowlang.plan.graph import PACK
from flowlang.plan.physical import Machine, PhysicalPlan, lower
from tests.standins import furnish, write_model

CPU, GPU = Machine(4), Machine(8, "gpu", (0, 1))
HEAD = "decode -> resize(224) -> rgb -> normalize(imagenet)"
OTHER = "decode -> resize(256) -> crop(224) -> rgb -> normalize(imagenet)"
CATS = f'export flow cats = {HEAD} -> trt("small.onnx") -> best'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(furnish(tmp_path))
    return tmp_path


def together(*texts: str, machine: Machine = CPU) -> PhysicalPlan:
    """The plan of several files' texts."""
    files = (Source(f"file{number}.flow", text) for number, text in enumerate(texts))
    return lower([compile_source(file) for file in files], machine)


def stages_of(plan: PhysicalPlan) -> Mapping[str, list[int]]:
    """The numbers of each flow's stages, as they come."""
    return {p.name: list(p.steps.stages()) for p in plan.programs}


def models_of(plan: PhysicalPlan) -> list[str]:
    """The names of the stages that have a model."""
    return [stage.name for stage in plan.stages if stage.model is not None]


def test_equal_work_of_two_files_is_one_stage() -> None:
    """What two files do in the same way from picture to answer is one stage, named by its model."""
    plan = together(CATS, CATS.replace("cats", "dogs"))
    assert stages_of(plan) == {"cats": [0], "dogs": [0]}
    assert [stage.name for stage in plan.stages] == ["small"]
    assert [p.source.name for p in plan.plans] == ["file0.flow", "file1.flow"]


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_answers_made_differently_part_behind_the_model(machine: Machine) -> None:
    """Files that ask a model for different things share all up to it, decoding included."""
    dogs = CATS.replace("cats", "dogs").replace("best", "top(3)")
    plan = together(CATS, dogs, machine=machine)
    assert stages_of(plan) == {"cats": [0, 1], "dogs": [0, 2]}
    assert [node.op for node in plan.stages[0].nodes][:2] == ["decode", "resize"]
    assert [stage.nodes[0].op for stage in plan.stages[1:]] == ["best", "top"]


def test_pictures_prepared_differently_meet_at_the_model() -> None:
    """On a CPU, files that only have the model in common share it with its packing."""
    dogs = f'export flow dogs = {OTHER} -> trt("small.onnx") -> best'
    plan = together(CATS, dogs)
    assert stages_of(plan) == {"cats": [0, 1], "dogs": [2, 1]}
    assert [node.op for node in plan.stages[1].nodes] == [PACK, "trt", "best"]


def test_a_gpu_that_decodes_keeps_its_pictures() -> None:
    """Where sharing would take decoding off the GPU, each file has a stage of its own."""
    dogs = f'export flow dogs = {OTHER} -> trt("small.onnx") -> best'
    plan = together(CATS, dogs, machine=GPU)
    assert models_of(plan) == ["cats", "dogs"]
    assert {stage.device for stage in plan.stages} == {"gpu"}
    on_host = together(*(text.replace("decode", "decode(libjpeg)") for text in (CATS, dogs)),
                       machine=GPU)  # fmt: skip
    assert models_of(on_host) == ["small"]


def test_a_model_is_the_file_that_its_path_leads_to(folder: Path) -> None:
    """Other names of a file, links too, are the same model; a copy is another one."""
    os.symlink("small.onnx", "link.onnx")
    Path("copy.onnx").write_bytes(Path("small.onnx").read_bytes())
    for name, count in (("./small.onnx", 1), ("link.onnx", 1), ("copy.onnx", 2)):
        dogs = CATS.replace("cats", "dogs").replace("small.onnx", name)
        assert len(together(CATS, dogs).stages) == count, name


def test_a_model_that_changed_between_two_files_is_two() -> None:
    """A model is what its file held when it was read."""
    first = compile_source(Source("a.flow", CATS))
    image = ("data", "f32", ("N", 3, 224, 224))
    write_model(Path("small.onnx"), [image], [("logits", "f32", ("N", 7))])
    second = compile_source(Source("b.flow", CATS.replace("cats", "dogs")))
    assert len(lower([first, second], CPU).stages) == 2


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("batch=1..8", "batch=1..8", 1),
        ("batch=1..8", "batch=1..4", 2),
        ("batch=1..8", "fp16, batch=1..8", 2),
        ("timeout=1s", "timeout=1000ms", 1),
        ("timeout=1s", "timeout=2s", 2),
    ],
)
def test_settings_have_to_be_the_same(one: str, other: str, count: int) -> None:
    """Files share a model that they want batched, placed and computed in the same way."""
    texts = (CATS.replace('onnx"', f'onnx", {one}'), CATS.replace('onnx"', f'onnx", {other}'))
    plan = together(texts[0], texts[1].replace("cats", "dogs"))
    assert len(models_of(plan)) == count


def test_settings_of_requests_may_differ() -> None:
    """Deadlines, queues and priorities are of a flow, and do not keep files from sharing."""
    dogs = f"{CATS.replace('cats', 'dogs')}\nschedule {{ dogs(slo=50ms, queue=9, priority=low) }}"
    plan = together(CATS, dogs)
    assert len(plan.stages) == 1
    told = [(p.slo_s, p.queue, p.priority) for p in plan.programs]
    assert told == [(None, 256, 2), (0.05, 9, 3)]


def test_what_a_file_has_twice_it_has_twice() -> None:
    """A model written twice in a file is two stages; another file shares the first of them."""
    twice = 'export flow twice = trt("vector.onnx") -> { a: pass, b: pass }\n'
    twice += 'export flow again = trt("vector.onnx") -> { c: pass }'
    once = 'export flow once = trt("vector.onnx") -> { d: pass }'
    both = together(twice, once)
    assert stages_of(both) == {"twice": [0], "again": [1], "once": [0]}
    assert stages_of(together(twice)) == {"twice": [0], "again": [1]}
    four = together(twice, twice.replace("twice", "more").replace("again", "most"))
    assert stages_of(four) == {"twice": [0], "again": [1], "more": [0], "most": [1]}


def test_a_flow_that_two_files_use_is_one_stage(folder: Path) -> None:
    """A model in a file that both of them use is shared, under the name it has there for both."""
    Path("nets.flow").write_text('flow net = trt("small.onnx", batch=1..8) -> softmax')
    cats = f'use "nets.flow" as nets\nexport flow cats = {HEAD} -> nets.net -> best'
    plan = together(cats, cats.replace("cats", "dogs").replace("best", "top(2)"))
    assert models_of(plan) == ["nets.net"]
    assert stages_of(plan) == {"cats": [0, 1], "dogs": [0, 2]}


def test_operators_without_a_model_are_not_shared(folder: Path) -> None:
    """Decoding alone has a stage in each file."""
    cats = "export flow cats = decode -> resize(32) -> rgb"
    assert stages_of(together(cats, cats.replace("cats", "dogs"))) == {"cats": [0], "dogs": [1]}


def test_the_stages_of_all_files_are_explained() -> None:
    """Each flow names its file, and a shared stage is printed once, with what all of them say."""
    text = explain_physical(together(f"param k = 2\n{CATS}", CATS.replace("cats", "dogs")))
    assert text.count("trt(") == 1
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("flow ")] == [
        "file0.flow:2",
        "file1.flow:1",
    ]
    assert "stage 1 small" in text
    assert "param k = 2  (file)" in text


def test_files_are_compiled_together(folder: Path) -> None:
    """All errors of all files are told at once, and so are two flows of one name."""
    for name, text in (("a", CATS), ("b", CATS), ("c", "resise(2)"), ("d", "trt(3)")):
        Path(f"{name}.flow").write_text(text)
    with pytest.raises(FlowError, match=r"a\.flow and b\.flow both serve a flow named `cats`"):
        compile_files(["a.flow", "b.flow"])
    with pytest.raises(CompileError) as caught:
        compile_files(["a.flow", "c.flow", "d.flow"])
    assert [d.span.source.name for d in caught.value.diagnostics] == ["c.flow", "d.flow"]
