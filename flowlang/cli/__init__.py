"""The command line: every command, its options and its exit status.

Layer 4. Exit status: 0 all well, 1 an item or a check failed, 2 wrong use.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flowlang import __version__
from flowlang.cli.options import (
    FILE,
    KEY_VARIABLE,
    device_option,
    engines_option,
    key_option,
    named_values,
    opener_of,
    plan_options,
)
from flowlang.cli.serve import serve
from flowlang.diagnostics import (
    BadRequest,
    CompileError,
    Diagnostic,
    FlowError,
    render,
    shown,
    to_json,
)

if TYPE_CHECKING:
    from flowlang.app import App, Flow
    from flowlang.runtime.seal import Key

FAILED, INTERRUPTED = 1, 130
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


def _collect_no_garbage() -> None:
    """For commands that end at once: imports alone would set off collections of some 15 ms."""
    gc.disable()


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"


def _fail(error: Exception) -> NoReturn:
    """Say what went wrong as it deserves, and end."""
    if isinstance(error, CompileError):
        for diagnostic in error.diagnostics:
            _print_diagnostic(diagnostic)
        click.echo(_count(len(error.diagnostics), "error"), err=True)
    elif isinstance(error, OSError):
        click.echo(f"flowlang: {_reason(error)}", err=True)
    else:
        click.echo(f"flowlang: {error}", err=True)
    sys.exit(FAILED)


def _reason(error: OSError) -> str:
    """What the operating system says, and of which file."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{shown(error.filename)}: {error.strerror}"


class _Commands(click.Group):
    """The commands, with one end for each way in which any of them can fail."""

    def main(self, *args: Any, **more: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # what it cannot hold is no failure
        return super().main(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FlowError as error:
            _fail(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # who read our output has gone: click ends it silently
                raise
            _fail(error)
        except KeyboardInterrupt:
            click.echo("flowlang: interrupted", err=True)
            sys.stdout.flush()
            # A thread inside a model's code aborts the process if the interpreter ends around it.
            os._exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flowlang")
def main() -> None:
    """One line of pipeline, checked before it runs, served on the whole machine."""


@main.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@plan_options
def check(
    files: tuple[str, ...],
    form: str,
    values: dict[str, str],
    schedule: str | None,
    key: Key | None,
) -> None:
    """Check FILES: every error in one run, nothing is run."""
    _collect_no_garbage()
    from flowlang.plan.files import check as check_file

    opener = opener_of(key)
    found = {
        file: check_file(file, values=values, schedule=schedule, opener=opener) for file in files
    }
    if form == "json":
        click.echo(to_json([d for diagnostics in found.values() for d in diagnostics]))
    failed = False
    for file, diagnostics in found.items():
        errors = sum(d.severity == "error" for d in diagnostics)
        failed = failed or errors > 0
        if form == "text":
            for diagnostic in diagnostics:
                _print_diagnostic(diagnostic, err=False)
            click.echo(f"{shown(file)}: {_count(errors, 'error') if errors else 'ok'}")
    sys.exit(FAILED if failed else 0)


@main.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option(
    "--check", "only_check", is_flag=True, help="Write nothing; fail if a file would change."
)
def fmt(files: tuple[str, ...], only_check: bool) -> None:
    """Write FILES in the one canonical layout."""
    _collect_no_garbage()
    from flowlang.syntax.format import format_program
    from flowlang.syntax.parse import parse, read_source

    failed = False
    for file in files:
        try:
            text = format_program(parse(read_source(file)))
        except CompileError as error:
            for diagnostic in error.diagnostics:
                _print_diagnostic(diagnostic)
            failed = True
            continue
        changed = text.encode() != Path(file).read_bytes()
        if changed and only_check:
            click.echo(f"would reformat {shown(file)}")
            failed = True
        elif changed:
            _replace(Path(file), text)
            click.echo(f"reformatted {shown(file)}")
    sys.exit(FAILED if failed else 0)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8", newline="")
        temporary.chmod(path.stat().st_mode & 0o7777)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@main.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option(
    "--physical", is_flag=True, help="Print the stages too: where, how many, how batched."
)
@device_option
@plan_options
def explain(
    files: tuple[str, ...],
    physical: bool,
    device: str | None,
    values: dict[str, str],
    schedule: str | None,
    key: Key | None,
) -> None:
    """Print the plan of FILES: operators and types, or with --physical the stages of them all.

    Where they decode on a GPU it is measured, and said, what decodes there.
    """
    _collect_no_garbage()
    from flowlang.plan.explain import explain_physical, explain_plan
    from flowlang.plan.files import compile_files
    from flowlang.plan.physical import lower
    from flowlang.runtime.machine import this_machine

    plans = compile_files(files, values=values, schedule=schedule, opener=opener_of(key))
    if not physical:
        click.echo("\n".join(map(explain_plan, plans)), nl=False)
        return
    stages = lower(plans, this_machine(device))
    click.echo(explain_physical(stages), nl=False)
    if gpus := sorted({gpu for stage in stages.stages for gpu in stage.gpus}):
        from flowlang.runtime import dali
        from flowlang.runtime.gpu import decodings_of

        for gpu in gpus:
            if (how := decodings_of(stages, gpu)) is not None:
                click.echo(f"\ngpu:{gpu}  {dali.describe(how)}")


@main.command()
@click.argument("file", required=False, type=FILE)
@click.option("--format", "form", type=click.Choice(["text", "markdown"]), default="text")
@plan_options
def doc(
    file: str | None, form: str, values: dict[str, str], schedule: str | None, key: Key | None
) -> None:
    """Print what FILE declares, or the operators and settings of the language."""
    from flowlang import doc as pages
    from flowlang.plan.files import inspect_file

    is_text = form == "text"
    if file is None:
        if values or schedule:
            raise click.UsageError("--set and --schedule are about a FILE, and there is none")
        tables = [pages.operators_text, pages.settings_text]
        if not is_text:
            tables = [pages.operators_markdown, pages.settings_markdown]
        click.echo("\n".join(table() for table in tables), nl=False)
        return
    program, plan = inspect_file(file, values=values, schedule=schedule, opener=opener_of(key))
    page = pages.file_text if is_text else pages.file_markdown
    click.echo(page(program, plan), nl=False)


@main.command()
@click.option(
    "--stdio", is_flag=True, hidden=True, help="What editors ask for; it is all there is."
)
def lsp(stdio: bool) -> None:
    """Answer an editor over stdin and stdout (Language Server Protocol)."""
    try:
        from flowlang.editor.server import serve as serve_editor
    except ModuleNotFoundError as error:
        if error.name not in ("pygls", "lsprotocol"):
            raise
        raise FlowError("an editor's server needs pygls: pip install 'flowlang[lsp]'") from None
    serve_editor()


@main.command("explain-error")
@click.argument("slug", required=False)
def explain_error(slug: str | None) -> None:
    """Print the page of an error's SLUG, or the list of them."""
    from importlib import resources

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
        raise click.BadParameter(f"there is no error `{slug}`: {hint}", param_hint="SLUG")
    text = pages[slug].read_text("utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        click.echo(text, nl=False)


@main.command()
@click.argument("file", type=FILE)
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object a line: path, result or error."
)
@click.option("--flow", "name", help="Which flow, where the file serves several.")
@click.option(
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=named_values,
    help="A parameter of the flow, as a request would bring it. One of bytes may be `@FILE`.",
)
@device_option
@engines_option
@plan_options
def run(
    file: str,
    pictures: tuple[Path, ...],
    as_json: bool,
    name: str | None,
    parameters: dict[str, str],
    device: str | None,
    engines: Path | None,
    values: dict[str, str],
    schedule: str | None,
    key: Key | None,
) -> None:
    """Run the flow of FILE over PICTURES (files, or folders of them)."""
    from flowlang.app import load
    from flowlang.rows import answers_of, print_json, print_text, with_progress

    unread: dict[Path, OSError] = {}
    paths = [path for given in pictures for path in _files(given, unread)]
    if not paths:
        raise click.BadParameter("there is no file in the folders given", param_hint="PICTURES")
    secret = key.secret if key else None
    with load(
        file, device=device, values=values, schedule=schedule, engines=engines, key=secret
    ) as app:
        flow = _flow(app, name)
        given = _parameters(flow, parameters)
        try:
            answers = with_progress(answers_of(flow, paths, given, unread), len(paths))
            failures = (print_json if as_json else print_text)(paths, answers)
        except KeyboardInterrupt:
            app.close(0.0)
            raise
    sys.exit(FAILED if failures else 0)


def _files(path: Path, unread: dict[Path, OSError]) -> list[Path]:
    """A path itself, or the files below a folder but for hidden ones.

    Folders that cannot be read are among them, with the reason in `unread`.
    """
    if not path.is_dir():
        return [path]
    found: list[Path] = []

    def note(error: OSError) -> None:
        folder = Path(os.fsdecode(error.filename))
        unread[folder] = error
        found.append(folder)

    for folder, folders, names in os.walk(path, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file() or not file.exists()]
    return sorted(found)


def _flow(app: App, name: str | None) -> Flow:
    """The flow to run. Raises UsageError where there is none that takes files."""
    from flowlang.plan.types import Image
    from flowlang.serve.answer import takes_bytes

    try:
        flow = app.flow(name)
    except FlowError as error:
        raise click.UsageError(str(error)) from None
    if not takes_bytes(flow.input):
        more = ": begin it with `decode`" if isinstance(flow.input, Image) else ""
        message = f"flow `{flow.name}` takes {flow.input}, not the bytes of a file{more}"
        raise click.UsageError(message)
    return flow


def _parameters(flow: Flow, texts: dict[str, str]) -> dict[str, Any]:
    """The parameters of a flow out of their texts; of bytes, out of files. Raises UsageError."""
    from flowlang.plan.types import BYTES, without_null
    from flowlang.serve.form import ParameterReader

    of_bytes = {p.name for p in flow.parameters if without_null(p.type) == BYTES}
    files = {n: t[1:] for n, t in texts.items() if n in of_bytes and t.startswith("@")}
    try:
        contents = {name: Path(file).read_bytes() for name, file in files.items()}
        rest = {name: text for name, text in texts.items() if name not in files}
        return ParameterReader(flow.parameters).of_texts(rest) | contents
    except BadRequest as error:
        raise click.UsageError(error.message) from None
    except OSError as error:
        message = f"`{error.filename}`: {error.strerror}"
        raise click.BadParameter(message, param_hint="--param") from None


@main.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write. The default is MODEL with `.encrypted` behind its name.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
@key_option("What seals the model, and opens it again.")
def seal(model: Path, output: Path | None, force: bool, key: Key | None) -> None:
    """Encrypt MODEL, an ONNX file, for a flow that names it as `*.encrypted`."""
    from flowlang.plan.onnx import NotAModel, read_model
    from flowlang.runtime import seal as sealing
    from flowlang.runtime.engine_store import write_whole

    output = output or model.with_name(model.name + sealing.SUFFIX)
    if key is None:
        raise click.UsageError(f"there is no key: give --key-file, or set {KEY_VARIABLE}")
    if model.suffix == sealing.SUFFIX:
        raise click.UsageError(f"{shown(model)} is encrypted already")
    if output.suffix != sealing.SUFFIX:
        message = f"flows open only files named *{sealing.SUFFIX}, and not {shown(output)}"
        raise click.BadParameter(message, param_hint="--output")
    if output.exists() and not force:
        raise click.UsageError(f"{shown(output)} is there already: replace it with --force")
    try:
        weights = read_model(model).weights
    except NotAModel as error:
        raise FlowError(f"{shown(model)} is no ONNX model: {error}") from None
    if weights:
        raise FlowError(
            f"{shown(model)} has weights in files of their own, as {shown(weights[0].name)}, which "
            "would stay as they are: save it as one file first"
        )
    plain = model.read_bytes()
    pieces = sealing.seal_chunks(plain, key, header=sealing.MODEL_HEADER)
    write_whole(output, pieces, mode=0o600)
    click.echo(f"sealed {shown(model)} as {shown(output)}")


@main.command()
@click.argument("file", type=FILE)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to put the engines in, for --engines; the default is the user's cache.",
)
@device_option
@plan_options
def build(
    file: str,
    output: Path | None,
    device: str | None,
    values: dict[str, str],
    schedule: str | None,
    key: Key | None,
) -> None:
    """Build the TensorRT engines of FILE ahead of time, so that serving it starts at once."""
    from flowlang.plan.files import compile_file
    from flowlang.plan.physical import lower
    from flowlang.runtime.build import build_engines
    from flowlang.runtime.engine_store import EngineStore, default_directory
    from flowlang.runtime.machine import this_machine

    machine = this_machine(device or "gpu")
    plan = compile_file(file, values=values, schedule=schedule, opener=opener_of(key))
    start_s = time.monotonic()

    def progress(model: str, step: str) -> None:
        click.echo(f"{time.monotonic() - start_s:7.1f} s  {model}: {step}", err=True)

    store = EngineStore(output or default_directory(), key)
    for built in build_engines(lower([plan], machine), store, progress):
        how = f"built in {built.took_s:.1f} s" if built.took_s else "was there already"
        click.echo(f"{built.model}: {how} for {built.gpu}, {shown(built.path)}")


main.add_command(serve)
