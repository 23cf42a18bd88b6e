"""What no answer of any protocol holds: places on the server, tracebacks, and secrets."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from thriftpy2.rpc import client_context
from thriftpy2.thrift import TException

import flowlang
from tests.serve.certificates import make_pair
from tests.serve.idl import IDL
from tests.serve.server import Server, running, serving, write

SECRET = "a-secret-of-the-server"
TOKEN = "the-token-of-the-server"
# Flows that fail in every way there is: foreign code that raises, foreign code that lies, a value
# that no protocol can send, and an exception where nothing is expected to raise.
OPERATORS = f"""
import os

class Odd(bytes):
    def __bytes__(self):
        raise RuntimeError(__file__ + {SECRET!r})
    __len__ = __iter__ = __bytes__

def raises(data: bytes) -> bytes:
    raise RuntimeError("no such file: " + __file__ + {SECRET!r})

def opens(data: bytes) -> bytes:
    return open(__file__ + {SECRET!r} + ".pem").read()

def lies(data: bytes) -> int:
    return {{__file__: {SECRET!r}}}

def odd(data: bytes) -> bytes:
    return Odd(data)

"""
FLOWS = """
use "{folder}/operators.py" as ops
## Every one of these fails.
export flow raises = ops.raises
export flow opens = ops.opens
export flow lies = ops.lies
export flow odd = ops.odd
export flow broken: bytes -> bytes = pass
"""
# `broken` and the index of models fail where flowlang itself would be at fault.
PROGRAM = """
import sys
from functools import partial
import flowlang
from flowlang.runtime import host
from flowlang.serve.grpc import GrpcServer
from flowlang.serve.http import serve
from flowlang.serve.inference import Inference
from flowlang.serve.thrift import ThriftServer

class Unsendable:
    def __getattr__(self, name):
        raise RuntimeError(__file__ + {secret!r})

host._MAKERS["pass"] = lambda node, settings: lambda value: Unsendable()
Inference.index = lambda self, **options: Unsendable().models
faces = [partial(GrpcServer, port=0), partial(ThriftServer, port=0, flow="raises")]
sys.exit(serve(lambda: flowlang.load({path!r}, device="cpu"), "127.0.0.1", 0, faces=faces))
"""
NAMES = ("raises", "opens", "lies", "odd", "broken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a-folder-of-the-server")
    write(folder / "operators.py", OPERATORS)
    write(folder / "failing.flow", FLOWS.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    program = write(
        folder / "program.py", PROGRAM.format(secret=SECRET, path=str(folder / "failing.flow"))
    )
    with running(folder, str(program)) as server:
        yield server.wait_ready()


@pytest.fixture
def check(folder: Path) -> Callable[[str], None]:
    """Fails where a text holds what no client may see."""

    def check(text: str) -> None:
        for leak in (
            *(str(folder), folder.name, str(Path(flowlang.__file__).parent), ".py", ".flow"),
            *("Traceback", 'File "', "RuntimeError", SECRET, TOKEN, "PRIVATE"),
        ):
            assert leak not in text

    return check


def seen(response: httpx.Response) -> str:
    """All that a client sees of an answer."""
    return f"{response.status_code} {response.headers.raw!r} {response.text}"


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_over_http_leaks(server: Server, name: str, check: Callable[[str], None]) -> None:
    """A failure inside is a 500 that names the stage, one picture at a time or many in a form."""
    response = server.client.post(f"/flows/{name}", content=b"abc")
    assert (response.status_code, response.json()["error"]["flow"]) == (500, name)
    check(seen(response))
    form = [("a", b"one"), ("b", b"two")]
    check(seen(server.client.post(f"/flows/{name}", files=form)))
    body = {"inputs": [{"name": "input", "datatype": "BYTES", "shape": [1], "data": ["abc"]}]}
    response = server.client.post(f"/v2/models/{name}/infer", json=body)
    assert response.status_code == 500
    check(seen(response))


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_over_grpc_leaks(server: Server, name: str, check: Callable[[str], None]) -> None:
    """A failure inside is INTERNAL, with the same few words."""
    (url,) = [url for url in server.urls if url.startswith("grpc://")]
    sent = triton.InferInput("input", [1], "BYTES")
    sent.set_data_from_numpy(np.array([b"abc"], object))
    with triton.InferenceServerClient(url.removeprefix("grpc://")) as client:
        with pytest.raises(triton.InferenceServerException) as caught:
            client.infer(name, [sent])
        assert caught.value.status() == "StatusCode.INTERNAL"
        check(f"{caught.value} {caught.value.debug_details()}")


def test_no_question_over_grpc_leaks(server: Server, check: Callable[[str], None]) -> None:
    """What fails outside of any flow is INTERNAL too: gRPC alone would tell the exception."""
    (url,) = [url for url in server.urls if url.startswith("grpc://")]
    with triton.InferenceServerClient(url.removeprefix("grpc://")) as client:
        with pytest.raises(triton.InferenceServerException) as caught:
            client.get_model_repository_index()
        assert caught.value.status() == "StatusCode.INTERNAL"
        check(f"{caught.value} {caught.value.debug_details()}")
    assert "a RepositoryIndexRequest could not be answered" in server.errors


def test_no_answer_over_thrift_leaks(server: Server, check: Callable[[str], None]) -> None:
    """A failure inside is an exception, or an answer that says so."""
    port = server.port_of("thrift")
    service = IDL.ImageProcessingService
    with client_context(service, "127.0.0.1", port, socket_timeout=30_000) as client:
        found = client.process_image(IDL.ProcessRequest(image_data=b"abc"))
    assert not found.success
    check(repr(found))
    service = IDL.InferenceService
    with (
        client_context(service, "127.0.0.1", port, socket_timeout=30_000) as client,
        pytest.raises(TException) as caught,
    ):
        client.infer_batch(IDL.InferenceParams(uuid="a", data=b"abc"))
    check(repr(vars(caught.value)))


def test_nothing_to_look_at_leaks(folder: Path, check: Callable[[str], None]) -> None:
    """Listings, drawings, metrics and descriptions know names, and nothing of where things are.

    Neither they nor refusals have the token or the key of the server.
    """
    pair = make_pair(folder, "server")
    token = write(folder / "token", TOKEN)
    token.chmod(0o600)
    options = [*pair.options, "--token-file", str(token), "--metrics-port", "0"]
    trust = ssl.create_default_context(cafile=str(pair.cert))
    with serving(folder, *options, str(folder / "failing.flow"), trust=trust) as server:
        server.wait_ready()
        right = {"Authorization": f"Bearer {TOKEN}"}
        server.client.post("/flows/raises", content=b"x", headers=right)
        paths = server.client.get("/openapi.json", headers=right).json()["paths"]
        for headers in ({}, right):
            for path in (
                *(path for path, operations in paths.items() if "get" in operations),
                *("/v2", "/v2/models/raises", "/v2/models/raises/config", "/v2/models/stats"),
                *("/v2/models/raises/stats", "/nothing", "/../../etc/passwd", "/flows/raises"),
            ):
                response = server.client.get(path, headers=headers)
                if path not in ("/", "/docs"):  # files of the package: they cannot know
                    check(seen(response))
        (url,) = [url for url in server.urls if url.endswith("/metrics")]
        check(seen(httpx.get(url, verify=trust)))
        assert SECRET in server.errors  # the log has what the answers have not
        assert TOKEN not in server.errors
        assert "PRIVATE" not in server.errors


def test_there_is_nothing_to_administer(server: Server) -> None:
    """No path loads, unloads, stops, traces or changes the server."""
    for path in (
        *("/v2/repository/models/raises/load", "/v2/repository/models/raises/unload"),
        *("/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status"),
        *("/v2/cudasharedmemory/region/r/register", "/admin", "/shutdown", "/reload", "/models"),
        *("/debug", "/config", "/flows/raises/load"),
    ):
        for method in ("GET", "POST", "PUT", "DELETE"):
            response = server.client.request(method, path)
            assert response.status_code in (403, 404, 405), (method, path)
    names = {flow["name"] for flow in server.client.get("/flows").json()["flows"]}
    assert names == set(NAMES)
