"""The pages of the errors: one for every slug, and their examples do what they say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowlang.diagnostics import CompileError, Diagnostic, render
from flowlang.syntax.parse import decode_source
from tests.cases import check
from tests.standins import furnish

PACKAGE = Path(__file__).parents[2] / "flowlang"
PAGES = {p.stem: p.read_text("utf-8") for p in sorted((PACKAGE / "explanations").glob("*.md"))}
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")
TELLERS = {"Diagnostic", "Misfit", "refuse", "error", "_error", "_refuse", "_mismatch"}
NO_TEXT = {"not-text": b"\x89PNG\r\n\x1a\n"}  # what no page can hold
EACH_PAGE = pytest.mark.parametrize("slug", PAGES)


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples stand in a folder with the files they name."""
    monkeypatch.chdir(FURNISHED.setdefault("at", furnish(tmp_path_factory.mktemp("app"))))


FURNISHED: dict[str, Path] = {}


def strings(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def told_by(node: ast.AST) -> Iterator[str]:
    """The strings a piece of code may use as a slug."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        if name in TELLERS and node.args:
            yield from strings(node.args[0])
        for keyword in node.keywords:
            if keyword.arg == "slug":
                yield from strings(keyword.value)
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        for target in node.targets:
            for name, value in zip(ast.iter_child_nodes(target), node.value.elts, strict=False):
                if isinstance(name, ast.Name) and name.id == "slug":
                    yield from strings(value)


def slugs_in_code() -> set[str]:
    files = [f for layer in ("syntax", "plan", "runtime") for f in (PACKAGE / layer).glob("*.py")]
    trees = [ast.parse(f.read_text("utf-8")) for f in files]
    found = {slug for tree in trees for node in ast.walk(tree) for slug in told_by(node)}
    return {slug for slug in found if SLUG.fullmatch(slug)}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def example(text: str) -> tuple[str, str]:
    """The program of a part of a page, and the choices its command line makes."""
    commands = blocks(text, "console")
    return blocks(text, "flow")[0], commands[0].partition("app.flow")[2] if commands else ""


def wrong(slug: str) -> list[Diagnostic]:
    """What is said of a page's wrong example."""
    if slug in NO_TEXT:
        try:
            decode_source(NO_TEXT[slug], "app.flow")
        except CompileError as error:
            return error.diagnostics
    return check(*example(PAGES[slug].partition("\nMended:\n")[0]))


def test_every_slug_has_its_page_and_every_page_its_slug() -> None:
    """`flowlang explain-error` knows each kind of diagnostic, and no others."""
    assert slugs_in_code() == set(PAGES)


@EACH_PAGE
def test_a_page_is_headed_by_its_slug_and_a_summary(slug: str) -> None:
    """The first line is what the list of all pages shows."""
    headline = PAGES[slug].splitlines()[0]
    assert re.fullmatch(rf"# {slug}: [^A-Z].{{10,90}}[^.]", headline)


@EACH_PAGE
def test_a_page_says_why(slug: str) -> None:
    """Each page ends with the reason of its rule, in at most three sentences."""
    last = PAGES[slug].rstrip().splitlines()[-1]
    assert last.startswith("Why: ")
    assert 1 <= last.count(". ") + last.count("? ") + 1 <= 3


@EACH_PAGE
def test_the_wrong_example_gives_the_slug_and_the_words_on_the_page(slug: str) -> None:
    """What a page quotes is what checking its example really says."""
    told = [d for d in wrong(slug) if d.slug == slug]
    quoted = blocks(PAGES[slug], "text")[0].strip()
    assert quoted in {render(d).partition("\n")[0] for d in told}


@EACH_PAGE
def test_the_mended_example_checks(slug: str) -> None:
    """The program under `Mended:` has no errors, and the slug is gone."""
    found = check(*example(PAGES[slug].partition("\nMended:\n")[2]))
    assert not [render(d) for d in found if d.severity == "error" or d.slug == slug]
