"""A server that asks for a token: who is let in, who is not, and where the token is never told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

import flowlang
from flowlang.serve.token import Token, read_token
from tests.serve.server import KINDS, Server, head, refused, serving, wait_until, write

TOKEN = "c2VjcmV0-of.the~server+1/2=="
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
WRONG: Mapping[str, dict[str, str]] = {
    "none": {},
    "empty": {"Authorization": ""},
    "word": {"Authorization": "Bearer"},
    "other": {"Authorization": "Bearer other"},
    "start": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "longer": {"Authorization": f"Bearer {TOKEN}x"},
    "bare": {"Authorization": TOKEN},
    "basic": {"Authorization": f"Basic {TOKEN}"},
    "elsewhere": {"X-Api-Key": TOKEN},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow that answers what it is sent, and the token in a file."""
    folder = tmp_path_factory.mktemp("token")
    write(folder / "echo.flow", "export flow echo: bytes -> bytes = pass\n")
    write(folder / "token", f"{TOKEN}\nwhatever else\n").chmod(0o600)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    options = ["--token-file", str(folder / "token"), "--grpc-port", "0"]
    with serving(folder, *request.param, *options, str(folder / "echo.flow")) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_who_has_not_the_token_is_turned_away(server: Server, headers: dict[str, str]) -> None:
    """Any path but the health checks and the page gives 401, and says what is asked for."""
    for method, path in (
        ("POST", "/"),
        ("POST", "/flows/echo"),
        ("POST", "/health/live"),
        ("GET", "/flows"),
        ("GET", "/flows/echo/plan.svg"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
        ("GET", "/v2"),
        ("GET", "/v2/models/echo"),
        ("GET", "/v2/models/echo/ready"),
        ("POST", "/v2/models/echo/infer"),
        ("POST", "/v2/repository/index"),
        ("OPTIONS", "/"),
    ):
        response = server.client.request(method, path, headers=headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        error = response.json()["error"]
        if not path.startswith("/v2"):
            assert error["code"] == "unauthorized"
            error = error["message"]
        assert "token" in error
        assert TOKEN not in response.text


def test_who_has_the_token_is_let_in(server: Server) -> None:
    """With the token everything is as it is without one; `bearer` may be in any case."""
    client = server.client
    assert client.post("/flows/echo", content=b"abc", headers=RIGHT).content == b"abc"
    lower = {"Authorization": f"bearer  {TOKEN}"}
    assert client.get("/flows", headers=lower).json()["flows"][0]["name"] == "echo"
    assert client.get("/metrics", headers=RIGHT).status_code == 200
    assert client.get("/nothing", headers=RIGHT).status_code == 404


def test_health_and_the_page_are_free(server: Server) -> None:
    """Whoever watches over the process needs no token, nor does who opens the page to type it."""
    for path in ("/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
        assert server.client.get(path).status_code == 200
        assert server.client.head(path).status_code == 200


def test_a_strangers_body_is_not_read(server: Server) -> None:
    """401 comes before the body: no leave to send is given, and an endless one is cut off."""
    with server.connect() as connection:
        connection.send(head("/flows/echo", 3, "Expect: 100-continue"))
        status, headers, _ = connection.answer()
        assert (status, "connection" in headers) == (401, False)
        connection.send(b"abc")
        connection.post("/flows/echo", b"abc", f"Authorization: Bearer {TOKEN}")
        assert connection.answer()[2] == b"abc"
    for sent in (
        head("/flows/echo", 10**12),
        "POST /flows/echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n",
    ):
        with server.connect() as connection:
            connection.send(sent)
            status, headers, _ = connection.answer()
            assert (status, headers["connection"]) == (401, "close")
            connection.wait_closed()


def test_who_is_turned_away_is_counted(server: Server, client: Any) -> None:
    """Over HTTP and gRPC, whatever was asked for; who guesses tokens is seen in the metrics."""

    def count() -> float:
        text = server.client.get("/metrics", headers=RIGHT).text
        _, _, rest = text.partition('flowlang_refusals_total{code="unauthorized"} ')
        return float(rest.partition("\n")[0] or 0)

    before = count()
    server.client.post("/flows/echo", content=b"abc")
    server.client.get("/metrics", headers=WRONG["other"])
    server.client.post("/v2/models/echo/infer", content=b"abc")
    for _ in range(2):
        with pytest.raises(InferenceServerException):
            client.infer("echo", [_sent(triton)])
    wait_until(lambda: count() == before + 5)


def test_a_large_body_without_the_token_is_told(server: Server) -> None:
    """Who sends a whole picture without the token sees why, and not a broken connection."""
    for _ in range(5):
        assert httpx.post(f"{server.url}/", content=bytes(20 << 20)).status_code == 401


# Open Inference Protocol


def _sent(kind: Any) -> Any:
    found = kind.InferInput("input", [1], "BYTES")
    found.set_data_from_numpy(np.array([b"abc"], object))
    return found


def test_tritons_http_client_brings_the_token(server: Server) -> None:
    """Triton's client is let in with the header, and its health checks without."""
    address = server.url.removeprefix("http://")
    with triton_http.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        sent = [_sent(triton_http)]
        answer = client.infer("echo", sent, headers=dict(RIGHT))  # it adds to them
        assert answer.as_numpy("output").tolist() == [b"abc"]
        with pytest.raises(InferenceServerException, match="asks for a token"):
            client.infer("echo", sent)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(server.urls[0].removeprefix("grpc://")) as client:
        yield client


def test_grpc_asks_for_the_token_too(client: Any) -> None:
    """Over gRPC it is metadata; without it a call ends as UNAUTHENTICATED."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert client.infer("echo", [_sent(triton)], headers=headers).as_numpy("output") == [b"abc"]
    assert client.get_server_metadata(headers=headers).name == "flowlang"
    for wrong in ({}, {"authorization": "Bearer other"}, {"authorization": TOKEN}):
        calls: tuple[Callable[..., Any], ...] = (
            partial(client.infer, "echo", [_sent(triton)]),
            client.get_server_metadata,
            partial(client.is_model_ready, "echo"),
        )
        for call in calls:
            with pytest.raises(InferenceServerException, match="token") as caught:
                call(headers=wrong)
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
            assert TOKEN not in str(caught.value)


def test_grpc_health_is_free(server: Server, client: Any) -> None:
    """Health checks of both services are answered without a token; watching is not."""
    import grpc

    from flowlang.serve.proto import read_protocol

    assert client.is_server_live()
    assert client.is_server_ready()
    messages = read_protocol("health.proto").messages
    kinds = {
        "request_serializer": lambda message: message.SerializeToString(),
        "response_deserializer": messages["HealthCheckResponse"].FromString,
    }
    asked = messages["HealthCheckRequest"]()
    with grpc.insecure_channel(server.urls[0].removeprefix("grpc://")) as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check", **kinds)(asked).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(channel.unary_stream("/grpc.health.v1.Health/Watch", **kinds)(asked))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_grpc_stream_asks_for_the_token(client: Any) -> None:
    """A stream of requests is turned away before its first one is worked on."""
    found: list[Any] = []
    client.start_stream(lambda result, error: found.append(error))
    wait_until(lambda: bool(found))
    client.stop_stream()
    assert [error.status() for error in found] == ["StatusCode.UNAUTHENTICATED"]


# Where the token comes from


def test_the_environment_brings_a_token(folder: Path) -> None:
    """FLOWLANG_TOKEN does the same as a file, which is the one that counts where both are there."""
    file = str(folder / "echo.flow")
    with serving(folder, file, environment={"FLOWLANG_TOKEN": "other"}) as server:
        server.wait_ready()
        assert server.client.get("/flows").status_code == 401
        other = {"Authorization": "Bearer other"}
        assert server.client.get("/flows", headers=other).status_code == 200
    assert read_token(folder / "token", {"FLOWLANG_TOKEN": "other"}) == Token(TOKEN.encode())
    assert read_token(None, {}) is None


def test_a_token_is_never_told(folder: Path, server: Server) -> None:
    """Neither the process's title nor what it prints has the token, nor any text made of it."""
    server.client.get("/flows", headers=RIGHT)
    server.client.post("/flows/echo", content=b"x", headers={**RIGHT, "X-Deadline-Ms": "no"})
    title = Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert "--token-file" in title
    assert TOKEN not in title + server.errors
    assert TOKEN not in repr(read_token(folder / "token", {}))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_open_to_others_is_refused(folder: Path, tmp_path: Path, mode: int) -> None:
    """A token that others can read is none, and the way to close the file is told."""
    file = write(tmp_path / "token", TOKEN)
    file.chmod(mode)
    with pytest.raises(flowlang.FlowError, match=f"has mode {mode:04o}, .* chmod 600"):
        read_token(file, {})


@pytest.mark.parametrize("text", ["", "\n", "  \nsecond", "two words", "caf\xe9", "a\0b", "=="])
def test_what_is_no_token_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, or a token that no header could bring, never serves without one."""
    file = write(tmp_path / "token", text)
    file.chmod(0o600)
    for given in (file, None):
        with pytest.raises(flowlang.FlowError, match="openssl rand -base64 32") as caught:
            read_token(given, {"FLOWLANG_TOKEN": text})
        assert not text.strip() or text not in str(caught.value)


def test_nothing_is_served_with_a_wrong_token_file(folder: Path, tmp_path: Path) -> None:
    """`flowlang serve` ends with a sentence, before it listens."""
    file = write(tmp_path / "token", TOKEN)
    file.chmod(0o644)
    status, told = refused("--token-file", str(file), str(folder / "echo.flow"))
    assert (status, len(told.splitlines())) == (1, 1)
    assert f"chmod 600 {file}" in told
    status, told = refused(str(folder / "echo.flow"), environment={"FLOWLANG_TOKEN": ""})
    assert (status, "there is no token in FLOWLANG_TOKEN" in told) == (1, True)


def test_thrift_and_a_token_exclude_each_other(folder: Path) -> None:
    """Thrift has no place for a token, so that its port would be a way around it."""
    options = ["--token-file", str(folder / "token"), "--thrift-port", "0"]
    status, told = refused(*options, str(folder / "echo.flow"))
    assert status == 2
    assert "Thrift has no place for a token" in told
