"""Options that say what a server tells of its work: its log, and traces of requests.

Layer 4.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from flowlang.diagnostics import FlowError

if TYPE_CHECKING:
    from flowlang.serve.log import Form
    from flowlang.serve.trace import Tracer

log = logging.getLogger("flowlang.serve")


def log_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options; the command is given the `tracer`, and its errors are told as the log is."""

    @functools.wraps(command)
    def logged(
        traces: bool, log_format: Form, log_level: str, **others: Any
    ) -> None:  # under the names of the options
        from flowlang.serve.log import write_log

        tracer = make_tracer() if traces else None
        write_log(log_format, log_level, tracer.trace_id if tracer is not None else None)
        try:
            command(tracer=tracer, **others)
        except (FlowError, OSError) as error:
            if log_format == "text":  # told as by any other command, with colours
                raise
            log.error("%s", error)
            sys.exit(1)

    for option in (
        click.option(
            "--access-log",
            "tells_requests",
            is_flag=True,
            help="Log each request over HTTP, gRPC and Thrift.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="warning",
            show_default=True,
            help="Log this, and what weighs more.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="Log text, or one JSON object a line.",
        ),
        click.option(
            "--otel",
            "traces",
            is_flag=True,
            help="Send traces of requests by OpenTelemetry, to where OTEL_* variables say.",
        ),
    ):
        logged = option(logged)
    return logged


def make_tracer() -> Tracer:
    """Raises FlowError where the packages are missing, or the variables ask for what is not."""
    try:
        from flowlang.serve.trace import Tracer

        return Tracer()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise FlowError(
            "--otel needs OpenTelemetry's SDK and its exporter for OTLP over HTTP: "
            "pip install 'flowlang[otel]'"
        ) from None
    except ValueError as error:  # of the SDK, some of it as it is imported; it names the variable
        raise FlowError(f"--otel: {error}") from None
