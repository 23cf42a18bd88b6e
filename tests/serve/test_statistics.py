"""The statistics of the Open Inference Protocol: what was asked, how long it waited and took."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

import flowlang
from flowlang.serve.inference import Inference
from flowlang.serve.tensor import BYTES
from flowlang.serve.v2 import InferenceRoutes
from tests.serve.asking import ROW, as_input, one_row
from tests.serve.server import serving


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient) -> None:
    """Answers, items and failures are counted by model, the parts of the time equally often."""

    def counts() -> tuple[int, int, int]:
        (found,) = client.get_inference_statistics("shout")["model_stats"]
        stats = found["inference_stats"]
        parts = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        assert len({stats[part]["count"] for part in parts}) == 1
        assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
        return found["inference_count"], stats["success"]["count"], stats["fail"]["count"]

    client.infer("shout", [as_input("input", [b"a"], BYTES)])
    before = counts()
    client.infer("shout", [as_input("input", [b"a", b"b", b"c"], BYTES)])
    with pytest.raises(InferenceServerException):
        client.infer("shout", [as_input("input", [b"\xff"], BYTES)])
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [3, 1, 1]
    everything = client.get_inference_statistics()["model_stats"]
    assert {"shout", "classify"} <= {model["name"] for model in everything}


def _told(client: triton.InferenceServerClient, name: str) -> tuple[Any, dict[int, Any]]:
    """The time that a model's requests took by part, and the batches of each size."""
    (found,) = client.get_inference_statistics(name)["model_stats"]
    parts = {part: span["ns"] / 1e9 for part, span in found["inference_stats"].items()}
    return parts, {batch["batch_size"]: batch for batch in found["batch_stats"]}


def test_statistics_tell_waiting_from_work(folder: Path) -> None:
    """What waits for its batch is queue, and what the batch takes is compute."""
    (folder / "waits.flow").write_text(
        'export flow waits = trt("identity.onnx", batch=1..8, wait=300ms) x1\n'
        'use "sleep.py" as sleep\nexport flow works: bytes -> int = sleep.sleep\n'
    )
    (folder / "sleep.py").write_text(
        "import time\n\ndef sleep(item: bytes) -> int:\n    time.sleep(0.2)\n    return 1\n"
    )
    with serving(folder, str(folder / "waits.flow"), "--device", "cpu") as server:
        server.wait_ready()
        asker = triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=3)
        row = [as_input("input", ROW * 3, "FP32")]
        asker.infer("waits", row)
        parts, batches = _told(asker, "waits")
        # The batch is of the first of the three, and the others came a moment later.
        assert 0.29 <= parts["queue"] < parts["success"]
        assert 0 < parts["compute_infer"] < parts["queue"]
        assert list(batches) == [3]
        assert [batches[3][f"compute_{part}"]["count"] for part in ("input", "output")] == [1, 1]
        assert 0 < batches[3]["compute_infer"]["ns"] / 1e9 <= parts["compute_infer"]
        # One operator in Python, which sleeps: the second request waits for the first.
        calls = [asker.async_infer("works", [as_input("input", [b"x"], BYTES)]) for _ in range(2)]
        assert [int(call.get_result().as_numpy("output")[0]) for call in calls] == [1, 1]
        parts, batches = _told(asker, "works")
        assert 0.15 <= parts["queue"] < parts["compute_infer"]
        assert 0.4 <= parts["compute_infer"] <= parts["success"] - parts["queue"]
        assert batches == {}
        asker.close()


def test_statistics_go_on_when_other_flows_take_over(folder: Path) -> None:
    """Requests and batches of the flows that were loaded before a change stay counted."""
    inference = Inference()
    routes = InferenceRoutes(inference, 1 << 20)
    for answered in (1, 2):
        with flowlang.load(folder / "all.flow", device="cpu") as app:
            inference.let_in(app)
            body = json.dumps({"inputs": [one_row()]}).encode()
            call = routes.infer("/v2/models/same/infer", {}, body, b"1")
            assert asyncio.run(call)[0].status == 200
            (found,) = inference.statistics("same")["model_stats"]
            assert found["inference_stats"]["success"]["count"] == answered
            (batches,) = found["batch_stats"]
            assert (batches["batch_size"], batches["compute_infer"]["count"]) == (1, answered)


def test_batches_that_end_after_others_took_over_are_counted(folder: Path) -> None:
    """The flows before still answer what they have: their batches are of the model as well."""
    flow = folder / "late.flow"
    flow.write_text('export flow late = trt("identity.onnx", batch=2..2, wait=60s)\n')
    inference, row = Inference(), np.asarray([1, 2, 3], np.float32)

    def batches() -> int:
        (found,) = inference.statistics("late")["model_stats"]
        return sum(batch["compute_infer"]["count"] for batch in found["batch_stats"])

    with flowlang.load(flow, device="cpu") as before, flowlang.load(flow, device="cpu") as app:
        inference.let_in(before)
        waiting = before.submit(row)
        inference.let_in(app)
        assert batches() == 0
        assert before(row).tolist() == waiting.result().tolist()
        assert batches() == 1
