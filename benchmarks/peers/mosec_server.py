"""The jobs on mosec: a front in Rust, and worker processes that batch where they are told to."""

from __future__ import annotations

import json
from typing import Any

import mosec
from mosec.errors import ValidationError

from benchmarks.classifier import Classifier, prepare
from benchmarks.peers import options


class Bytes(mosec.Worker):  # type: ignore[misc]
    """Takes the body as it is, and answers with short JSON."""

    def deserialize(self, data: bytes) -> Any:
        return data

    def serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()


class Size(Bytes):
    def forward(self, data: Any) -> Any:
        return len(data) if self.max_batch_size == 1 else [len(item) for item in data]


class Model(Bytes):
    """Runs the model on what a stage before it has decoded."""

    def __init__(self) -> None:
        super().__init__()
        given = options()
        self._classify = Classifier(given.model, given.threads)

    def forward(self, data: Any) -> Any:
        return self._classify([data])[0] if self.max_batch_size == 1 else self._classify(data)


class Classify(Model):
    """Decodes and runs the model in one stage."""

    def forward(self, data: Any) -> Any:
        is_single = self.max_batch_size == 1
        return super().forward(decode(data) if is_single else [decode(item) for item in data])


def decode(picture: bytes) -> Any:
    try:
        return prepare(picture)
    except ValueError as error:
        raise ValidationError(str(error)) from None  # mosec's 422


class Decode(Bytes):
    def forward(self, data: bytes) -> Any:
        return decode(data)


if __name__ == "__main__":
    given = options()
    server = mosec.Server()
    last = Size if given.job == "size" else Model if given.decoders else Classify
    if given.decoders:
        server.append_worker(Decode, num=given.decoders)
    server.append_worker(
        last, num=given.workers, max_batch_size=given.batch, max_wait_time=given.batch_wait_ms
    )
    server.run()
