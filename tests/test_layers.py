"""Who may import whom: layers one way, no circles, and heavy packages each in their own place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.standins import furnish

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "flowlang").rglob("*.py"))
# The faces come last: `serve` is built on the app, and the command line on both.
LAYERS = (
    *("diagnostics", "mark", "syntax", "plan", "runtime"),
    *("items", "window", "app", "serve", "rows", "doc", "highlight", "editor", "cli", "__main__"),
)
HOMES = {
    "lark": {"syntax.parse", "syntax.read", "syntax.complaint"},
    "onnx": {"runtime.rework"},  # plan.onnx loads its messages alone, without the package
    "google": {"plan.onnx", "serve.proto", "serve.grpc"},
    "grpc": {"serve.grpc"},
    "thriftpy2": {"serve.thrift"},
    "cv2": {"runtime.vision"},
    "onnxruntime": {"runtime.ort", "runtime.rework"},
    "nvidia": {"runtime.dali"},
    "tensorrt": {"runtime.trt"},
    "cuda": {"runtime.cuda"},
    "cryptography": {"runtime.seal"},
    "prometheus_client": {"serve.metrics"},
    "python_multipart": {"serve.form"},
    "uvicorn": {"serve.http"},
    "opentelemetry": {"serve.trace"},
    "click": {"cli", "cli.log", "cli.options", "cli.serve", "rows"},
    "pygls": {"editor.server"},
    "lsprotocol": {"editor.server"},
    "pygments": {"highlight"},
    "rich": {"cli", "rows"},
}
MAY_BE_AT_THE_TOP = {
    "click",
    "uvicorn",
    "pygls",
    "lsprotocol",
    "pygments",
    "opentelemetry",
}  # only where serving or on the command line
NOT_FOR_CHECKING = (
    "numpy", "cv2", "onnx", "onnxruntime", "uvicorn", "tensorrt", "nvidia",
    "cryptography", "rich", "pygls", "pygments", "opentelemetry",
    "flowlang.app", "flowlang.runtime.host", "flowlang.serve",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """A module, what it imports, and when: `top`, `lazy` (in a function) or `typing` only."""

    module: str
    target: str
    when: str


def name_of(file: Path) -> str:
    """A module's name below the package: `plan.check`; `plan` for its `__init__`."""
    parts = file.relative_to(ROOT / "flowlang").with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(node: ast.AST, when: str = "top") -> Iterator[tuple[ast.AST, str]]:
    """Every import statement under a node, with when it is run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, when
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, "lazy")
        else:
            yield from statements(child, "typing" if is_typing(child) else when)


def targets(node: ast.AST) -> Iterator[str]:
    """The modules an import statement names; ours without the package's name in front."""
    if isinstance(node, ast.Import):
        yield from (alias.name.removeprefix("flowlang.") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        module = node.module or ""
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            is_module = (ROOT / Path(*inner.split("."))).with_suffix(".py").is_file()
            yield (inner if is_module else module).removeprefix("flowlang.")


def imports() -> Iterator[Import]:
    for file in FILES:
        for node, when in statements(ast.parse(file.read_text("utf-8"))):
            for target in targets(node):
                yield Import(name_of(file), target, when)


IMPORTS = list(imports())
MODULES = {name_of(file) for file in FILES}


def layer(module: str) -> int:
    return LAYERS.index(module.partition(".")[0])


def test_every_module_has_its_layer() -> None:
    """A new module is put into a layer before it can be imported by anyone."""
    assert {m.partition(".")[0] for m in MODULES if m} <= set(LAYERS)


def test_layers_import_downwards_only() -> None:
    """No module knows one of a higher layer, not even inside a function or for its types."""
    ours = [i for i in IMPORTS if i.target in MODULES and i.module]
    assert len(ours) > 100
    assert not [i for i in ours if layer(i.module) < layer(i.target)]


def test_no_module_is_needed_to_load_itself() -> None:
    """The imports at the top of the modules have no circles."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for found in IMPORTS:
        if found.when == "top" and found.target in MODULES:
            sorter.add(found.module, found.target)
    sorter.prepare()


@pytest.mark.parametrize("package", HOMES)
def test_a_heavy_package_is_imported_in_its_own_place(package: str) -> None:
    """Each of them has one room, so that replacing or missing it concerns one file."""
    found = [i for i in IMPORTS if i.target.partition(".")[0] == package and i.when != "typing"]
    assert {i.module for i in found} <= HOMES[package]


def test_heavy_packages_are_imported_when_used() -> None:
    """None is loaded by importing a module, but for the web server and the command line."""
    heavy = {*HOMES, "numpy", "torch"} - MAY_BE_AT_THE_TOP
    found = [i for i in IMPORTS if i.when == "top" and i.target.partition(".")[0] in heavy]
    assert not found


PROGRAM = """
import sys
from flowlang.cli import main
try:
    main(sys.argv[1:])
except SystemExit as status:
    assert not status.code, status.code
print("LOADED", *sorted(sys.modules))
"""


def loaded(code: str, *arguments: str, folder: Path) -> set[str]:
    """Names of the modules that a program has loaded when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.rpartition("LOADED ")[2].split())


def test_importing_the_package_loads_nothing_else(tmp_path: Path) -> None:
    """`import flowlang` costs no module of ours and none of anyone else's."""
    found = loaded('import sys, flowlang; print("LOADED", *sys.modules)', folder=tmp_path)
    assert "flowlang" in found
    assert not [m for m in found if m.startswith("flowlang.")]
    assert not found & {*NOT_FOR_CHECKING, "lark", "click"}


@pytest.mark.parametrize(
    "command", [["check"], ["explain"], ["explain", "--physical", "--device", "cpu"], ["fmt"]]
)
def test_checking_loads_nothing_that_runs(command: list[str], tmp_path: Path) -> None:
    """check, explain and fmt need no numbers, no pictures, no server and no model runtime."""
    (furnish(tmp_path) / "app.flow").write_text('decode -> resize(224) -> rgb -> trt("model.onnx")')
    found = loaded(PROGRAM, *command, "app.flow", folder=tmp_path)
    assert "flowlang.syntax.parse" in found
    assert not found & set(NOT_FOR_CHECKING)
