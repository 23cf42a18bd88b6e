"""What is refused or fails over HTTP, and what its sender is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import onnx
import pytest
from onnx import TensorProto, helper

import flowlang
from flowlang.serve.answer import _count_values
from flowlang.serve.routes import Service
from tests.pictures import bad
from tests.serve.asking import NUMBERS, PICTURES, ask_application, error_of
from tests.serve.server import Server, head, running, serving, write


@pytest.mark.parametrize(
    ("flow", "form"), [("parts", ""), ("hinted", ", or a form with the parts data, hint")]
)
def test_who_sends_a_picture_where_json_is_meant_is_told_what_brings_one(
    server: Server, flow: str, form: str
) -> None:
    """That the body is no text is no help to somebody who sends what is none."""
    reply = server.client.post(f"/flows/{flow}", content=b"\xff\xd8\xff")
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.endswith(f" with bytes in base64{form}: the body is not UTF-8")


def test_which_field_is_no_base64_is_told(server: Server) -> None:
    """Of several pictures in JSON one may be left as it was."""
    reply = server.client.post("/flows/hinted", json={"data": "aGk=", "hint": "no base64"})
    assert (reply.status_code, error_of(reply)["code"]) == (400, "bad-request")
    assert error_of(reply)["message"].startswith("`hint`: bytes inside JSON are given as a string")


def test_json_has_a_largest_size(server: Server) -> None:
    """More of it than Python has room for is 413, whatever the largest body is."""
    response = server.client.post("/flows/total", content=b"[" + b"[]," * 6_000_000 + b"[]]")
    assert (response.status_code, error_of(response)["code"]) == (413, "too-large")
    assert "JSON larger than 16,777,216 bytes" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/flows/total", "/v2/models/total/infer"])
def test_json_has_a_largest_number_of_values(server: Server, path: str) -> None:
    """So many are made of their text at once that others wait for it; what strings hold is none."""
    is_flow = path.startswith("/flows")
    tensor = '{"inputs":[{"name":"input","datatype":"BYTES","shape":[1],"data":["%s"]}]}'

    def sent(numbers: str) -> httpx.Response:
        return server.client.post(path, content=numbers if is_flow else tensor % numbers)

    assert sent("[" + "1," * ((1 << 18) - 2) + "1]").status_code == 200
    for many in ("[" + "1," * (1 << 18) + "1]", "[" + "[]," * (1 << 17) + "1]"):
        response = sent(many)
        told = response.json()["error"]
        told = told["message"] if is_flow else told
        assert (response.status_code, "more than 262,144 values" in told) == (413, True)


def test_values_are_counted_over_a_whole_request(server: Server) -> None:
    """Items of a form and elements of a tensor share what there may be."""
    half = b"[" + b"1," * (1 << 17) + b"1]"
    items = [("item", (None, half))] * 2
    assert server.client.post("/flows/total", files=items[:1]).json() == (1 << 17) + 1
    assert server.client.post("/flows/total", files=items).status_code == 413
    tensor = {"name": "input", "datatype": "BYTES", "shape": [2], "data": [half.decode()] * 2}
    response = server.client.post("/v2/models/total/infer", json={"inputs": [tensor]})
    assert response.status_code == 413


def test_values_are_counted_over_fields_parameters_and_inputs(tmp_path: Path) -> None:
    """Parts of a form and inputs of a model, whatever they are, share it too, and bytes do not."""
    flow = "flow one(other: list<int>?): { a: list<int>, b: list<int>, c: bytes? } -> int = 1\n"
    half = b"[" + b"1," * (1 << 17) + b"1]"
    with flowlang.load(write(tmp_path / "one.flow", flow), device="cpu") as app:

        def ask(**texts: bytes) -> set[int]:
            """The statuses of all ways to send these."""
            service = flowlang.serve.asgi(app)
            files = {name: (None, text) for name, text in texts.items()}
            inputs = [
                {"name": name, "datatype": "BYTES", "shape": [1], "data": [text.decode()]}
                for name, text in texts.items()
            ]
            tensors = {"inputs": inputs}
            return {
                ask_application(service, "POST", "/", files=files).status_code,
                ask_application(service, "POST", "/v2/models/one/infer", json=tensors).status_code,
            }

        assert ask(a=b"[1]", b=half, c=half + half) == {200}
        assert ask(a=half, b=half) == {413}
        assert ask(a=b"[1]", b=half, other=half) == {413}


def test_values_are_counted_for_whoever_takes_over(tmp_path: Path) -> None:
    """A body for a flow of bytes is JSON to the one that has taken over before it was there."""
    service, path = Service(), tmp_path / "total.flow"
    with (
        flowlang.load(write(path, "export flow f: bytes -> int = 1\n"), device="cpu") as before,
        flowlang.load(write(path, "export flow f: list<int> -> int = 2\n"), device="cpu") as after,
    ):

        async def sent(rest: bytes) -> AsyncIterator[bytes]:
            yield b"[1"
            service.let_in(after)
            before.close()
            yield rest

        service.let_in(before)
        assert ask_application(service, "POST", "/", content=sent(b"]")).json() == 2
        service.let_in(before)
        answer = ask_application(service, "POST", "/", content=sent(b",1" * (1 << 18) + b"]"))
        assert (answer.status_code, error_of(answer)["code"]) == (413, "too-large")


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_is_utf_8(server: Server, coding: str) -> None:
    """Whatever Python guesses: what strings hold is told from values by its bytes."""
    text = '["\u2201"' + ",1" * (1 << 19) + "]"
    response = server.client.post("/flows/total", content=text.encode(coding))
    assert response.status_code in (400, 413)
    response = server.client.post("/flows/total", content="[1, 2]".encode(coding))
    assert response.status_code == 400
    assert server.client.post("/flows/total", content="[1, 2]".encode("utf-8-sig")).json() == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b"[1, 2]", 2),
        (b'{"a": [1, {"b": 2}], "c": "xy"}', 5),
        (b'["' + b"," * (1 << 19) + b'"]', 1),
        (b'["' + rb"\",[" * (1 << 19) + b'", 2]', 2),
        (b'["' + rb"\\" * 9 + b'"' + b",1" * (1 << 19) + b"]", (1 << 19) + 1),
        (b'["' + b"," * (1 << 19), 1),
        (b'"",' * (1 << 20), 1 << 20),
    ],
)
def test_what_a_string_holds_is_no_value(text: bytes, count: int) -> None:
    """Where there are many marks of values, those inside strings are left out, escapes or not."""
    assert _count_values(text) == count


@pytest.mark.parametrize("name", ["empty", "text", "jpeg-half", "jpeg-30000x30000"])
def test_a_bad_picture_is_the_senders_fault(server: Server, name: str) -> None:
    """A file that is no sound picture gives 400 with the stage that refused it, and no place."""
    response = server.client.post("/flows/classify", content=bad()[name].data)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["stage"], error["flow"]) == ("bad-request", "decode", "classify")
    assert bad()[name].word in error["message"]
    assert ".flow" not in response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/flows/same", b"\xff\xd8\xff"),
        ("/flows/same", b"[1, 2"),
        ("/flows/same", b"[" * 100_000),
        ("/flows/same", b"[1, 2]"),
        ("/flows/same", b'["one", "two", "three"]'),
        ("/flows/same", b"[[1], [2, 3], []]"),
        ("/flows/same", b"{}"),
        ("/flows/same", b"[1e400, 2, 3"),
        ("/flows/same", b"[1e300, 2, 3]"),
        ("/flows/same", b'["1", null, true]'),
        ("/flows/same", b"[1, 2, true]"),
        ("/flows/same", b"[true, true, true]"),
        ("/flows/levels", b'["5", true, 3]'),
        ("/flows/levels", b"[1.7, 2, 3]"),
        ("/flows/levels", b"[256, 2, 3]"),
        ("/flows/levels", b"[null, 2, 3]"),
        ("/flows/parts", b'["aGk=", "no base64"]'),
        ("/flows/parts", b'["aGk=", null]'),
        ("/flows/parts", b'"aGk="'),
        ("/flows/hinted", b'{"data": "aGk=", "hint": "?"}'),
        ("/flows/hinted", b'{"data": null}'),
        ("/flows/total", b"[1, true]"),
        ("/flows/total", b'[1, "2"]'),
        ("/flows/total", b"[1%s]" % (b"0" * 400)),
        ("/flows/pair", b"[]"),
        ("/flows/pair", b'{"image": 1}'),
    ],
)
def test_json_that_does_not_fit_is_refused(server: Server, path: str, body: bytes) -> None:
    """A body that is not JSON, or not of the flow's type, gives 400."""
    response = server.client.post(path, content=body)
    assert (response.status_code, error_of(response)["code"]) == (400, "bad-request")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("POST", "/flows/nothing", 404, "not-found", None),
        ("GET", "/elsewhere", 404, "not-found", None),
        ("GET", "/flows/classify/", 404, "not-found", None),
        ("GET", "/flows/classify", 405, "wrong-method", "POST"),
        ("DELETE", "/flows/classify", 405, "wrong-method", "POST"),
        ("PUT", "/", 405, "wrong-method", "GET, HEAD, POST"),
        ("POST", "/flows", 405, "wrong-method", "GET, HEAD"),
        ("POST", "/health/ready", 405, "wrong-method", "GET, HEAD"),
    ],
)
def test_wrong_paths_and_methods(
    server: Server, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    """An unknown path gives 404 with the flows there are, a wrong method 405 with the right."""
    response = server.client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers.get("allow") == allow
    if status == 404:
        assert "/flows/classify" in error_of(response)["message"]


@pytest.mark.parametrize("given", ["", "soon", "-5", "0", "0.0", "1e3", "nan", "1_000", "9" * 10])
def test_a_malformed_deadline_is_refused(server: Server, given: str) -> None:
    """X-Deadline-Ms is a number of milliseconds above 0, or the request is refused."""
    response = server.client.post("/flows/echo", content=b"", headers={"X-Deadline-Ms": given})
    assert (response.status_code, error_of(response)["code"]) == (400, "bad-request")


def test_a_deadline_is_kept(server: Server) -> None:
    """A request that cannot be answered by its deadline gives 504, and leaves nothing inside."""
    response = server.client.post("/flows/held", json=NUMBERS, headers={"X-Deadline-Ms": "30.5"})
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline-exceeded")
    server.wait_inside(0)


def test_a_compressed_body_is_refused(server: Server) -> None:
    """A Content-Encoding is not mistaken for the picture itself."""
    response = server.client.post(
        "/flows/classify", content=PICTURES[0], headers={"Content-Encoding": "gzip"}
    )
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported-encoding")


def test_a_declared_body_too_large_is_refused_unread(server: Server) -> None:
    """A Content-Length over the limit gives 413 before any of the body is sent."""
    with server.connect() as connection:
        connection.send(head("/flows/echo", 10**12))
        assert connection.error() == (413, "too-large")


def test_a_chunked_body_too_large_is_cut(server: Server) -> None:
    """A body that grows over the limit gives 413, and the connection is closed."""
    with server.connect() as connection:
        connection.send(
            "POST /flows/echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for _ in range(40):
                connection.send(chunk)
            while True:
                connection.send(b"1\r\nx\r\n")
                time.sleep(0.01)
        assert connection.error() == (413, "too-large")


def test_a_body_that_stalls_is_cut(echo: Path) -> None:
    """A body that is not all there in time gives 408 and closes the connection."""

    async def stalling() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    service = Service(body_s=0.05)
    with flowlang.load(echo) as app:
        service.let_in(app)
        response = ask_application(service, "POST", "/", content=stalling())
    assert (response.status_code, error_of(response)["code"]) == (408, "body-timeout")
    assert response.headers["connection"] == "close"
    assert service.under_way == 0


def test_the_largest_picture_is_let_in(server: Server) -> None:
    """32 MiB, the largest picture a flow decodes, pass the door."""
    largest = bytes(32 << 20)
    response = server.client.post("/flows/classify", content=largest)
    assert (response.status_code, error_of(response)["stage"]) == (400, "decode")


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\1\2\3 nothing like HTTP\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\nHost: t\r\nContent-Length: ten\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: t\r\nX-Long: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: t\r\n" + b"X-Many: x\r\n" * 10_000,
    ],
    ids=["no-http", "length-word", "length-negative", "bad-chunk", "long-header", "many-headers"],
)
def test_nonsense_closes_its_connection_only(server: Server, sent: bytes) -> None:
    """Malformed HTTP ends its connection, and the server goes on."""
    with server.connect() as connection:
        connection.send(sent)
        connection.wait_closed()
    assert server.client.post("/flows/echo", content=b"on").content == b"on"


def test_a_clients_error_holds_nothing_of_the_inside(folder: Path) -> None:
    """A stage that fails gives 500 with its name; the reason and the place are in the log."""
    _write_reshape(folder / "reshape.onnx")
    flow = write(folder / "reshape.flow", 'trt("reshape.onnx")\n')
    with serving(folder, str(flow)) as server:
        server.wait_ready()
        assert server.client.post("/", json=[1, 2, 3, 4]).json() == [[1, 2], [3, 4]]
        response = server.client.post("/", json=[1, 2, 3], headers={"X-Request-Id": "look-here"})
        assert response.status_code == 500
        error = error_of(response)
        assert (error["code"], error["flow"]) == ("stage-failed", "main")
        assert error["message"] == f"stage `{error['stage']}` failed"
        assert str(folder) not in response.text
        told = server.errors
    assert "look-here" in told
    assert "reshape.flow:1:1" in told


def _write_reshape(path: Path) -> None:
    """A model that takes any vector, and fails on all but those of four."""
    to = helper.make_tensor("to", TensorProto.INT64, [3], [-1, 2, 2])
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["data", "to"], ["result"])],
        "reshape",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", "L"])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["N", 2, 2])],
        [to],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[opset]), path)


def test_an_unforeseen_exception_is_an_internal_error(folder: Path, echo: Path) -> None:
    """A result that cannot be sent gives 500 without a word of why; the log has the traceback."""
    code = f"""
import sys, flowlang
from flowlang.runtime import host
from flowlang.serve import serve
host._MAKERS["pass"] = lambda node, settings: lambda value: object()
sys.exit(serve(lambda: flowlang.load({str(echo)!r}), "127.0.0.1", 0))
"""
    with running(folder, "-c", code) as server:
        server.wait_ready()
        ways: list[dict[str, str]] = [{"X-Request-Id": "here"}, {"X-Request-Id": "there"}]
        ways[1]["X-Priority"] = "0"  # which has it go through ASGI
        for headers in ways:
            response = server.client.post("/", content=b"x", headers=headers)
            assert response.status_code == 500
            assert error_of(response)["message"] == "internal error"
        assert server.client.get("/health/ready").status_code == 200
        told = server.errors
    assert "request here of flow" in told
    assert "request there of flow" in told
    assert told.count("Traceback") == 2
