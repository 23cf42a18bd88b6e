"""The wheel: built, looked into, installed alone and used outside of the checkout."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from flowlang import __version__
from tests.standins import furnish

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowlang"
ONE_LINER = 'decode -> resize(224) -> rgb -> trt("resnet50.onnx", fp16, batch=1..4) x4\n'
PATIENCE_S = 120


def finished(
    *command: str | Path, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A run of a program that knows nothing of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command,
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def build(kind: str, source: Path, target: Path) -> Path:
    """The wheel or sdist of a source tree, built offline."""
    command = (sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target)
    done = finished(*command, folder=source)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class Installed:
    """A virtual environment with the wheel in it, and a folder to work in."""

    def __init__(self, wheel: Path, root: Path) -> None:
        self.environment = root / "venv"
        self.folder = furnish(root)
        self._cache = root / "cache"
        venv = finished(sys.executable, "-m", "venv", "--without-pip", "venv", folder=root)
        assert venv.returncode == 0, venv.stderr
        pip = (sys.executable, "-m", "pip", "--python", self.environment / "bin/python")
        options = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
        done = finished(*pip, *options, wheel, folder=root)
        assert done.returncode == 0, done.stderr
        # The dependencies are those of the environment that runs this test. A path in a .pth file
        # does not bring the .pth files of that path, so an editable flowlang there stays unseen.
        paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
        (site,) = self.environment.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(sorted(paths)))

    def run(self, program: str, *arguments: str) -> str:
        """What a program of the environment prints. Fails unless it ends with status 0."""
        path = self.environment / "bin" / program
        done = finished(path, *arguments, folder=self.folder, XDG_CACHE_HOME=str(self._cache))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_the_package_and_nothing_else(names: set[str]) -> None:
    """Every module, page and text of the package is in it; tests, examples and caches are not."""
    files = (path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file())
    package = {str(path) for path in files if "__pycache__" not in path.parts}
    metadata = f"flowlang-{__version__}.dist-info/"
    inside = {name for name in names if not name.startswith(metadata)}
    grammars = {"flowlang/grammar/flow.lark", "flowlang/grammar/flow.tmLanguage.json"}
    assert inside == package | grammars
    assert {"flowlang/py.typed", "flowlang/serve/page.html"} <= inside
    assert f"{metadata}licenses/LICENSE" in names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Name, version, Python and description are right, and the extras are those people ask for."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"flowlang-{__version__}.dist-info/METADATA").decode()
    told = email.message_from_string(text)
    assert (told["Name"], told["Version"], told["Requires-Python"]) == (
        "flowlang",
        __version__,
        ">=3.10",
    )
    assert {"gpu", "encrypt"} <= set(told.get_all("Provides-Extra", []))
    assert told.get_payload() == (ROOT / "README.md").read_text("utf-8")
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_sdist_builds_the_same_wheel(names: set[str], tmp_path: Path) -> None:
    """A wheel built from the unpacked sdist holds the same files."""
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    unpacked = finished("tar", "-xf", sdist, folder=tmp_path)
    assert unpacked.returncode == 0, unpacked.stderr
    again = build("wheel", tmp_path / f"flowlang-{__version__}", tmp_path / "wheel")
    with zipfile.ZipFile(again) as archive:
        assert set(archive.namelist()) == names


def test_the_installed_package_is_the_one_that_runs(installed: Installed) -> None:
    """Outside of the checkout, flowlang comes from the wheel, with its version and its page."""
    source = (
        "import flowlang; from importlib import resources; "
        "page = resources.files('flowlang.serve').joinpath('page.html').read_text('utf-8'); "
        "print(flowlang.__file__, flowlang.__version__, page.lstrip()[:15], sep='\\n')"
    )
    file, version, page = installed.run("python", "-c", source).splitlines()
    assert Path(file).is_relative_to(installed.environment)
    assert (version, page.lower()) == (__version__, "<!doctype html>")


def test_the_installed_program_checks_the_one_liner(installed: Installed) -> None:
    """The grammar is in the wheel: the one-liner checks, is laid out and explained."""
    (installed.folder / "app.flow").write_text(ONE_LINER)
    assert installed.run("flowlang", "check", "app.flow").endswith("app.flow: ok\n")
    assert installed.run("flowlang", "fmt", "--check", "app.flow") == ""
    assert "resnet50.onnx" in installed.run("flowlang", "explain", "app.flow")


def test_the_installed_program_has_its_pages(installed: Installed) -> None:
    """The explanations are in the wheel: each page of the checkout is listed, and one printed."""
    listed = installed.run("flowlang", "explain-error").splitlines()
    pages = sorted((PACKAGE / "explanations").glob("*.md"))
    assert [line.partition(":")[0] for line in listed] == [page.stem for page in pages]
    page = installed.run("flowlang", "explain-error", "missing-arrow")
    assert page == (PACKAGE / "explanations/missing-arrow.md").read_text("utf-8")
