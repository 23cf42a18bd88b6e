"""Sessions on real models: how many threads a run gets, and that it never shows in an answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, save_model

import flowlang
from examples import models
from flowlang.plan.physical import StagePlan
from flowlang.runtime.cpu import CpuInstance
from flowlang.runtime.ort import Session, Sessions
from tests.simulation import plan_of

Array: TypeAlias = NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.resnet(root / "small.onnx", depth=18, width=8, classes=10, size=64)
    return root


def sessions_of(text: str, folder: Path, cores: int) -> tuple[Sessions, Session]:
    """The sessions of a flow planned for so many cores, and that of its model."""
    stages = plan_of(text, folder, cores).stages
    sessions = Sessions(cores, stages)
    return sessions, session_of(stages, sessions)


def session_of(stages: Sequence[StagePlan], sessions: Sessions) -> Session:
    """The session of the only model of some stages."""
    (model,) = (s.model for s in stages if s.model is not None)
    return sessions.of(model)


def threads_by_crowd(sessions: Sessions, session: Session, most: int) -> list[int]:
    """The threads a run may use with 1, 2, ... instances at work."""
    found = []
    with ExitStack() as work:
        for _ in range(most):
            work.enter_context(sessions.at_work)
            found.append(session.threads)
    assert sessions.at_work.count == 0
    return found


def test_a_run_takes_all_cores_until_runs_fill_them(folder: Path) -> None:
    """Alone or with cores to spare a run uses all of them; where every core has a run, one."""
    for cores, expected in ((2, [2, 1, 1]), (4, [4, 4, 4, 1, 1])):
        sessions, session = sessions_of('trt("small.onnx")', folder, cores)
        assert threads_by_crowd(sessions, session, cores + 1) == expected


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ('trt("small.onnx") x1', 2),  # a single caller
        ('trt("small.onnx") x2', 4),  # two that cannot fill four cores
        ('trt("small.onnx")', 1),
    ],
)
def test_no_weights_are_held_twice_for_nothing(folder: Path, text: str, cores: int) -> None:
    """A model whose calls never fill the cores has no session for that case."""
    sessions, session = sessions_of(text, folder, cores)
    assert threads_by_crowd(sessions, session, 4) == [cores] * 4


def test_an_instance_counts_while_it_works(folder: Path) -> None:
    """One instance in its preprocessing or its model makes another's run narrow, and no longer."""
    text = 'decode -> resize(64) -> rgb -> trt("small.onnx")'
    stages = plan_of(text, folder, 2).stages
    sessions = Sessions(2, stages)
    instance = CpuInstance(stages[0], sessions)
    session = session_of(stages, sessions)
    entered, leave, seen = threading.Event(), threading.Event(), []

    def work(value: Any) -> Any:
        entered.set()
        assert leave.wait(10)
        raise ValueError("not a picture")

    instance.before.works.insert(0, work)
    thread = threading.Thread(target=lambda: seen.append(instance.run([b""])))
    thread.start()
    assert entered.wait(10)
    with sessions.at_work:
        assert session.threads == 1
    leave.set()
    thread.join()
    assert isinstance(seen[0][0], ValueError)
    with sessions.at_work:
        assert session.threads == 2


def test_the_crowd_never_shows_in_an_answer(folder: Path) -> None:
    """On one thread, on all cores, or warming up, a model gives the same answers."""
    sessions, session = sessions_of('trt("small.onnx")', folder, 2)
    feeds = {"data": np.random.default_rng(0).random((3, 3, 64, 64), np.float32)}
    answers: list[Sequence[Array]] = [session.run(feeds), session.warm(feeds)]
    with sessions.at_work, sessions.at_work:
        answers.append(session.run(feeds))
    for answer in answers[1:]:
        np.testing.assert_allclose(answer[0], answers[0][0], rtol=1e-4, atol=1e-5)


def test_what_a_model_fails_with_is_raised_and_not_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server's log is its own: a request's bad number puts no coloured text between its lines."""
    words = numpy_helper.from_array(np.zeros((4, 2), np.float32), "words")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["words", "ids"], ["rows"])],
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "S"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["N", "S", 2])],
        initializer=[words],
    )
    opsets = [helper.make_opsetid("", models.OPSET)]
    model = helper.make_model(graph, ir_version=models.IR_VERSION, opset_imports=opsets)
    save_model(model, tmp_path / "embedding.onnx")
    (tmp_path / "app.flow").write_text('trt("embedding.onnx")\n')
    with flowlang.load(tmp_path / "app.flow", device="cpu") as app:
        with pytest.raises(flowlang.StageFailed, match="idx=4 must be within"):
            app(np.array([1, 4], np.int64))
        assert app(np.array([1, 3], np.int64)).shape == (2, 2)
    assert capfd.readouterr() == ("", "")
