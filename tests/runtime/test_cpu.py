"""CPU instances on real models: what a batch answers is what its items would answer alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from examples import models
from flowlang.diagnostics import BadRequest, EngineError, StageFailed
from flowlang.runtime.cpu import CpuInstance
from flowlang.runtime.ort import Sessions
from tests.pictures import blurred_noise
from tests.simulation import plan_of

Array: TypeAlias = NDArray[Any]
Port: TypeAlias = tuple[str, int, Sequence[int | str]]

FLOATS = TensorProto.FLOAT
# Among them two that `str.splitlines` takes for line ends: recognisers do know such characters.
WORDS = ("blank", "a", "\N{LINE SEPARATOR}", "\x85", "\N{IDEOGRAPHIC SPACE}")


def write_model(
    path: Path, nodes: Sequence[Any], inputs: Sequence[Port], outputs: Sequence[Port],
    **weights: Array,
) -> None:  # fmt: skip
    """Write an ONNX model of a few nodes."""

    def ports(given: Sequence[Port]) -> list[Any]:
        return [helper.make_tensor_value_info(n, kind, list(shape)) for n, kind, shape in given]

    made = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "test", ports(inputs), ports(outputs), initializer=made)
    opset = [helper.make_opsetid("", models.OPSET)]
    onnx.save(helper.make_model(graph, ir_version=models.IR_VERSION, opset_imports=opset), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models: most take `data` and do next to nothing with it."""
    root = tmp_path_factory.mktemp("models")
    node, table = helper.make_node, np.arange(15, dtype=np.float32).reshape(5, 3)
    doubled = [node("Add", ["data", "data"], ["out"])]
    gather = [node("Gather", ["table", "data"], ["out"])]
    shapes: dict[str, tuple[Sequence[int | str], Sequence[int | str]]] = {
        "any": (("N", "h", "w"), ("N", "h", "w")),
        "scores": (("N", "k"), ("N", "k")),
        "fixed": ((4, 3), (4, 3)),
    }
    for name, (taken, result) in shapes.items():
        write_model(
            root / f"{name}.onnx", doubled, [("data", FLOATS, taken)], [("out", FLOATS, result)]
        )
    indices = [("data", TensorProto.INT64, ("N", "k"))]
    write_model(
        root / "gather.onnx", gather, indices, [("out", FLOATS, ("N", "k", 3))], table=table
    )
    index = [("data", TensorProto.INT64, ("N",))]
    write_model(root / "pick.onnx", gather, index, [("out", FLOATS, ("N", 3))], table=table)
    shifted = [node("Add", ["data", "nine"], ["at"]), node("Gather", ["table", "at"], ["out"])]
    write_model(
        root / "cold.onnx", shifted, index, [("out", FLOATS, ("N", 3))],
        table=table, nine=np.asarray(9, np.int64),
    )  # fmt: skip
    flat = [node("Reshape", ["data", "shape"], ["out"])]
    for name, shape in (("flat", ("N", "k")), ("flat_known", ("N", 3))):
        write_model(
            root / f"{name}.onnx", flat, [("data", FLOATS, shape)], [("out", FLOATS, ("N", "m"))],
            shape=np.asarray([1, -1], np.int64),
        )  # fmt: skip
    total = [node("ReduceSum", ["data"], ["out"], keepdims=0)]
    write_model(root / "total.onnx", total, [("data", FLOATS, ("N", "k"))], [("out", FLOATS, ())])
    image = [("data", FLOATS, ("N", 3, "h", "w"))]
    write_model(
        root / "mean.onnx", [node("GlobalAveragePool", ["data"], ["out"])], image,
        [("out", FLOATS, ("N", 3, 1, 1))],
    )  # fmt: skip
    models.two_heads(root / "heads.onnx", size=8)
    models.two_inputs(root / "pair.onnx", size=8)
    (root / "names.txt").write_text("zero\none\ntwo\n", "utf-8")
    (root / "keys.txt").write_text("\n".join(WORDS[1:]) + "\n", "utf-8")
    return root


def instance_of(text: str, folder: Path, stage: int = 0) -> CpuInstance:
    """A warm instance of a stage of a flow."""
    instance = CpuInstance(plan_of(text, folder).stages[stage], Sessions(1))
    instance.warm()
    return instance


def test_items_of_different_shapes_share_a_batch(folder: Path) -> None:
    """Each item gets its own result, in order, whatever shapes it was taken with."""
    instance = instance_of('trt("any.onnx", batch=1..8)', folder)
    random = np.random.default_rng(0)
    sizes = [(2, 3), (4, 1), (2, 3), (1, 1), (4, 1), (2, 3)]
    items = [random.random(size, np.float32) for size in sizes]
    for item, result in zip(items, instance.run(items), strict=True):
        assert isinstance(result, np.ndarray)
        np.testing.assert_array_equal(result, item * 2)


def test_an_item_laid_out_unusually_is_taken_as_it_is(folder: Path) -> None:
    """Views with strides of their own go into a batch like any other array."""
    instance = instance_of('trt("any.onnx", batch=1..8)', folder)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = [whole.T, whole[::2, ::-1], whole[:, 1:2]]
    for items in ([views[0]], [views[1], views[1]], views):
        for item, result in zip(items, instance.run(items), strict=True):
            np.testing.assert_array_equal(result, item * 2)


def test_an_item_the_model_fails_on_fails_alone(folder: Path) -> None:
    """An index out of range spoils its own answer; the batch around it is answered."""
    instance = instance_of('trt("gather.onnx", batch=1..8)', folder)
    items = [np.asarray(i, np.int64) for i in ([0, 1], [2, 99], [4, 3], [0, 0, 0], [7, 0, 0])]
    outcomes = instance.run(items)
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    for index in (0, 2, 3):
        np.testing.assert_array_equal(outcomes[index], table[items[index]])
    for index in (1, 4):
        assert isinstance(outcomes[index], StageFailed)
        assert "`gather.onnx` failed" in str(outcomes[index])
        assert str(outcomes[index]).endswith("test.flow:1:1)")
        assert outcomes[index].stage == "gather.onnx"
    np.testing.assert_array_equal(instance.run(items[:1])[0], table[[0, 1]])


def test_an_item_may_be_a_single_number(folder: Path) -> None:
    """A model whose input is nothing but a batch takes items without dimensions."""
    instance = instance_of('trt("pick.onnx", batch=1..8)', folder)
    outcomes = instance.run([np.asarray(i, np.int64) for i in (4, 0, 5, 2)])
    assert [list(o) for o in outcomes[:2]] == [[12, 13, 14], [0, 1, 2]]
    assert isinstance(outcomes[2], StageFailed)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_batch_smaller_than_a_fixed_one_is_filled_up(folder: Path, count: int) -> None:
    """A model of four at a time answers one, two or three as well, with nothing left over."""
    plan = plan_of('trt("fixed.onnx")', folder).stages[0]
    assert plan.batch == (4, 4, 4)
    items = [np.full(3, index, np.float32) for index in range(count)]
    outcomes = instance_of('trt("fixed.onnx")', folder).run(items)
    np.testing.assert_array_equal(np.stack(outcomes), np.stack(items) * 2)


def test_a_model_that_mixes_its_items_up_is_run_one_by_one(folder: Path) -> None:
    """Outputs that are not one an item cannot be told apart, so each item has a run of its own."""
    instance = instance_of('trt("flat.onnx", batch=1..4)', folder)
    items = [np.full(2, index, np.float32) for index in range(3)]
    np.testing.assert_array_equal(np.stack(instance.run(items)), np.stack(items))


def test_a_model_without_a_result_for_each_item_is_an_error(folder: Path) -> None:
    """A total over the batch is nobody's answer, not even where the batch is of one."""
    instance = instance_of('trt("total.onnx", batch=1..4)', folder)
    outcomes = instance.run([np.ones(2, np.float32)] * 3)
    assert [type(o) for o in outcomes] == [StageFailed] * 3
    assert "1 items gave an output of shape ()" in str(outcomes[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('trt("cold.onnx", batch=1..2)', r"`cold.onnx` fails on a batch of 1: .*Gather"),
        ('trt("flat_known.onnx", batch=1..2)', r"`flat_known.onnx` fails on a batch of 2: 2 items"),
    ],
)
def test_a_model_that_cannot_run_is_told_when_it_is_loaded(
    folder: Path, text: str, message: str
) -> None:
    """A trial run that fails is an EngineError with the model, the batch and the reason."""
    with pytest.raises(EngineError, match=message):
        instance_of(text, folder)


def test_a_file_that_only_looks_like_a_model_is_told(folder: Path) -> None:
    """A model with a readable header that ONNX Runtime refuses is an EngineError."""
    node = helper.make_node("NoSuchOperator", ["data"], ["out"])
    ports = [("data", FLOATS, ("N", 2))], [("out", FLOATS, ("N", 2))]
    write_model(folder / "unknown.onnx", [node], *ports)
    with pytest.raises(EngineError, match=r"cannot load `unknown.onnx`: .*NoSuchOperator"):
        instance_of('trt("unknown.onnx")', folder)


def test_one_session_serves_all_instances(folder: Path) -> None:
    """However many instances name a model, its weights are held once."""
    sessions = Sessions(1)
    stages = plan_of(
        'flow a = trt("any.onnx")\nexport flow b = a -> a\nexport flow c = trt("any.onnx")', folder
    ).stages
    assert len(stages) == 2
    instances = [CpuInstance(stage, sessions) for stage in (*stages, *stages)]
    held = {id(i.model.session) for i in instances if i.model is not None}
    assert len(held) == 1


def run_directly(path: Path, **feeds: Array) -> dict[str, Array]:
    """What ONNX Runtime says, asked without anything of ours."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_two_outputs_give_a_record(folder: Path) -> None:
    """A model with several outputs gives each item a record of them, by name."""
    instance = instance_of('trt("heads.onnx", batch=1..4)', folder)
    items = np.random.default_rng(1).random((3, 3, 8, 8), np.float32)
    wanted = run_directly(folder / "heads.onnx", data=items)
    outcomes = instance.run(list(items))
    for index, outcome in enumerate(outcomes):
        assert list(outcome) == ["scores", "embedding"]
        for name, values in wanted.items():
            np.testing.assert_allclose(outcome[name], values[index], rtol=1e-5, atol=1e-6)


def test_two_inputs_take_a_record(folder: Path) -> None:
    """A model with several inputs takes records, whatever the order of their fields."""
    instance = instance_of('trt("pair.onnx", batch=1..4)', folder)
    random = np.random.default_rng(2)
    images = random.random((3, 3, 8, 8), np.float32)
    features = random.random((3, 8), np.float32)
    wanted = run_directly(folder / "pair.onnx", image=images, features=features)["scores"]
    items = [{"features": f, "image": i} for f, i in zip(features, images, strict=True)]
    outcomes = instance.run(items)
    np.testing.assert_allclose(np.stack(outcomes), wanted, rtol=1e-5, atol=1e-6)


IMAGE_FLOW = 'decode -> resize(8) -> rgb -> normalize(imagenet) -> trt("heads.onnx", batch=1..8)'


def prepared(data: bytes) -> Array:
    """What the model of IMAGE_FLOW should see of a picture."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    rgb = cv2.resize(image, (8, 8), interpolation=cv2.INTER_LINEAR)[:, :, ::-1]
    mean, std = np.asarray([123.675, 116.28, 103.53]), np.asarray([58.395, 57.12, 57.375])
    return np.ascontiguousarray(((rgb - mean) / std).transpose(2, 0, 1), np.float32)


def test_pictures_reach_the_model_as_they_should(folder: Path) -> None:
    """Decoded, resized, reordered, normalized and packed, a picture gives the model's answer."""
    pictures = [blurred_noise(seed, 37, 53) for seed in range(4)]
    outcomes = instance_of(IMAGE_FLOW, folder).run(pictures)
    seen = np.stack([prepared(p) for p in pictures])
    wanted = run_directly(folder / "heads.onnx", data=seen)["scores"]
    np.testing.assert_allclose(
        np.stack([o["scores"] for o in outcomes]), wanted, rtol=1e-4, atol=1e-4
    )


def test_a_bad_picture_fails_alone(folder: Path) -> None:
    """A file cut short or no picture at all leaves the batch, named with operator and place."""
    instance = instance_of(IMAGE_FLOW, folder)
    good = [blurred_noise(1, 37, 53), blurred_noise(2, 37, 53)]
    outcomes = instance.run([good[0], b"no picture", good[1][:-200], good[1]])
    for bad in outcomes[1:3]:
        assert isinstance(bad, BadRequest)
        assert bad.stage == "decode"
        assert "decode failed: " in str(bad)
        assert str(bad).endswith("test.flow:1:1)")
    for outcome, alone in zip((outcomes[0], outcomes[3]), instance.run(good), strict=True):
        np.testing.assert_allclose(outcome["scores"], alone["scores"], rtol=1e-5, atol=1e-6)
    assert all(isinstance(o, BadRequest) for o in instance.run([b"", b"\xff\xd8"]))


def test_a_batch_answers_what_its_items_answer_alone(folder: Path) -> None:
    """Batching changes when things are computed, and not what."""
    instance = instance_of(IMAGE_FLOW + " -> .scores -> softmax -> top(3)", folder)
    follow = instance_of(IMAGE_FLOW + " -> .scores -> softmax -> top(3)", folder, stage=1)
    pictures = [blurred_noise(seed, 20 + seed, 40 - seed) for seed in range(8)]
    together = instance.run(pictures)
    alone = [instance.run([p])[0] for p in pictures]
    for batch, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(batch["scores"], single["scores"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch["embedding"], single["embedding"], rtol=1e-5, atol=1e-6)
    tops = [
        [
            [label["index"] for label in labels]
            for labels in follow.run([o["scores"] for o in group])
        ]
        for group in (together, alone)
    ]
    assert tops[0] == tops[1]


@pytest.mark.parametrize(
    "flow",
    [
        IMAGE_FLOW,
        'decode -> resize(8) -> rgb -> trt("heads.onnx", batch=1..8)',
        'decode -> rgb -> trt("mean.onnx", batch=1..8)',
    ],
    ids=["normalized", "plain", "of any size"],
)
@given(
    batches=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=4)
)
@settings(max_examples=25)
def test_a_batch_keeps_nothing_of_the_one_before(
    folder: Path, flow: str, batches: list[list[int]]
) -> None:
    """Each gets its own answer, whatever ran before and however many are broken."""
    instance, pictures, alone = lone_answers(flow, folder)
    for batch in batches:
        for index, outcome in zip(batch, instance.run([pictures[i] for i in batch]), strict=True):
            if index == 5:
                assert isinstance(outcome, BadRequest)
            else:
                np.testing.assert_allclose(scores(outcome), alone[index], rtol=1e-5, atol=1e-6)


@functools.cache
def lone_answers(flow: str, folder: Path) -> tuple[CpuInstance, list[bytes], list[Array]]:
    """An instance, pictures of two sizes with a broken one at the end, and what the good ones get
    from an instance that has seen no other.
    """
    pictures = [
        *(blurred_noise(s, 20 + s % 2, 30) for s in range(5)),
        blurred_noise(5, 37, 53)[:-200],
    ]
    alone = [scores(instance_of(flow, folder).run([p])[0]) for p in pictures[:5]]
    return instance_of(flow, folder), pictures, alone


def scores(outcome: Any) -> Array:
    return np.array(outcome["scores"] if isinstance(outcome, dict) else outcome)


SCORES = hnp.arrays(
    np.float32,
    st.integers(1, 30),
    elements=st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -1.0])),
)
TAIL = settings(max_examples=80)


@TAIL
@given(SCORES)
def test_softmax_gives_shares(folder: Path, values: Array) -> None:
    """Softmax agrees with its definition in doubles, and its shares sum to 1."""
    (shares,) = instance_of('trt("scores.onnx") -> softmax', folder).run([values])
    exact = np.exp(2.0 * values.astype(np.float64) - 2.0 * values.max())
    np.testing.assert_allclose(shares, exact / exact.sum(), rtol=1e-4, atol=1e-7)
    assert shares.dtype == np.float32
    assert shares.sum() == pytest.approx(1, abs=1e-5)


@TAIL
@example(values=np.asarray([0, 0, 0, 0, 1], np.float32), k=3)
@given(values=SCORES, k=st.integers(1, 40))
def test_top_gives_the_greatest_first(folder: Path, values: Array, k: int) -> None:
    """The k greatest, greatest first, of equals the first first; named as far as names go."""
    text = f'trt("scores.onnx") -> top({k}, names="names.txt")'
    (labels,) = instance_of(text, folder).run([values])
    order = np.argsort(-values, kind="stable")[:k]
    assert [label["index"] for label in labels] == order.tolist()
    assert [label["score"] for label in labels] == (2 * values[order]).tolist()
    names = {0: "zero", 1: "one", 2: "two"}
    assert [label["label"] for label in labels] == [names.get(i, str(i)) for i in order.tolist()]


@TAIL
@example(values=np.asarray([0, 0, 0, 0, 1, 1], np.float32))
@given(values=SCORES)
def test_best_is_the_first_of_the_greatest(folder: Path, values: Array) -> None:
    """Best is what `top(1)` would give, not in a list."""
    (best,) = instance_of('trt("scores.onnx") -> best', folder).run([values])
    index = int(values.argmax())
    assert best == {"index": index, "label": str(index), "score": float(2 * values[index])}
    (labels,) = instance_of('trt("scores.onnx") -> top(1)', folder).run([values])
    assert labels == [best]


@TAIL
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_ctc_reads_characters(folder: Path, classes: list[int]) -> None:
    """Repeats are one character unless a blank stands between them, and blanks are none."""
    steps = np.eye(5, dtype=np.float32)[classes]
    (text,) = instance_of('trt("any.onnx") -> ctc("keys.txt")', folder).run([steps])
    wanted = ""
    before = 0
    for number in classes:
        if number not in (0, before):
            wanted += WORDS[number]
        before = number
    assert text == wanted


def test_ctc_with_too_few_keys_says_so(folder: Path) -> None:
    """A model that knows more characters than the file is an error, not a wrong text."""
    instance = instance_of('trt("any.onnx") -> ctc("keys.txt")', folder)
    (outcome,) = instance.run([np.eye(6, dtype=np.float32)])
    assert isinstance(outcome, StageFailed)
    assert "the model knows 6 classes and `keys` names 4" in str(outcome)


def test_a_failing_tail_fails_alone(folder: Path) -> None:
    """What comes behind the model fails item by item too, and skips what has failed before."""
    instance = instance_of('trt("any.onnx", batch=1..4) -> ctc("keys.txt")', folder)
    outcomes = instance.run([np.eye(size, dtype=np.float32) for size in (5, 6, 3)])
    assert [type(o) for o in outcomes] == [str, StageFailed, str]


def test_a_stage_of_images_alone_gives_images(folder: Path) -> None:
    """A stage without a model works item by item, and has nothing to warm up."""
    instance = instance_of("export flow f = decode -> resize(h=4, w=6) -> gray", folder)
    image, bad = instance.run([blurred_noise(3, 37, 53), b""])
    assert image.shape == (4, 6)
    assert image.dtype == np.uint8
    assert isinstance(bad, BadRequest)
    instance.close()
