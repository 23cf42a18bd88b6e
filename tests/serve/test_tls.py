"""TLS at every port: real certificates, real clients, and what is refused before it listens."""

from __future__ import annotations

import signal
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from thriftpy2.rpc import client_context

import flowlang
from tests.pictures import photographs
from tests.serve.certificates import Pair, make_pair
from tests.serve.idl import IDL
from tests.serve.server import KINDS, PATIENCE_S, Server, head, refused, serving, write, write_flows

PICTURE = photographs(1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `all.flow`, and `echo.flow`, which answers what it is sent."""
    folder = tmp_path_factory.mktemp("flows")
    write_flows(folder)
    write(folder / "echo.flow", "pass\n")
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return make_pair(folder, "server")


@pytest.fixture(scope="module")
def trust(pair: Pair) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pair.cert))


@pytest.fixture(scope="module", params=KINDS)
def server(
    folder: Path, pair: Pair, trust: ssl.SSLContext, request: pytest.FixtureRequest
) -> Iterator[Server]:
    """A server of all flows by all protocols, with a certificate."""
    options = ["--grpc-port", "0", "--thrift-port", "0", "--thrift-flow", "classify"]
    file = str(folder / "all.flow")
    with serving(folder, *request.param, *pair.options, *options, file, trust=trust) as server:
        yield server.wait_ready()


def test_http_is_spoken_over_tls(server: Server) -> None:
    """The URL told is https, and a client that trusts the certificate is answered."""
    assert server.url.startswith("https://127.0.0.1:")
    response = server.client.post("/flows/classify", content=PICTURE)
    assert response.status_code == 200
    large = np.random.default_rng(0).bytes(5_000_000)
    assert server.client.post("/flows/echo", content=large).content == large


def test_grpc_is_spoken_over_tls(server: Server, pair: Pair) -> None:
    """Triton's client is answered over TLS."""
    address = f"127.0.0.1:{server.port_of('grpcs')}"
    sent = triton.InferInput("input", [1], "BYTES")
    sent.set_data_from_numpy(np.array([b"abc"], object))
    with triton.InferenceServerClient(
        address, ssl=True, root_certificates=str(pair.cert)
    ) as client:
        assert client.infer("echo", [sent]).as_numpy("output").tolist() == [b"abc"]


def test_thrift_is_spoken_over_tls(server: Server, trust: ssl.SSLContext) -> None:
    """A Thrift client is answered over TLS."""
    port = server.port_of("thrifts")
    with client_context(
        IDL.InferenceService, "127.0.0.1", port, socket_timeout=30_000, ssl_context=trust
    ) as client:
        found = client.infer_batch(IDL.InferenceParams(uuid="a", data=PICTURE))
    assert found.label == server.client.post("/flows/classify", content=PICTURE).json()[0]["label"]


@pytest.mark.parametrize("scheme", ["https", "grpcs", "thrifts"])
def test_tls_is_of_version_1_2_at_least(server: Server, scheme: str) -> None:
    """Versions 1.2 and 1.3 are spoken at every port, and 1.1 at none."""

    def version(newest: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        context.set_alpn_protocols(["h2"] if scheme == "grpcs" else ["http/1.1"])
        with warnings.catch_warnings():  # it is an old version that is asked for
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = newest
        with (
            socket.create_connection(("127.0.0.1", server.port_of(scheme)), PATIENCE_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            return secure.version()

    assert version(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    assert version(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        version(ssl.TLSVersion.TLSv1_1)


def test_who_does_not_speak_tls_is_not_answered(server: Server) -> None:
    """Plain HTTP at the port of HTTPS ends its connection, and is nothing the operator is told."""
    before = server.errors  # gRPC's library tells of handshakes that fail
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health/live")
    with server.connect() as connection:
        connection.send(b"\0\1\2 nothing like TLS")
        connection.wait_closed()
    assert server.client.post("/flows/echo", content=b"on").content == b"on"
    assert server.errors == before


def test_a_stop_does_not_wait_for_idle_connections(
    folder: Path, pair: Pair, trust: ssl.SSLContext
) -> None:
    """A client that keeps its connection open, and asks for nothing, does not hold up the end.

    Nor does one that has never begun with TLS.
    """
    file = str(folder / "echo.flow")
    with serving(folder, *pair.options, file, trust=trust) as server, server.connect():
        server.wait_ready()
        assert server.client.post("/", content=b"x").content == b"x"
        start_s = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start_s < 5
        assert server.errors == ""


def test_a_stop_loses_no_answer_on_its_way(folder: Path, pair: Pair, trust: ssl.SSLContext) -> None:
    """An answer that a slow client has not taken yet when the server stops comes whole."""
    body = bytes(20 << 20)  # more than the system's buffers hold
    with (
        serving(folder, *pair.options, str(folder / "echo.flow"), trust=trust) as server,
        socket.create_connection(("127.0.0.1", server.wait_ready().port), PATIENCE_S) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(head("/", len(body)).encode() + body)
        received = connection.recv(1 << 16)
        server.signal(signal.SIGTERM)
        time.sleep(1)  # it has long closed the connections that it may close
        while more := connection.recv(1 << 20):
            received += more
        assert received.partition(b"\r\n\r\n")[2] == body
        assert server.wait() == 0


@pytest.mark.parametrize(("given", "missing"), [("cert", "key"), ("key", "cert")])
def test_one_file_alone_is_wrong_use(folder: Path, pair: Pair, given: str, missing: str) -> None:
    """A certificate without its key, or the other way round, is told as wrong use."""
    options = [f"--tls-{given}", str(getattr(pair, given))]
    status, told = refused(*options, str(folder / "echo.flow"))
    assert status == 2
    assert f"--tls-{given} needs --tls-{missing} beside it" in told


def test_files_that_cannot_be_used_are_told(folder: Path, pair: Pair) -> None:
    """What is wrong with the files is said before anything listens."""
    other = make_pair(folder, "other")
    locked = make_pair(folder, "locked", is_encrypted=True)
    torn = write(
        folder / "torn.crt", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
    )
    for cert, key, words in (
        (pair.cert, other.key, "other.key is not the key of the certificate in"),
        (pair.key, pair.key, "server.key holds no certificate in PEM"),
        (pair.cert, pair.cert, "server.crt holds no private key in PEM"),
        (torn, pair.key, "cannot be used for TLS"),
        (locked.cert, locked.key, "locked.key is encrypted: `openssl pkey -in"),
    ):
        status, told = refused(*Pair(cert, key).options, str(folder / "echo.flow"))
        assert (status, words in told) == (1, True), told
        assert len(told.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_told(pair: Pair, tmp_path: Path) -> None:
    """A file that is not there, or closed to the server, gives a sentence."""
    from flowlang.serve.tls import read_certificate

    for cert, key, words in (
        (tmp_path / "none", pair.key, "cannot read the certificate .*none: No such file"),
        (pair.cert, tmp_path, "cannot read the private key .*: Is a directory"),
    ):
        with pytest.raises(flowlang.FlowError, match=words):
            read_certificate(cert, key)


def test_a_certificate_does_not_show_its_key(pair: Pair) -> None:
    """The key is in no text made of a certificate, as in a log."""
    from flowlang.serve.tls import read_certificate

    assert "PRIVATE" not in repr(read_certificate(*pair))
