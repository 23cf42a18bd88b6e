"""The command line: check, fmt, explain, run, serve, explain-error.

Layer 4. Exit status: 0 all well, 1 an item or a check failed, 2 wrong use.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flowlang import __version__
from flowlang.diagnostics import (
    CompileError,
    Diagnostic,
    FlowError,
    RequestError,
    render,
    to_json,
)

if TYPE_CHECKING:
    from flowlang.app import App

FAILED, WRONG_USE = 1, 2
_STYLES = {"error": "red", "warning": "yellow", "hint": "cyan"}


def _print_diagnostic(diagnostic: Diagnostic, *, err: bool = True) -> None:
    headline, _, rest = render(diagnostic).partition("\n")
    word, _, message = headline.partition(": ")
    style = _STYLES[diagnostic.severity]
    click.echo(
        click.style(word, fg=style, bold=True) + click.style(f": {message}", bold=True), err=err
    )
    click.echo(rest, err=err)
    click.echo(err=err)


def _fail(error: Exception, status: int = FAILED) -> NoReturn:
    """Say what went wrong as it deserves, and end with a status."""
    if isinstance(error, CompileError):
        for diagnostic in error.diagnostics:
            _print_diagnostic(diagnostic)
        count = len(error.diagnostics)
        click.echo(f"{count} error{'s' if count > 1 else ''}", err=True)
    elif isinstance(error, OSError):
        click.echo(f"flowlang: {error.filename}: {error.strerror}", err=True)
    else:
        click.echo(f"flowlang: {error}", err=True)
    sys.exit(status)


def _values(pairs: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set takes NAME=VALUE, not {pair!r}")
        values[name.strip()] = value
    return values


_FILE = click.Path(exists=True, dir_okay=False)


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that plans a flow."""
    for option in (
        click.option(
            "--set", "pairs", multiple=True, metavar="NAME=VALUE", help="Override a param."
        ),
        click.option(
            "--schedule", metavar="NAME", help="Lay a named schedule over the unnamed one."
        ),
    ):
        command = option(command)
    return command


_device = click.option(
    "--device", metavar="DEVICE", help="Where to run: cpu. The default is the best there is."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flowlang")
def main() -> None:
    """One line of pipeline, checked before it runs, served on the whole machine."""


@main.command()
@click.argument("file", type=_FILE)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@_plan_options
def check(file: str, form: str, pairs: tuple[str, ...], schedule: str | None) -> None:
    """Check FILE: every error in one run, nothing is run."""
    from flowlang.plan.files import check as check_file

    found = check_file(file, values=_values(pairs), schedule=schedule)
    errors = [d for d in found if d.severity == "error"]
    if form == "json":
        click.echo(to_json(found))
    else:
        for diagnostic in found:
            _print_diagnostic(diagnostic, err=False)
        click.echo(
            f"{file}: {f'{len(errors)} error' + 's' * (len(errors) > 1) if errors else 'ok'}"
        )
    sys.exit(FAILED if errors else 0)


@main.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option(
    "--check", "only_check", is_flag=True, help="Write nothing; fail if a file would change."
)
def fmt(files: tuple[str, ...], only_check: bool) -> None:
    """Write FILES in the one canonical layout."""
    from flowlang.syntax.format import format_program
    from flowlang.syntax.parse import parse, read_source

    failed = False
    for file in files:
        try:
            source = read_source(file)
            text = format_program(parse(source))
        except CompileError as error:
            for diagnostic in error.diagnostics:
                _print_diagnostic(diagnostic)
            failed = True
            continue
        changed = text.encode() != Path(file).read_bytes()
        if changed and only_check:
            click.echo(f"would reformat {file}")
            failed = True
        elif changed:
            _replace(Path(file), text)
            click.echo(f"reformatted {file}")
    sys.exit(FAILED if failed else 0)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8", newline="")
    temporary.chmod(path.stat().st_mode & 0o7777)
    temporary.replace(path)


@main.command()
@click.argument("file", type=_FILE)
@click.option(
    "--physical", is_flag=True, help="Print the stages too: where, how many, how batched."
)
@_device
@_plan_options
def explain(
    file: str, physical: bool, device: str | None, pairs: tuple[str, ...], schedule: str | None
) -> None:
    """Print the plan of FILE: operators and types, or with --physical its stages."""
    from flowlang.plan.explain import explain_physical, explain_plan
    from flowlang.plan.files import compile_file
    from flowlang.plan.physical import lower
    from flowlang.runtime.machine import this_machine

    try:
        plan = compile_file(file, values=_values(pairs), schedule=schedule)
        if physical:
            click.echo(explain_physical(plan, lower(plan, this_machine(device))), nl=False)
        else:
            click.echo(explain_plan(plan), nl=False)
    except (FlowError, OSError) as error:
        _fail(error)


@main.command("explain-error")
@click.argument("slug", required=False)
def explain_error(slug: str | None) -> None:
    """Print the page of an error's SLUG, or the list of them."""
    folder = resources.files("flowlang") / "explanations"
    pages = {p.name.removesuffix(".md"): p for p in folder.iterdir() if p.name.endswith(".md")}
    if slug is None:
        for name in sorted(pages):
            headline = pages[name].read_text("utf-8").splitlines()[0]
            click.echo(headline.lstrip("# "))
        return
    if slug not in pages:
        from flowlang.plan.arguments import did_you_mean

        hint = did_you_mean(slug, pages) or "`flowlang explain-error` lists them all"
        click.echo(f"flowlang: there is no error `{slug}`: {hint}", err=True)
        sys.exit(WRONG_USE)
    text = pages[slug].read_text("utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        click.echo(text, nl=False)


@main.command()
@click.argument("file", type=_FILE)
@click.argument("pictures", nargs=-1, required=True, type=click.Path())
@click.option(
    "--json", "as_lines", is_flag=True, help="One JSON object a line: path, result or error."
)
@click.option("--flow", "name", help="Which flow, where the file serves several.")
@_device
@_plan_options
def run(
    file: str,
    pictures: tuple[str, ...],
    as_lines: bool,
    name: str | None,
    device: str | None,
    pairs: tuple[str, ...],
    schedule: str | None,
) -> None:
    """Run the flow of FILE over PICTURES (files, or folders of them)."""
    app = _load(file, device, pairs, schedule)
    with app:
        try:
            flow = app[name] if name else app._only
        except FlowError as error:
            _fail(error, WRONG_USE)
        paths = list(_picture_files(pictures))
        contents: dict[int, OSError] = {}

        def items() -> Iterator[Any]:
            for index, path in enumerate(paths):
                try:
                    yield path.read_bytes()
                except OSError as error:
                    contents[index] = error
                    yield b""

        answers = (
            contents.get(index, answer)
            for index, answer in enumerate(flow.map(items(), errors="return"))
        )
        printer = _print_lines if as_lines else _print_table
        failures = printer(paths, answers)
    sys.exit(FAILED if failures else 0)


def _load(file: str, device: str | None, pairs: tuple[str, ...], schedule: str | None) -> App:
    from flowlang.app import load

    try:
        return load(file, device=device, values=_values(pairs), schedule=schedule)
    except (FlowError, OSError) as error:
        _fail(error)


def _picture_files(paths: tuple[str, ...]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file())
        else:
            yield path


def _error_of(answer: Any) -> dict[str, Any] | None:
    if isinstance(answer, RequestError):
        return {
            "code": answer.code,
            "message": answer.message,
            "stage": answer.stage,
            "place": answer.place,
        }
    if isinstance(answer, OSError):
        return {"code": "unreadable", "message": answer.strerror, "stage": None, "place": None}
    if isinstance(answer, Exception):
        raise answer
    return None


def _print_lines(paths: list[Path], answers: Iterator[Any]) -> int:
    from flowlang.app import plain

    failures = 0
    for path, answer in zip(paths, _with_progress(answers, len(paths)), strict=True):
        error = _error_of(answer)
        failures += error is not None
        line = {"path": str(path), **({"error": error} if error else {"result": plain(answer)})}
        click.echo(json.dumps(line, ensure_ascii=False))
    return failures


def _print_table(paths: list[Path], answers: Iterator[Any]) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("picture", "result", box=None, pad_edge=False)
    failures = 0
    start_s = time.perf_counter()
    for path, answer in zip(paths, _with_progress(answers, len(paths)), strict=True):
        error = _error_of(answer)
        failures += error is not None
        cell = Text(str(answer), "red") if error else Text(_summary(answer))
        table.add_row(Text(str(path)), cell)
    taken_s = time.perf_counter() - start_s
    console.print(table)
    click.echo(
        f"{len(paths) - failures} done, {failures} failed, {taken_s:.2f} s "
        f"({len(paths) / max(taken_s, 1e-9):.1f}/s)",
        err=True,
    )
    return failures


def _summary(answer: Any) -> str:
    """An answer in a table's cell."""
    if isinstance(answer, dict) and set(answer) == {"index", "label", "score"}:
        return f"{answer['label']} ({answer['score']:.3f})"
    if isinstance(answer, dict):
        return "\n".join(f"{name}: {_summary(part)}" for name, part in answer.items())
    if isinstance(answer, list):
        return "\n".join(_summary(part) for part in answer)
    if hasattr(answer, "shape"):
        first = ", ".join(f"{v:.4g}" for v in answer.reshape(-1)[:4])
        return f"{answer.dtype} {'x'.join(map(str, answer.shape))} [{first}, ...]"
    return str(answer)


def _with_progress(answers: Iterator[Any], total: int) -> Iterator[Any]:
    """The same answers, with a bar on a terminal's stderr while they come."""
    if total < 20 or not sys.stderr.isatty():
        yield from answers
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        yield from bar.track(answers, total=total)


@main.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@_device
@_plan_options
def serve(
    files: tuple[str, ...],
    host: str,
    port: int,
    device: str | None,
    pairs: tuple[str, ...],
    schedule: str | None,
) -> None:
    """Serve the flows of FILES over HTTP: POST a picture, get JSON."""
    from flowlang.app import App
    from flowlang.plan.files import compile_file
    from flowlang.plan.physical import lower
    from flowlang.runtime.machine import this_machine
    from flowlang.serve.http import serve as serve_http

    try:
        machine = this_machine(device)
        plans = [compile_file(f, values=_values(pairs), schedule=schedule) for f in files]
        names = [flow.name for plan in plans for flow in plan.flows]
        for name in {n for n in names if names.count(n) > 1}:
            raise FlowError(f"two of the files serve a flow named `{name}`; give one another name")
    except (FlowError, OSError) as error:
        _fail(error)
    sys.exit(serve_http(lambda: [App(p, lower(p, machine)) for p in plans], host, port))
