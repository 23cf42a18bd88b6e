"""The jobs on LitServe: FastAPI in front, and worker processes behind a queue."""

# No `from __future__ import annotations`: LitServe hands the annotation of `request` to FastAPI.

from collections.abc import Sequence
from typing import Annotated, Any

import litserve
from fastapi import Body, HTTPException

from benchmarks.classifier import Classifier, prepare
from benchmarks.peers import options


class Bytes(litserve.LitAPI):  # type: ignore[misc]
    """Takes the body as it is. A batch stays a list, and its answers are one too."""

    def setup(self, device: str) -> None: ...

    def decode_request(self, request: Annotated[bytes, Body()]) -> Any:
        return request

    def batch(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return inputs

    def unbatch(self, output: Sequence[Any]) -> Sequence[Any]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output


class Size(Bytes):
    def predict(self, x: Any) -> Any:
        return len(x) if self.max_batch_size == 1 else [len(item) for item in x]


class Classify(Bytes):
    def setup(self, device: str) -> None:
        given = options()
        self._classify = Classifier(given.model, given.threads)

    def decode_request(self, request: Annotated[bytes, Body()]) -> Any:
        try:
            return prepare(request)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    def predict(self, x: Any) -> Any:
        return self._classify([x])[0] if self.max_batch_size == 1 else self._classify(x)


if __name__ == "__main__":
    given = options()
    job = Size if given.job == "size" else Classify
    api = job(max_batch_size=given.batch, batch_timeout=given.batch_wait_ms / 1e3)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=given.workers)
    server.run(
        host="127.0.0.1",
        port=given.port,
        num_api_servers=given.front,
        log_level="error",
        generate_client_file=False,
        access_log=False,
    )
