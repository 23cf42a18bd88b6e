"""What `flowlang.runtime.trt` asks of TensorRT, looked up in the Python bindings of real releases.

The bindings are small and need no GPU to be imported, only libraries that define what they link to;
empty ones do. So names and signatures are checked here, and nothing of TensorRT itself runs.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from flowlang.runtime import trt

ROOT = Path(trt.__file__).parents[2]
RELEASES = (
    "tensorrt_cu12_bindings==10.0.1",
    "tensorrt_cu12_bindings>=10.16,<11",
    "tensorrt_cu13_bindings>=11,<12",
)

# What the bindings link to, by library.
LIBRARIES = {
    "nvinfer": (
        "createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL",
        "createInferRefitter_INTERNAL", "getPluginRegistry", "getBuilderPluginRegistry",
        "getInferLibVersion",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}  # fmt: skip

# What the expressions of trt.py are: by its class, or "" outside of them, and the text.
RECEIVERS = {
    ("", "trt"): "",
    ("", "creation"): "NetworkDefinitionCreationFlag",
    ("", "preview"): "PreviewFeature",
    ("", "sources"): "TacticSource",
    ("", "builder"): "Builder",
    ("", "network"): "INetworkDefinition",
    ("", "config"): "IBuilderConfig",
    ("", "parser"): "OnnxParser",
    ("", "parser.get_error(i)"): "ParserError",
    ("", "profile"): "IOptimizationProfile",
    ("", "tensor"): "ITensor",
    ("Engine", "trt"): "",
    ("Engine", "self._runtime"): "Runtime",
    ("Engine", "self.engine"): "ICudaEngine",
    ("_Execution", "trt"): "",
    ("_Execution", "engine.engine"): "ICudaEngine",
    ("_Execution", "self._context"): "IExecutionContext",
}

Name: TypeAlias = tuple[str, str]
"""The dotted path of a class in the module, or "" for the module itself, and an attribute."""


@dataclass(frozen=True, slots=True)
class Use:
    """An attribute that trt.py asks for; `arguments` of the call, or None where it is none.

    `guards` are the attributes that are tested for before: without them it is not asked for. Nor
    is it where there are those of `unless`.
    """

    name: Name
    line: int
    arguments: int | None
    guards: tuple[Name, ...]
    unless: tuple[Name, ...]


class Reader(ast.NodeVisitor):
    """Finds the uses of TensorRT in trt.py. What only weakly typed networks need is left out."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self._class = ""
        self._guards: tuple[Name, ...] = ()
        self._unless: tuple[Name, ...] = ()
        self._calls: dict[ast.expr, ast.Call] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = before

    def visit_If(self, node: ast.If) -> None:
        self._visit_guarded(node.test, node.body)
        before = self._unless
        if ast.unparse(node.test).startswith("hasattr("):
            self._unless += tuple(self._guards_of(node.test))
        for other in node.orelse:
            self.visit(other)
        self._unless = before

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._visit_guarded(node.test, [node.body])
        self.visit(node.orelse)

    def _visit_guarded(self, test: ast.expr, body: list[ast.stmt] | list[ast.expr]) -> None:
        self.visit(test)
        if ast.unparse(test) == "not is_strong":  # TensorRT 8, which has no such bindings to load
            return
        before = self._guards
        self._guards += tuple(self._guards_of(test))
        for part in body:
            self.visit(part)
        self._guards = before

    def _guards_of(self, test: ast.expr) -> Iterator[Name]:
        for node in ast.walk(test):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
                owner = self._owner(node.args[0])
                if owner is not None and isinstance(node.args[1], ast.Constant):
                    yield owner, str(node.args[1].value)

    def visit_Call(self, node: ast.Call) -> None:
        self._calls[node.func] = node
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._owner(node.value)
        if owner is not None:
            call = self._calls.get(node)
            is_counted = call and not any(isinstance(a, ast.Starred) for a in call.args)
            count = len(call.args) + len(call.keywords) if call and is_counted else None
            if count is not None and node.attr == "__init__":
                count -= 1  # called of the class, so `self` is among them
            names = [(owner, node.attr)]
            if call and not owner and node.attr[0].isupper():
                names.append((node.attr, "__init__"))
            for name in names:
                self.uses.append(Use(name, node.lineno, count, self._guards, self._unless))
        self.generic_visit(node)

    def _owner(self, node: ast.expr) -> str | None:
        text = ast.unparse(node)
        if text.startswith("trt."):
            return text.removeprefix("trt.")
        return RECEIVERS.get((self._class, text), RECEIVERS.get(("", text)))


def uses() -> list[Use]:
    reader = Reader()
    reader.visit(ast.parse(Path(trt.__file__).read_text("utf-8")))
    return reader.uses


def path_of(name: Name) -> str:
    return ".".join(filter(None, name))


# Run with the bindings: says what each name is, and lets the classes made from them work.
LOOK = """
import json, logging, sys
import tensorrt_bindings as tensorrt
sys.modules["tensorrt"] = tensorrt
from flowlang.runtime import cuda, trt

def find(path):
    value = tensorrt
    for part in path.split("."):
        value = getattr(value, part, None)
    return None if value is None else str(value.__doc__)

names = {path: find(path) for path in json.load(sys.stdin)}

cuda.why_no_gpu = lambda: None  # nothing below reaches for one
said, steps = [], []
class Listener(logging.Handler):
    def emit(self, record):
        said.append([record.levelname, record.getMessage()])
logging.getLogger("flowlang.trt").addHandler(Listener())
logging.getLogger("flowlang.trt").setLevel(logging.DEBUG)
logger = trt._logger()
logger.log(tensorrt.ILogger.ERROR, "an error")
logger.log(tensorrt.ILogger.WARNING, "a warning")
logger.log(tensorrt.ILogger.VERBOSE, "chatter")
if hasattr(tensorrt, "IProgressMonitor"):
    monitor = trt._monitor(tensorrt.IProgressMonitor, steps.append)
    monitor.phase_start("Tactics", None, 7)
    assert monitor.step_complete("Tactics", 1) is True
    monitor.phase_finish("Tactics")
strong = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
print(json.dumps({"version": tensorrt.__version__, "names": names, "said": said,
                  "last": logger.last, "steps": steps, "strong": strong}))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries that define what the bindings of TensorRT 10 and 11 link to."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make stand-in libraries with")
    folder = tmp_path_factory.mktemp("libraries")
    for library, functions in LIBRARIES.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in functions))
        for major in (10, 11):
            name = f"lib{library}.so.{major}"
            command = f"{compiler} -shared -fPIC -Wl,-soname,{name} -o {name} {source.name}"
            subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module", params=RELEASES)
def bindings(
    request: pytest.FixtureRequest, libraries: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What a release's bindings say of the names that trt.py uses."""
    folder = tmp_path_factory.mktemp("bindings")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--retries=0", "--timeout=5"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", folder, request.param],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"{request.param} did not arrive within a minute")
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"{request.param} is not to be had: {(reason or ['?'])[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    paths = {path_of(n) for use in uses() for n in (use.name, *use.guards, *use.unless)}
    looked = subprocess.run(
        [sys.executable, "-c", LOOK],
        input=json.dumps(sorted(paths)), capture_output=True, text=True, check=False, timeout=60,
        env={"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{folder}:{ROOT}"},
    )  # fmt: skip
    assert looked.returncode == 0, looked.stderr[-3000:]
    found: dict[str, object] = json.loads(looked.stdout)
    return found


def documents(bindings: Mapping[str, object]) -> Mapping[str, str | None]:
    """Docstrings by path; None for what there is not."""
    names = bindings["names"]
    assert isinstance(names, dict)
    return names


def is_asked_for(use: Use, known: Mapping[str, str | None]) -> bool:
    """Whether a release with these names comes to what trt.py tests for before."""
    return all(known[path_of(guard)] is not None for guard in use.guards) and all(
        known[path_of(other)] is None for other in use.unless
    )


def test_the_uses_are_found() -> None:
    """The reader sees trt.py as it is: classes, methods with their arguments, and guards."""
    found = {use.name: use for use in uses()}
    assert len(found) > 40
    assert found["IExecutionContext", "execute_async_v3"].arguments == 1
    assert found["IExecutionContext", "set_optimization_profile_async"].arguments == 2
    assert found["IBuilderConfig", "set_memory_pool_limit"].arguments == 2
    asked_first = found["IBuilderConfig", "get_tactic_sources"].guards
    assert ("IBuilderConfig", "set_tactic_sources") in asked_first
    classes = {owner.split(".")[0] for owner, _ in found}
    assert classes >= {
        "", "Builder", "INetworkDefinition", "IBuilderConfig", "OnnxParser", "Runtime",
        "ICudaEngine", "IExecutionContext", "IOptimizationProfile", "ITensor",
    }  # fmt: skip


def test_every_name_is_there(bindings: dict[str, object]) -> None:
    """The release has each class, method and constant, save those that are asked for first."""
    known = documents(bindings)

    missing = {
        f"line {use.line}: {path_of(use.name)}"
        for use in uses()
        if known[path_of(use.name)] is None and is_asked_for(use, known)
    }
    assert not missing, f"TensorRT {bindings['version']} lacks {sorted(missing)}"


def test_every_method_takes_as_many_arguments(bindings: dict[str, object]) -> None:
    """Each call passes as many arguments as one of the method's signatures takes."""
    known = documents(bindings)
    counted = 0
    for use in uses():
        document = known[path_of(use.name)]
        if use.arguments is None or document is None:
            continue
        ranges = [_takes(s) for s in re.findall(rf"{use.name[1]}\((self: .*?)\) ->", document)]
        counted += bool(ranges)
        fits = [low <= use.arguments <= high for low, high in ranges]
        assert any(fits) or not fits, f"line {use.line}: {document}"
    assert counted > 15


def _takes(signature: str) -> tuple[int, int]:
    """The least and the most arguments of a signature's text, behind `self`."""
    depth, parts = 0, [""]
    for letter in signature:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    rest = parts[1:]
    return sum("=" not in part for part in rest), len(rest)


def test_the_logger_and_the_monitor_are_accepted(bindings: dict[str, object]) -> None:
    """Classes derived from the bindings' own do their work when they are called."""
    assert bindings["said"] == [["ERROR", "an error"], ["DEBUG", "a warning"]]
    assert bindings["last"] == "an error"
    assert bindings["steps"] == ["Tactics (7 steps)"]
    assert isinstance(bindings["strong"], int)
    assert bindings["strong"] > 0
