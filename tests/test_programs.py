"""The ten programs of the language: they check, are explained, and answer for real pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowlang
from flowlang.diagnostics import render
from flowlang.plan.explain import explain_physical, explain_plan
from flowlang.plan.files import compile_file
from flowlang.plan.physical import Machine, lower
from tests.furnish import furnish
from tests.pictures import photographs

NAMES = (
    *("p01_smallest", "p02_schedule", "p03_params", "p04_fanout", "p05_fallback", "p06_routing"),
    *("p07_map", "p08_cascade", "p09_imports", "p10_street"),
)
PICTURES = photographs(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("programs"))


@pytest.fixture(autouse=True)
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that ask the environment where their models are find them beside themselves."""
    monkeypatch.delenv("MODELS", raising=False)


@pytest.fixture
def load(folder: Path) -> Iterator[Callable[..., flowlang.App]]:
    apps: list[flowlang.App] = []

    def start(name: str, **options: Any) -> flowlang.App:
        apps.append(flowlang.load(folder / f"{name}.flow", device="cpu", **options))
        return apps[-1]

    yield start
    for app in apps:
        app.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_program_checks_and_is_explained(folder: Path, name: str) -> None:
    """No program has an error, and both plans of each can be printed, on a CPU and on GPUs."""
    found = [d for d in flowlang.check(folder / f"{name}.flow") if d.severity == "error"]
    assert not [render(d) for d in found]
    plan = compile_file(folder / f"{name}.flow")
    assert explain_plan(plan).startswith("flow ")
    for machine in (Machine(2), Machine(16, "gpu", (0, 1))):
        assert "stage 1 " in explain_physical(lower([plan], machine))


def test_a_named_schedule_lies_over_the_unnamed_one(folder: Path) -> None:
    """`--schedule prod` of the street program spreads its detector over both GPUs."""
    plan = compile_file(folder / "p10_street.flow", schedule="prod")
    stages = {s.name: s for s in lower([plan], Machine(16, "gpu", (0, 1))).stages}
    assert stages["detect"].gpus == (0, 1, 0, 1)
    assert stages["detect"].batch == (1, 8, 8)
    assert set(stages["ocr"].gpus) == {1}


def test_classifiers_agree_with_each_other(load: Callable[..., flowlang.App]) -> None:
    """Programs 1, 2, 3 and 9 say what they say whichever way they are written."""
    scores = load("p01_smallest")(PICTURES[0], deadline_s=60.0)
    assert scores.shape == (1000,)
    best = load("p02_schedule")(PICTURES[0])
    named = load("p03_params", values={"size": 224})(PICTURES[0])
    assert [b["index"] for b in best] == [b["index"] for b in named]
    assert named[0]["label"] == f"class {named[0]['index']}"
    app = load("p09_imports")
    assert len(app["classify"](PICTURES[0])) == 5
    three = app["classify"](PICTURES[0], k=3)
    assert three == app["classify"](PICTURES[0])[:3]


def test_one_decode_feeds_three_models(load: Callable[..., flowlang.App]) -> None:
    """Program 4 answers with a record of what its three models say."""
    answer = load("p04_fanout")(PICTURES[0])
    assert list(answer) == ["scene", "unsafe", "vector"]
    assert answer["unsafe"].sum() == pytest.approx(1.0, abs=1e-4)
    assert np.linalg.norm(answer["vector"]) == pytest.approx(1.0, abs=1e-5)


def test_a_picture_that_nobody_decodes_fails_whatever_it_falls_back_to(
    load: Callable[..., flowlang.App],
) -> None:
    """Program 5: both decoders fail on no picture, and the last one's reason is told."""
    app = load("p05_fallback")
    assert len(app(PICTURES[0], deadline_s=60.0)) == 5
    with pytest.raises(flowlang.BadRequest, match="decode failed") as caught:
        app(b"no picture")
    assert "p05_fallback.flow:3:42" in str(caught.value)


def test_long_lines_are_cut_and_short_ones_are_not(load: Callable[..., flowlang.App]) -> None:
    """Program 6: both ways give text, and the long way reads every piece."""
    import cv2

    app = load("p06_routing")
    picture: Any = cv2.imdecode(np.frombuffer(PICTURES[0], np.uint8), 1)
    line = cv2.resize(picture, (2000, 40))
    long = cv2.imencode(".png", line)[1].tobytes()
    short = cv2.imencode(".png", line[:, :512])[1].tobytes()
    assert isinstance(app(short), str)
    pieces = [line[:, at : at + 512] for at in (0, 480, 960, 1440)]
    pieces.append(line[:, -512:])
    read = [app(cv2.imencode(".png", piece)[1].tobytes()) for piece in pieces]
    assert app(long) == "".join(read)


def test_crops_are_classified_where_they_lie(load: Callable[..., flowlang.App]) -> None:
    """Programs 7 and 8: boxes in the coordinates of the picture, with what their crops show."""
    dogs = load("p07_map")(PICTURES[1])
    assert all(d["label"] == "dog" and d["score"] > 0.5 for d in dogs)
    assert all(set(d) == {"box", "label", "score", "breed"} for d in dogs)
    objects = load("p08_cascade")(PICTURES[1], deadline_s=60.0)
    assert objects
    for found in objects:
        left, top, right, bottom = found["box"]
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 375
        assert set(found["class"]) == {"res", "vit"}


def test_two_pictures_are_compared(load: Callable[..., flowlang.App]) -> None:
    """Program 9: a parameter may be a picture too, and Python sees both."""
    app = load("p09_imports")
    assert app["same_person"](PICTURES[0], other=PICTURES[0]) == pytest.approx(1.0)
    assert app["same_person"](PICTURES[0], other=PICTURES[1]) < 1.0
    with pytest.raises(flowlang.BadRequest, match="needs its parameter `other`"):
        app["same_person"](PICTURES[0])


def test_a_street_is_described(load: Callable[..., flowlang.App]) -> None:
    """Program 10: objects of different kinds have different fields filled in, the rest is null."""
    app = load("p10_street", values={"min_score": 0.2})
    kinds: set[str] = set()
    for picture in PICTURES:
        answer = app(picture, deadline_s=120.0)
        assert answer["size"] == {"height": 375, "width": 500}
        for found in answer["objects"]:
            kinds.add(found["label"])
            is_vehicle = found["label"] in ("car", "truck", "bus")
            assert (found["vehicle"] is not None) == is_vehicle
            assert (found["plate"] is not None) == is_vehicle
            assert (found["person"] is not None) == (found["label"] == "person")
    assert kinds
