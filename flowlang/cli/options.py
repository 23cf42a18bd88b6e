"""Options that several commands share, and what is made of their values.

Layer 4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from flowlang.runtime.seal import Key
    from flowlang.serve.token import Token

KEY_VARIABLE = "FLOWLANG_KEY"


def named_values(
    ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"it takes NAME=VALUE, not {pair!r}")
        if name.strip() in values:
            raise click.BadParameter(f"`{name.strip()}` is given twice")
        values[name.strip()] = value
    return values


def _checked_device(ctx: click.Context, param: click.Parameter, device: str | None) -> str | None:
    if device is not None and not re.fullmatch("cpu|gpu(:[0-9]+)?", device):
        raise click.BadParameter(f"{device!r} is none of cpu, gpu and gpu:NUMBER")
    return device


def _read_key(ctx: click.Context, param: click.Parameter, file: str | None) -> Key | None:
    if file is None and not os.environ.get(KEY_VARIABLE):
        return None
    from flowlang.runtime import seal

    return seal.read_key(environment_variable=None if file else KEY_VARIABLE, file=file)


def _read_token(ctx: click.Context, param: click.Parameter, file: str | None) -> Token | None:
    from flowlang.serve.token import read_token

    return read_token(None if file is None else Path(file))


def opener_of(key: Key | None) -> Callable[[Path], bytes]:
    """What opens encrypted models; most programs have none, and spare themselves the import."""

    def open_model(path: Path) -> bytes:
        from flowlang.runtime import seal

        return seal.model_opener(key.secret if key else None)(path)

    return open_model


FILE = click.Path(exists=True, dir_okay=False)


def key_option(does: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option for a key, which is read before anything is done."""
    return click.option(
        "--key-file",
        "key",
        type=FILE,
        callback=_read_key,
        help=f"{does} The default is in {KEY_VARIABLE}.",
    )


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that plans a flow."""
    for option in (
        click.option(
            "--set",
            "values",
            multiple=True,
            metavar="NAME=VALUE",
            callback=named_values,
            help="Override a param.",
        ),
        click.option(
            "--schedule", metavar="NAME", help="Lay a named schedule over the unnamed one."
        ),
        key_option("What opens encrypted models."),
    ):
        command = option(command)
    return command


device_option = click.option(
    "--device",
    metavar="DEVICE",
    callback=_checked_device,
    help="Where to run: cpu, gpu or gpu:NUMBER. The default is the GPU where there is one.",
)


engines_option = click.option(
    "--engines",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of built TensorRT engines, in place of the user's cache.",
)


token_option = click.option(
    "--token-file",
    "token",
    type=FILE,
    callback=_read_token,
    help="Let in who has the token in this file's first line. The default is in FLOWLANG_TOKEN.",
)
