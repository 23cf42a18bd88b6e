"""The command `serve`: what to serve, by which protocols, and where.

Layer 4.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowlang.cli.log import log_options
from flowlang.cli.options import (
    FILE,
    device_option,
    engines_option,
    opener_of,
    plan_options,
    token_option,
)
from flowlang.diagnostics import FlowError

if TYPE_CHECKING:
    from flowlang.app import App
    from flowlang.plan.check import Plan
    from flowlang.runtime.seal import Key
    from flowlang.serve.setup import MakeFace
    from flowlang.serve.tls import Certificate
    from flowlang.serve.token import Token
    from flowlang.serve.trace import Tracer

PORT = click.IntRange(0, 65535)


def _check_number(context: click.Context, option: click.Parameter, value: float) -> float:
    if math.isnan(value):  # which is in every range
        raise click.BadParameter("nan is no number of seconds", context, option)
    return value


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=PORT)
@click.option(
    "--ingest",
    "fronts",
    type=click.IntRange(0, 64),
    default=0,
    metavar="N",
    help="Read HTTP in N processes of their own. One interpreter reads a few thousand pictures a "
    "second.",
)
@click.option(
    "--watch",
    "watches",
    is_flag=True,
    help="Load the flows again when their files change; the old ones stay if the new do not check.",
)
@click.option(
    "--drain-delay",
    type=click.FloatRange(0, 3600),
    default=0,
    metavar="SECONDS",
    callback=_check_number,
    help="Once told to stop, say so to health checks for so long before requests are refused.",
)
@click.option(
    "--grpc-port",
    type=PORT,
    help="Serve the Open Inference Protocol over gRPC there too; Triton's port is 8001.",
)
@click.option(
    "--thrift-port",
    type=PORT,
    help="Serve InferenceService over Thrift there too; its clients look at 8888.",
)
@click.option("--thrift-flow", metavar="NAME", help="The flow that Thrift means if it names none.")
@click.option(
    "--metrics-port",
    type=PORT,
    help="Tell /metrics there too, and nothing else, to everybody; Triton's port is 8002.",
)
@click.option(
    "--tls-cert",
    type=FILE,
    help="Speak TLS at every port, with this certificate and those that vouch for it, in PEM.",
)
@click.option("--tls-key", type=FILE, help="The private key of that certificate, in PEM.")
@token_option
@log_options
@device_option
@engines_option
@plan_options
def serve(
    files: tuple[str, ...],
    host: str,
    port: int,
    fronts: int,
    watches: bool,
    drain_delay: float,
    grpc_port: int | None,
    thrift_port: int | None,
    thrift_flow: str | None,
    metrics_port: int | None,
    tls_cert: str | None,
    tls_key: str | None,
    token: Token | None,
    tells_requests: bool,
    tracer: Tracer | None,
    device: str | None,
    engines: Path | None,
    values: dict[str, str],
    schedule: str | None,
    key: Key | None,
) -> None:
    """Serve the flows of FILES over HTTP: POST a picture, get JSON."""
    # The first process of a container is sent no signal that it does not ask for: what comes while
    # files are checked would be lost, and it would serve until it is killed. Nobody is served yet.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from flowlang.app import App
    from flowlang.plan.files import compile_files
    from flowlang.plan.physical import lower
    from flowlang.runtime.machine import this_machine
    from flowlang.serve.http import serve as serve_http

    certificate = _certificate(tls_cert, tls_key)
    faces = _faces(grpc_port, thrift_port, thrift_flow, token)
    opener = opener_of(key)

    def check() -> Sequence[Plan]:
        return compile_files(files, values=values, schedule=schedule, opener=opener)

    # What is wrong now is told before anything listens. The GPU is looked at where it will be used:
    # what a process has begun with CUDA is of no use to those that it forks.
    plans = check()
    first = [] if fronts else [lower(plans, this_machine(device))]
    if watches:  # read it again once that has begun: a change until then would not be seen
        first.clear()
    names = [flow.name for plan in plans for flow in plan.flows]
    if thrift_flow is not None and thrift_flow not in names:
        there = ", ".join(f"`{name}`" for name in names)
        raise click.UsageError(f"--thrift-flow: there is no flow `{thrift_flow}`; there is {there}")

    def load() -> App:
        physical = first.pop() if first else lower(check(), this_machine(device))
        return App(physical, engines=engines, key=key, observer=tracer)

    sys.exit(
        serve_http(
            load,
            host,
            port,
            watches=watches,
            drain_delay_s=drain_delay,
            faces=faces,
            certificate=certificate,
            token=token,
            metrics_port=metrics_port,
            fronts=fronts,
            tells_requests=tells_requests,
            tracer=tracer,
        )
    )


def _certificate(chain: str | None, key: str | None) -> Certificate | None:
    """The certificate to show. Raises FlowError for one that cannot be used."""
    if (chain is None) != (key is None):
        given, missing = (
            ("--tls-key", "--tls-cert") if chain is None else ("--tls-cert", "--tls-key")
        )
        raise click.UsageError(f"{given} needs {missing} beside it")
    if chain is None or key is None:
        return None
    from flowlang.serve.tls import read_certificate

    return read_certificate(Path(chain), Path(key))


def _faces(
    grpc_port: int | None, thrift_port: int | None, thrift_flow: str | None, token: Token | None
) -> list[MakeFace]:
    """The protocols to serve besides HTTP. Raises FlowError where one of them cannot be."""
    from flowlang.serve.grpc import GrpcServer
    from flowlang.serve.thrift import ThriftServer

    faces: list[MakeFace] = []
    if grpc_port is not None:
        _check_installed("grpc", "grpc")
        faces.append(partial(GrpcServer, port=grpc_port))
    if thrift_port is not None:
        if token is not None:
            raise click.UsageError(
                "--thrift-port would let in everybody, for Thrift has no place for a token: "
                "leave one of the two out"
            )
        _check_installed("thriftpy2", "thrift")
        faces.append(partial(ThriftServer, port=thrift_port, flow=thrift_flow))
    return faces


def _check_installed(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise FlowError(f"{extra} needs the package {package}: pip install 'flowlang[{extra}]'")
