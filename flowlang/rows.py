"""Files through a flow, and what became of each: rows for people, or lines of JSON.

Layer 4, between the Python face and the command line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowlang.diagnostics import RequestError, shown

if TYPE_CHECKING:
    from flowlang.app import Flow


def answers_of(
    flow: Flow,
    paths: list[Path],
    parameters: Mapping[str, Any] | None = None,
    known: Mapping[Path, OSError] | None = None,
) -> Iterator[Any]:
    """What becomes of each file: a result, a RequestError or an OSError.

    `known` has the reasons why some cannot be read.
    """
    unread: dict[int, OSError] = {}

    def contents() -> Iterator[bytes]:
        for index, path in enumerate(paths):
            try:
                if known and path in known:
                    raise known[path]
                content = path.read_bytes()
            except OSError as error:
                unread[index], content = error, b""
            yield content

    for index, answer in enumerate(flow.map(contents(), errors="return", **(parameters or {}))):
        answer = unread.get(index, answer)
        if isinstance(answer, Exception) and not isinstance(answer, (RequestError, OSError)):
            raise answer
        yield answer


def print_json(paths: list[Path], answers: Iterator[Any]) -> int:
    """A line of JSON for each answer. Returns how many are errors."""
    from flowlang.items import plain
    from flowlang.serve.answer import to_json

    failures = 0
    for path, answer in zip(paths, answers, strict=True):
        line: dict[str, Any] = {"path": shown(path)}
        if isinstance(answer, Exception):
            failures += 1
            line["error"] = _told(answer)
        else:
            line["result"] = plain(answer)
        click.echo(to_json(line))
    return failures


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, RequestError):
        names = ("code", "message", "stage", "place")
        return {name: getattr(error, name) for name in names}
    message = getattr(error, "strerror", None) or str(error)
    return {"code": "unreadable", "message": message, "stage": None, "place": None}


def print_text(paths: list[Path], answers: Iterator[Any]) -> int:
    """A row for each answer, and at the end a count on stderr. Returns how many are errors."""
    width = max(len(shown(path)) for path in paths)
    failures = 0
    start_s = time.perf_counter()
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, Exception):
            failures += 1
            text = click.style(getattr(answer, "strerror", None) or str(answer), fg="red")
        else:
            text = _summary(answer)
        first, *rest = text.splitlines() or [""]
        rows = [f"{shown(path):<{width}}  {first}", *(" " * (width + 2) + line for line in rest)]
        click.echo("\n".join(row.rstrip() for row in rows))
    taken_s = time.perf_counter() - start_s
    rate = len(paths) / max(taken_s, 1e-9)
    click.echo(
        f"{len(paths) - failures} done, {failures} failed, {taken_s:.2f} s ({rate:.1f}/s)", err=True
    )
    return failures


def _summary(answer: Any) -> str:
    """An answer as a person reads it, in a few lines."""
    if isinstance(answer, dict) and "score" in answer and {"label", "text"} & set(answer):
        return _finding(answer)
    if isinstance(answer, dict):
        return "\n".join(f"{name}: {_summary(part)}" for name, part in answer.items())
    if (numbers := _numbers(answer)) is not None:
        return numbers
    if isinstance(answer, list):
        return "\n".join(_summary(part) for part in answer)
    if hasattr(answer, "shape"):
        first = [f"{value:.4g}" for value in answer.reshape(-1)[:5]]
        first[4:] = ["..."] if len(first) > 4 else []
        return f"{answer.dtype} {'x'.join(map(str, answer.shape))} [{', '.join(first)}]"
    return str(answer)


def _numbers(answer: Any) -> str | None:
    """A list of numbers, or of such lists, as a quad is, in one line. None where it is neither."""
    if not isinstance(answer, list) or not answer:
        return None
    if all(type(part) in (int, float) for part in answer):
        return ", ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in answer)
    found = [_numbers(part) for part in answer]
    return "  ".join(part for part in found if part is not None) if all(found) else None


def _finding(answer: dict[str, Any]) -> str:
    """A label, detection or reading: what it is, how sure that is, and all that comes with it."""
    found = answer.get("text", answer.get("label"))
    text = f"{found} ({answer['score']:.3f})"
    if "box" in answer:
        text += f" at {', '.join(f'{side:.0f}' for side in answer['box'])}"
    known = ("index", "label", "text", "score", "box", "quad")
    more = [f"{name}: {_summary(part)}" for name, part in answer.items() if name not in known]
    return "; ".join([text, *more])


def with_progress(answers: Iterator[Any], total: int) -> Iterator[Any]:
    """The same answers, with a bar on a terminal's stderr while they go elsewhere."""
    if total < 20 or not sys.stderr.isatty() or sys.stdout.isatty():
        yield from answers
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        yield from bar.track(answers, total=total)
