"""What a server writes to stderr: lines for people or for programs, and one for each request."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowlang.serve.log import JsonFormatter
from tests.serve.server import ROOT, Server, refused, serving, wait_until, write

OPERATORS = """
def fail(data: bytes) -> bytes:
    raise RuntimeError("it broke")

def slow(data: bytes) -> bytes:
    import time
    time.sleep(0.5)
    return data
"""
FLOWS = """
use "ops.py" as ops
export flow echo = pass
export flow fail = ops.fail
export flow slow = ops.slow
export flow picture = decode
"""


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logged")
    write(folder / "ops.py", OPERATORS)
    return write(folder / "all.flow", FLOWS)


@contextmanager
def logged(flow: Path, *options: str) -> Iterator[Server]:
    with serving(flow.parent, str(flow), "--device", "cpu", *options) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def server(flow: Path) -> Iterator[Server]:
    with logged(flow, "--log-format=json", "--log-level=info") as server:
        yield server


def lines_of(server: Server, **wanted: Any) -> list[dict[str, Any]]:
    """The lines it wrote that have these values. Every line is an object."""
    told = [json.loads(line) for line in server.errors.splitlines()]
    return [line for line in told if wanted.items() <= line.items()]


def test_a_line_says_when_how_bad_where_and_what(server: Server) -> None:
    """What every line has: its time in RFC 3339, its level, its logger, its message."""
    server.client.post("/flows/picture", content=b"x", headers={"x-request-id": "r-1"})
    (line,) = lines_of(server, request_id="r-1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["level"], line["logger"]) == ("info", "flowlang.serve")
    assert line["message"].startswith("request r-1 of flow `picture`: decode failed")


def test_a_request_without_a_result_has_fields_of_its_own(server: Server) -> None:
    """The same id as in the answer, and what the message says for people."""
    answer = server.client.post("/flows/picture", content=b"x")
    (line,) = lines_of(server, request_id=answer.headers["x-request-id"])
    assert (line["flow"], line["code"], line["stage"]) == ("picture", "bad-request", "decode")
    assert line["place"].endswith("all.flow:6:23")
    assert "trace_id" not in line


def test_an_exception_is_one_line(server: Server) -> None:
    """The lane's line has the traceback and its place, the request's its id and what failed."""
    server.client.post("/flows/fail", content=b"x", headers={"x-request-id": "r-2"})
    (line,) = lines_of(server, request_id="r-2")
    assert (line["level"], line["code"]) == ("warning", "stage-failed")
    (lane,) = lines_of(server, logger="flowlang.python")
    assert (lane["level"], lane["stage"]) == ("error", "ops.fail")
    assert lane["exception"].startswith("Traceback")
    assert lane["exception"].endswith("RuntimeError: it broke")
    assert lane["place"] == line["place"]


def test_the_protocol_over_http_logs_the_id_of_the_answer(server: Server) -> None:
    """A message's own id is the one of its line, as it is of the answer."""
    body = {"id": "of the message", "inputs": []}
    answer = server.client.post("/v2/models/echo/infer", json=body)
    assert answer.headers["x-request-id"] == "of the message"
    (line,) = lines_of(server, request_id="of the message")
    assert (line["flow"], line["code"]) == ("echo", "bad-request")


def test_an_id_that_no_header_can_bring_is_not_the_requests(server: Server) -> None:
    """Half a character, or one that ends a line, stays in the message."""
    for own in ("\ud800", "a\nb", "é"):
        body = json.dumps({"id": own, "inputs": []})
        answer = server.client.post("/v2/models/echo/infer", content=body)
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
        assert lines_of(server, request_id=answer.headers["x-request-id"])


def test_parts_of_a_form_are_told_one_by_one(server: Server) -> None:
    """Two files that are no pictures have two lines of one request."""
    files = [("file", ("a.jpg", b"x")), ("file", ("b.jpg", b"y"))]
    answer = server.client.post("/flows/picture", files=files)
    lines = lines_of(server, request_id=answer.headers["x-request-id"])
    assert [line["code"] for line in lines] == ["bad-request"] * 2
    assert {line["flow"] for line in lines} == {"picture"}


def test_a_reload_that_fails_is_a_line(tmp_path: Path) -> None:
    """The reason is all of one message, with its lines."""
    path = write(tmp_path / "my.flow", "pass\n")
    with logged(path, "--log-format=json", "--watch") as server:
        write(path, "pass -> nothing\n")
        wait_until(lambda: "kept as it was" in server.errors)
        (line,) = lines_of(server)
        assert line["level"] == "warning"
        assert "`nothing`" in line["message"]


def test_what_is_wrong_before_it_serves_is_a_line(tmp_path: Path) -> None:
    """A flow that does not check, and a port that is taken, are told as the rest is."""
    path = write(tmp_path / "my.flow", "nothing\n")
    status, told = refused(str(path), "--log-format=json")
    assert status == 1
    (line,) = (json.loads(text) for text in told.splitlines())
    assert line["level"] == "error"
    assert "`nothing`" in line["message"]
    write(path, "pass\n")
    with logged(path) as server:
        status, told = refused(str(path), "--log-format=json", "--metrics-port", str(server.port))
        assert status == 1
        assert "cannot listen" in json.loads(told)["message"]


PROGRAM = """
import logging, threading, warnings
from flowlang.serve.log import write_log

write_log("json", "warning")
logging.getLogger("uvicorn.error").error("of uvicorn")
logging.getLogger("flowlang").info("not loud enough")
warnings.warn("of a library")
thread = threading.Thread(target=lambda: 1 / 0, name="other")
thread.start()
thread.join()
raise ValueError("the end\\nof it")
"""


def test_lines_of_others_are_of_the_same_kind() -> None:
    """What uvicorn, warnings, threads and Python itself have to say is JSON as well."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["error", "warning", "critical", "critical"]
    assert (lines[0]["logger"], lines[0]["message"]) == ("uvicorn.error", "of uvicorn")
    assert "of a library" in lines[1]["message"]
    assert "other" in lines[2]["message"]
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert lines[3]["exception"].endswith("ValueError: the end\nof it")


def test_values_that_json_does_not_know_are_text() -> None:
    """No line is lost for what is in it."""
    record = logging.makeLogRecord({"msg": "half \ud800", "status": Path("x"), "flow": None})
    told = json.loads(JsonFormatter().format(record))
    assert told["message"] == "half \ud800"
    assert told["status"] == "x"
    assert "flow" not in told


def test_text_is_the_sentence_alone(flow: Path) -> None:
    """By default what needs somebody's attention is written, and mistakes of clients are not."""
    with logged(flow) as server:
        server.client.post("/flows/picture", content=b"x")
        server.client.get("/nothing")
        assert server.errors == ""
        server.client.post("/flows/fail", content=b"x", headers={"x-request-id": "r-3"})
        last = server.errors.splitlines()[-1]
        assert last.startswith("request r-3 of flow `fail`: `ops.fail` failed: RuntimeError")


def test_the_level_says_what_is_written(flow: Path) -> None:
    """From `info` on there are the mistakes of clients, and from `error` on no request at all."""
    with logged(flow, "--log-level", "info") as server:
        server.client.post("/flows/picture", content=b"x", headers={"x-request-id": "r-4"})
        assert server.errors.startswith("request r-4 of flow `picture`: decode failed")
    with logged(flow, "--log-level", "error") as server:
        server.client.post("/flows/fail", content=b"x", headers={"x-request-id": "r-5"})
        assert "r-5" not in server.errors
        assert "`ops.fail` failed" in server.errors


def test_the_access_log_has_a_line_for_each_request(flow: Path) -> None:
    """Whatever came over HTTP: what was asked, what was answered, and how long that took."""
    with logged(flow, "--access-log", "--log-format", "json") as server:
        client = server.client
        asked = [
            client.post("/flows/echo?k=secret", content=b"x"),
            client.post("/flows/picture", content=b"x"),
            client.get("/health/live"),
            client.get("/a%0Ab"),
        ]
        wait_until(lambda: len(lines_of(server)) == 4)
        lines = lines_of(server, level="info", logger="flowlang.access")
        assert [line["path"] for line in lines] == [
            *("/flows/echo", "/flows/picture", "/health/live", "/a%0Ab")
        ]
        for line, answer in zip(lines, asked, strict=True):
            assert line["method"] == answer.request.method
            assert line["status"] == answer.status_code
            assert line["request_id"] == answer.headers["x-request-id"]
            assert 0 < line["ms"] < 10_000
        assert "secret" not in server.errors


def test_who_hangs_up_is_in_the_access_log(flow: Path) -> None:
    """Nothing was answered: the status is that of a request given up by its client."""
    with logged(flow, "--access-log") as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/flows/slow", content=b"x", timeout=0.2)
        wait_until(lambda: server.errors != "")
        assert re.fullmatch(r"POST /flows/slow 499 \d+\.\d{3} ms -\n", server.errors)


def test_the_access_log_as_text(flow: Path) -> None:
    """One line, whose last word is the request's id."""
    with logged(flow, "--access-log") as server:
        server.client.post("/flows/echo", content=b"x", headers={"x-request-id": "r-6"})
        wait_until(lambda: server.errors != "")
        assert re.fullmatch(r"POST /flows/echo 200 \d+\.\d{3} ms r-6\n", server.errors)
