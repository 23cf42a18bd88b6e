"""`flowlang serve` with every protocol at once: one set of flows, one start, one end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton
from prometheus_client.parser import text_string_to_metric_families
from thriftpy2.rpc import client_context

from tests.pictures import photographs
from tests.serve.asking import bytes_by_grpc
from tests.serve.idl import IDL
from tests.serve.server import KINDS, PATIENCE_S, free_port, refused, serving, wait_until, write

PICTURE = photographs(1)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_server_speaks_them_all(folder: Path, kind: tuple[str, ...]) -> None:
    """HTTP, gRPC and Thrift answer from the same flows; SIGTERM ends all, losing nothing."""
    grpc_port, thrift_port = free_port(), free_port()
    options = ["--grpc-port", str(grpc_port), "--thrift-port", str(thrift_port), *kind]
    files = [str(folder / "all.flow"), str(folder / "types.flow")]
    with (
        serving(folder, *options, "--thrift-flow", "classify", *files) as server,
        triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client,
        ThreadPoolExecutor(5) as pool,
    ):
        server.wait_ready()
        label = server.client.post("/flows/classify", content=PICTURE).json()[0]
        assert client.infer("classify", bytes_by_grpc(PICTURE)).as_numpy("output").shape == (1,)
        service = IDL.InferenceService
        with client_context(service, "127.0.0.1", thrift_port, socket_timeout=30_000) as thrift:
            found = thrift.infer_batch(IDL.InferenceParams(uuid="a", data=PICTURE))
            assert found.label == label["label"]
        (counted,) = client.get_inference_statistics("classify").model_stats
        assert counted.inference_count == 1
        over_grpc = pool.submit(client.infer, "slow", bytes_by_grpc(b"x"))
        over_http = [pool.submit(server.client.post, "/flows/slow", content=b"x") for _ in range(4)]
        time.sleep(0.2)
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.client.get("/v2/health/ready").status_code == 503)
        assert over_grpc.result(PATIENCE_S).as_numpy("output").tolist() == [b"x"]
        assert [call.result(PATIENCE_S).content for call in over_http] == [b"x"] * 4
        assert server.wait() == 0
        assert "Traceback" not in server.errors


def test_refusals_are_counted_alike(folder: Path) -> None:
    """What is of no flow is one more of its code by whatever protocol it came, what is is not."""
    options = ["--grpc-port", "0", "--thrift-port", "0", "--device", "cpu"]
    with serving(folder, *options, str(folder / "types.flow")) as server:
        server.wait_ready()
        ports = [int(url.rpartition(":")[2]) for url in server.urls]

        def counts(metric: str) -> dict[str, float]:
            text = server.client.get("/metrics").text
            return {
                sample.labels["code"]: sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == metric and sample.labels.get("flow", "total") == "total"
            }

        with triton.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:
            calls: tuple[Callable[..., Any], ...] = (
                partial(client.infer, "nothing", bytes_by_grpc(b"x")),
                partial(client.get_model_config, "nothing"),
                partial(client.infer, "total", bytes_by_grpc(b"x"), model_version="2"),
                partial(client.infer, "total", bytes_by_grpc(b"no JSON")),  # of a flow
            )
            for call in calls:
                with pytest.raises(triton.InferenceServerException):
                    call()
        assert counts("flowlang_refusals_total") == {"not-found": 3}
        assert counts("flowlang_requests_total") == {"ok": 0, "bad-request": 1}
        for name in (b"nothing", b"infer_batch"):  # the latter without its arguments
            with socket.create_connection(("127.0.0.1", ports[1]), PATIENCE_S) as connection:
                size = len(name).to_bytes(4, "big")
                connection.sendall(b"\x80\x01\x00\x01" + size + name + bytes(5))
                assert connection.recv(4) == b"\x80\x01\x00\x03"  # an exception
        assert counts("flowlang_refusals_total") == {"not-found": 4, "bad-request": 1}
        assert counts("flowlang_requests_total") == {"ok": 0, "bad-request": 1}


@pytest.mark.parametrize("face", ["grpc", "thrift"])
def test_a_port_in_use_ends_the_server(folder: Path, face: str) -> None:
    """A face that cannot listen is told, and nothing is served without it."""
    path = write(folder / "echo.flow", "pass\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ["--port", "0", f"--{face}-port", str(port)]
        done = subprocess.run(
            [sys.executable, "-m", "flowlang", "serve", *options, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    (told,) = (line for line in done.stderr.splitlines() if line.startswith("flowlang: "))
    assert told.startswith(f"flowlang: cannot listen on 127.0.0.1:{port}")
    assert told.count(str(port)) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_every_port_takes_both_kinds_of_addresses(folder: Path, kind: tuple[str, ...]) -> None:
    """With `--host ::` whoever comes by IPv4 is taken too, by whatever protocol."""
    ports = ("--grpc-port", "0", "--thrift-port", "0", "--metrics-port", "0")
    flow = str(write(folder / "echo.flow", "pass\n"))
    with serving(folder, "--host", "::", *ports, *kind, flow) as server:
        server.wait_ready()
        there = [int(url.removesuffix("/metrics").rpartition(":")[2]) for url in server.urls]
        assert len(there) == 4
        for port in there:
            for address in ("127.0.0.1", "::1"):
                socket.create_connection((address, port), PATIENCE_S).close()


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "[::1]"])
def test_a_host_that_is_none_ends_the_server(folder: Path, host: str) -> None:
    """In a line that names it, whatever makes it none."""
    path = write(folder / "echo.flow", "pass\n")
    status, told = refused("--host", host, str(path))
    assert status == 1
    assert told.startswith(f"flowlang: cannot listen on {host}:0: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(("face", "package"), [("grpc", "grpc"), ("thrift", "thriftpy2")])
def test_a_missing_package_is_named(folder: Path, face: str, package: str) -> None:
    """Without the extra, the option says which one to install."""
    path = write(folder / "echo.flow", "pass\n")
    code = (
        f"import sys; sys.modules[{package!r}] = None; from flowlang.cli import main; "
        f"main(['serve', '--{face}-port', '0', {str(path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"pip install 'flowlang[{face}]'" in done.stderr


def test_a_flow_that_thrift_cannot_mean(folder: Path) -> None:
    """`--thrift-flow` names one of the flows, or nothing is served."""
    path = write(folder / "echo.flow", "pass\n")
    options = ["--thrift-port", "0", "--thrift-flow", "other"]
    done = subprocess.run(
        [sys.executable, "-m", "flowlang", "serve", *options, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "there is no flow `other`" in done.stderr
