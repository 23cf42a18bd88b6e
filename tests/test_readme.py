"""The README, run: its shell sessions, its programs and its Python, against the real thing.

In a session `$ ` precedes a command, and what stands below it is what it prints; `...` stands for
anything within a line, or on a line of its own for any lines. The comment behind a `print` in
Python is what it prints, with ` / ` between the lines of a loop.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from examples import models
from flowlang import check
from flowlang.cli import main
from tests.serve.server import Server, serving
from tests.standins import furnish

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ADDRESS = "http://127.0.0.1:8000"
SECONDS = 60  # a command that takes longer has failed


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(language: str = "") -> list[Block]:
    """The code blocks of the README, of one language or of all."""
    text = README.read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    every = [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in found]
    return [block for block in every if language in ("", block.language)]


def steps(session: str) -> Iterator[tuple[str, str]]:
    """The commands of a session, each with what it is to print."""
    for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def assert_printed(printed: str, expected: str, where: str) -> None:
    """Fail unless a text is the expected one, whose `...` stand for anything."""
    lines = [line.rstrip() for line in expected.strip().splitlines()]
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in lines
    )
    text = "".join(f"{line.rstrip()}\n" for line in printed.strip().splitlines())
    assert re.fullmatch(pattern, text), f"{where} printed:\n{text}\nThe README says:\n{expected}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as `make serve` leaves it, as far as the README uses it."""
    if find_spec("rapidocr") is None:
        pytest.skip("needs rapidocr")
    copy = tmp_path_factory.mktemp("readme")
    for name in ("README.md", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "examples", copy / "examples", ignore=shutil.ignore_patterns("models", "pictures")
    )
    models.classifier(copy / "examples/models")
    models.text(copy / "examples/models")
    models.pictures(copy / "examples/pictures")
    return copy


class Shell:
    """Runs the commands of the sessions, in order, in one folder."""

    def __init__(self, folder: Path, closing: ExitStack) -> None:
        programs = folder / ".venv/bin"
        programs.mkdir(parents=True)
        (programs / "flowlang").write_text(f'#!/bin/sh\nexec {sys.executable} -m flowlang "$@"\n')
        (programs / "flowlang").chmod(0o755)
        (programs / ".curlrc").write_text("silent\n")  # as on a terminal: no progress is shown
        self._folder = folder
        self._closing = closing
        self._server: Server | None = None
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CURL_HOME": str(programs),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, command: str) -> str:
        """What a command prints. `make` is asked what it would do, and a server does it."""
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            offered = metadata("flowlang").get_all("Provides-Extra") or []
            assert set(re.findall(r"\[(.*)\]", words[2])) <= set(offered), command
            return ""
        if words[0] == "make":
            planned = self._shell(f"make --dry-run {words[1]}")
            serve = re.search(r"^\S+/flowlang serve (\S+)", planned, re.MULTILINE)
            if serve is not None:
                self._server = self._serve(serve[1])
            return ""
        if self._server is not None:
            command = command.replace(ADDRESS, self._server.url)
        return self._shell(command)

    def _shell(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode in (0, 1), f"{command}\n{done.stdout}"
        return done.stdout

    def _serve(self, flow: str) -> Server:
        arguments = [str(self._folder / flow), "--device", "cpu"]
        return self._closing.enter_context(serving(self._folder, *arguments)).wait_ready()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_sessions_print_what_they_show(folder: Path) -> None:
    """Every command of every session prints what stands below it; a server answers `curl`."""
    with ExitStack() as closing:
        shell = Shell(folder, closing)
        for block in blocks("console"):
            for command, expected in steps(block.text):
                where = f"README.md:{block.line}: {command}"
                assert_printed(shell.run(command), expected, where)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"line-{block.line}")
def test_the_python_prints_what_its_comments_say(block: Block, folder: Path) -> None:
    """Python blocks run as they stand, and each `print` prints the comment behind it."""
    (folder / "block.py").write_text(block.text)
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    comments = re.findall(r"print\(.*\)  # (.*)$", block.text, re.MULTILINE)
    expected = "\n".join(line for comment in comments for line in comment.split(" / "))
    assert_printed(done.stdout, expected, f"README.md:{block.line}")


@pytest.mark.parametrize("block", blocks("flow"), ids=lambda block: f"line-{block.line}")
def test_the_programs_check(block: Block, tmp_path: Path) -> None:
    """Flow blocks are programs without an error, alone and under each schedule they name."""
    (furnish(tmp_path) / "app.flow").write_text(block.text)
    schedules: Sequence[str | None] = [None, *re.findall(r"^schedule (\w+)", block.text, re.M)]
    for schedule in schedules:
        found = check(tmp_path / "app.flow", schedule=schedule)
        assert [d.slug for d in found if d.severity == "error"] == []


def test_every_block_is_run() -> None:
    """No block is of a kind that the tests above pass over."""
    assert {block.language for block in blocks()} == {"console", "python", "flow"}


def test_the_table_holds_every_command() -> None:
    """The table of commands has a row for each command, and names options that there are."""
    rows = dict(re.findall(r"^\| `flowlang ([a-z-]+)(.*)$", README.read_text("utf-8"), re.M))
    assert isinstance(main, click.Group)
    assert set(rows) == set(main.commands)
    for name, row in rows.items():
        options = {o for parameter in main.commands[name].params for o in parameter.opts}
        assert set(re.findall(r"--[a-z]+", row)) <= options


def test_the_links_lead_somewhere() -> None:
    """Files that the README links to are in the repository."""
    links = re.findall(r"\]\(([^)]+)\)", README.read_text("utf-8"))
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []
