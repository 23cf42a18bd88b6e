"""The command line, as real processes: what they print, and the status they end with."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from examples import models
from flowlang import __version__
from flowlang.cli import main
from flowlang.runtime.seal import MAGIC, MODEL_HEADER, open_sealed, read_key, seal
from tests.pictures import encode, photograph

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60

APP = """\
## Three best classes of one picture.
flow net = trt("net.onnx", batch=1..4) x2
param best: int = 3
export flow classify =
  decode -> resize(64) -> rgb -> normalize(imagenet) -> net -> softmax
  -> top(best, names="names.txt")

schedule prod { net(batch=1..8) x1 }
"""
WRONG = 'decode -> resise(64) -> rgb -> trt("net.onnx", wait=5)\n'
UNTIDY = "decode->rgb   # keep me\n->resize( 64 )\n"
TIDY = "decode -> rgb -> resize(64)\n"
SEVERAL = """\
export flow shrink = decode -> resize(2) -> rgb
export flow vector = trt("same.onnx")
"""


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    models.resnet(folder / "net.onnx", width=8, size=64, classes=10)
    models.labels(folder / "names.txt", 10)
    models.identity(folder / "same.onnx", ("N", 3))
    return folder


@pytest.fixture
def folder(tmp_path: Path, models_folder: Path) -> Path:
    """Flows of every kind, their models, and pictures of which one is broken."""
    for model in models_folder.iterdir():
        (tmp_path / model.name).symlink_to(model)
    for name, text in {"app": APP, "wrong": WRONG, "untidy": UNTIDY, "several": SEVERAL}.items():
        (tmp_path / f"{name}.flow").write_text(text)
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    data = encode(photograph("coffee.png").resize((90, 60)), "JPEG")
    for name in ("a.jpg", "more/c.jpg", ".hidden"):
        (pictures / name).write_bytes(data)
    (pictures / "b.jpg").write_bytes(data[: len(data) // 2])
    return tmp_path


def command(*arguments: str | bytes | Path) -> list[str | bytes | Path]:
    return [sys.executable, "-m", "flowlang", *arguments]


def environment(**more: str) -> dict[str, str]:
    kept = {n: v for n, v in os.environ.items() if n not in ("FLOWLANG_KEY", "FORCE_COLOR")}
    return {**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more}


def flowlang(
    folder: Path, *arguments: str | bytes | Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """A finished run of the program in a folder."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_S,
        check=False,
    )


# check


def test_check_reports_every_error(folder: Path) -> None:
    """Both errors of a file are printed with their places, and the status is 1."""
    done = flowlang(folder, "check", "wrong.flow")
    assert (done.returncode, done.stderr) == (1, "")
    headlines = re.findall(r"^error\[(.*?)\]: .*\n --> (.*)$", done.stdout, re.MULTILINE)
    assert headlines == [
        ("unknown-operator", "wrong.flow:1:11"),
        ("missing-unit", "wrong.flow:1:53"),
    ]
    assert done.stdout.endswith("wrong.flow: 2 errors\n")


def test_check_of_several_files_goes_through_all(folder: Path) -> None:
    """Each file has its line, right or wrong, and one wrong file makes the status 1."""
    done = flowlang(folder, "check", "wrong.flow", "app.flow")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "app.flow: ok"
    assert flowlang(folder, "check", "app.flow", "several.flow").returncode == 0


def test_check_as_json_is_for_tools(folder: Path) -> None:
    """With --format json stdout is one array of diagnostics, empty for a right file."""
    done = flowlang(folder, "check", "--format", "json", "wrong.flow")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [(d["slug"], d["line"], d["column"], d["end_column"]) for d in found] == [
        ("unknown-operator", 1, 11, 17),
        ("missing-unit", 1, 53, 54),
    ]
    assert found[1]["help"] == "wait=5ms"
    assert json.loads(flowlang(folder, "check", "--format", "json", "app.flow").stdout) == []


def test_check_takes_what_is_chosen_outside_the_file(folder: Path) -> None:
    """--set and --schedule are checked like the file: a wrong name or value is an error."""
    good = flowlang(folder, "check", "app.flow", "--set", "best=2", "--schedule", "prod")
    assert good.returncode == 0
    for wrong in (("--set", "bets=2"), ("--set", "best=many"), ("--schedule", "prd")):
        done = flowlang(folder, "check", "app.flow", *wrong)
        assert done.returncode == 1, done.stdout
        assert f" --> {wrong[0]}" in done.stdout


def test_check_of_bytes_that_are_no_text(folder: Path) -> None:
    """A file that is not UTF-8 is an error at its first wrong byte, and no traceback."""
    (folder / "picture.flow").write_bytes(b"decode -> \xff\xd8")
    done = flowlang(folder, "check", "picture.flow")
    assert (done.returncode, done.stderr) == (1, "")
    assert " --> picture.flow:1:11\n" in done.stdout


def test_nothing_is_kept_where_there_is_no_home(folder: Path) -> None:
    """A cache that is no absolute path is none: what lies in a working folder is anybody's."""
    before = set(folder.iterdir())
    done = flowlang(folder, "check", "app.flow", HOME="home", XDG_CACHE_HOME="cache")
    assert (done.returncode, done.stdout) == (0, "app.flow: ok\n")
    assert set(folder.iterdir()) == before


def test_a_run_of_a_model_keeps_nothing_but_the_parser(folder: Path) -> None:
    """ONNX Runtime would keep what it is to tell Microsoft of the models, and a number for that."""
    home = folder / "home"
    arguments = ("run", "app.flow", "--device", "cpu", "pictures/a.jpg")
    done = flowlang(folder, *arguments, HOME=str(home), XDG_CACHE_HOME="", CI="")
    assert done.returncode == 0
    (kept,) = (path for path in home.rglob("*") if path.is_file())
    assert kept.match(".cache/flowlang/tables-*.lark")


# fmt


def test_fmt_rewrites_a_file_once(folder: Path) -> None:
    """fmt lays a file out, keeps its comment and its mode, and then finds nothing to do."""
    file = folder / "untidy.flow"
    file.chmod(0o640)
    first, second = flowlang(folder, "fmt", "untidy.flow"), flowlang(folder, "fmt", "untidy.flow")
    assert (first.returncode, first.stdout) == (0, "reformatted untidy.flow\n")
    assert (second.returncode, second.stdout) == (0, "")
    assert "# keep me" in file.read_text()
    assert "->resize(" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o640
    assert not list(folder.glob(".untidy*"))


def test_fmt_check_writes_nothing(folder: Path) -> None:
    """fmt --check names the files that would change, leaves them alone, and fails."""
    (folder / "tidy.flow").write_text(TIDY)
    done = flowlang(folder, "fmt", "--check", "tidy.flow", "untidy.flow")
    assert (done.returncode, done.stdout) == (1, "would reformat untidy.flow\n")
    assert (folder / "untidy.flow").read_text() == UNTIDY
    assert flowlang(folder, "fmt", "--check", "tidy.flow").returncode == 0


def test_fmt_goes_on_after_a_file_that_does_not_parse(folder: Path) -> None:
    """A file with a syntax error stays as it is and fails the run; the next is laid out."""
    (folder / "torn.flow").write_text("decode -> (\n")
    done = flowlang(folder, "fmt", "torn.flow", "untidy.flow")
    assert (done.returncode, done.stdout) == (1, "reformatted untidy.flow\n")
    assert "error[" in done.stderr
    assert (folder / "torn.flow").read_text() == "decode -> (\n"


# explain


def test_explain_prints_types_and_values(folder: Path) -> None:
    """explain prints the flow's type, its operators, and where each param's value is from."""
    done = flowlang(folder, "explain", "app.flow", "--set", "best=2")
    assert done.returncode == 0
    assert done.stdout.startswith("flow classify: bytes -> list<label>")
    assert 'top(2, names="names.txt")' in done.stdout
    assert "param best = 2  (--set)" in done.stdout


def test_explain_physical_prints_stages(folder: Path) -> None:
    """--physical prints stages with device, instances and batches, under the schedule chosen."""
    plain = flowlang(folder, "explain", "--physical", "--device", "cpu", "app.flow")
    prod = flowlang(folder, "explain", "--physical", "--schedule", "prod", "app.flow")
    stages = [
        re.findall(r"^stage 1 (.*?) +cpu (x\d) +batch (\S+)", d.stdout, re.M) for d in (plain, prod)
    ]
    assert stages == [[("net", "x2", "1..4")], [("net", "x1", "1..8")]]


def test_explain_of_two_files_prints_what_they_share(folder: Path) -> None:
    """Several files are explained one after the other, and their stages as those of one server."""
    (folder / "other.flow").write_text(APP.replace("classify", "other"))
    done = flowlang(folder, "explain", "app.flow", "other.flow")
    assert re.findall(r"^flow (\w+):", done.stdout, re.M) == ["classify", "other"]
    done = flowlang(folder, "explain", "--physical", "--device", "cpu", "app.flow", "other.flow")
    assert re.findall(r"^flow (\w+):.*\n  %1 = (stage 1 \w+)", done.stdout, re.M) == [
        ("classify", "stage 1 net"),
        ("other", "stage 1 net"),
    ]
    assert done.stdout.count("\nstage 1 ") == 1


def test_explain_of_a_wrong_file_prints_its_errors(folder: Path) -> None:
    """A file with errors has no plan: the errors and their number go to stderr."""
    done = flowlang(folder, "explain", "wrong.flow")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("\n2 errors\n")


# explain-error


def test_explain_error_prints_a_page(folder: Path) -> None:
    """A slug has its page, and without one the list has a line for each page."""
    page = flowlang(folder, "explain-error", "missing-unit")
    listed = flowlang(folder, "explain-error")
    assert (page.returncode, listed.returncode) == (0, 0)
    assert page.stdout.startswith("# missing-unit: ")
    assert page.stdout.splitlines()[0][2:] in listed.stdout.splitlines()
    pages = ROOT / "flowlang/explanations"
    assert len(listed.stdout.splitlines()) == len(list(pages.glob("*.md")))


def test_explain_error_suggests_a_slug(folder: Path) -> None:
    """A slug that is not there is wrong use, and the nearest one is named."""
    done = flowlang(folder, "explain-error", "mising-unit")
    assert (done.returncode, done.stdout) == (2, "")
    assert "`missing-unit`" in done.stderr


# run


def test_run_answers_every_file(folder: Path) -> None:
    """A folder is run file by file in order, hidden ones left out; the broken one fails alone."""
    done = flowlang(folder, "run", "app.flow", "pictures", "gone.jpg", "--device", "cpu")
    assert done.returncode == 1
    rows = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [row.split()[0] for row in rows] == [
        "pictures/a.jpg",
        "pictures/b.jpg",
        "pictures/more/c.jpg",
        "gone.jpg",
    ]
    assert re.search(r" class \d \(0\.\d{3}\)$", rows[0])
    assert "truncated" in rows[1]
    assert "(app.flow:5:3)" in rows[1]
    assert rows[3].endswith("  No such file or directory")
    assert len(done.stdout.splitlines()) == len(rows) + 2 * 2  # three labels for each good picture
    assert done.stderr.startswith("2 done, 2 failed, ")


def test_run_prints_numbers_in_one_line(folder: Path) -> None:
    """Those of a list or a quad stand side by side; what else is in a list has lines of its own."""
    (folder / "facts.py").write_text(
        "def f(x: bytes) -> "
        "'{ where: quad, scores: list<float>, words: list<str>, no: list<int> }':\n"
        "    return {'where': [[0, 0], [9.5, 0], [9.5, 4], [0, 4]], 'scores': [0.123456, 2],\n"
        "            'words': ['a', 'b'], 'no': []}\n"
    )
    (folder / "facts.flow").write_text('use "facts.py" as p\nexport flow f = p.f\n')
    done = flowlang(folder, "run", "facts.flow", "facts.py", "--device", "cpu")
    assert [line.strip() for line in done.stdout.splitlines()] == [
        "facts.py  where: 0, 0  9.5, 0  9.5, 4  0, 4",
        "scores: 0.1235, 2",
        "words: a",
        "b",
        "no:",
    ]


def test_run_reads_parameters_of_bytes_from_files(folder: Path) -> None:
    """`@FILE` is what a file holds, as curl has it; one that cannot be read is wrong use."""
    (folder / "two.flow").write_text(
        "export flow two(other: bytes, name: str): bytes -> { sides: list<int>, name: str } {\n"
        "  return { sides: [(in -> decode -> .width), (other -> decode -> .width)], name }\n}\n"
    )
    given = ("run", "two.flow", "pictures/a.jpg", "--device", "cpu", "--param", "name=@a")
    done = flowlang(folder, *given, "--param", "other=@pictures/more/c.jpg", "--json")
    result = json.loads(done.stdout)["result"]
    assert (result["name"], len(result["sides"])) == ("@a", 2)
    lost = flowlang(folder, *given, "--param", "other=@gone.jpg")
    assert (lost.returncode, lost.stdout) == (2, "")
    assert "`gone.jpg`: No such file or directory" in lost.stderr


def test_run_json_prints_a_line_for_each_file(folder: Path) -> None:
    """--json prints objects with a result or an error, in order, and nothing else."""
    done = flowlang(folder, "run", "app.flow", "gone.jpg", "pictures", "--json", "--set", "best=1")
    assert (done.returncode, done.stderr) == (1, "")
    gone, first, broken, last = map(json.loads, done.stdout.splitlines())
    assert gone == {
        "path": "gone.jpg",
        "error": {
            "code": "unreadable",
            "message": "No such file or directory",
            "stage": None,
            "place": None,
        },
    }
    assert (broken["error"]["code"], broken["error"]["stage"]) == ("bad-request", "decode")
    assert broken["error"]["place"] == "app.flow:5:3"
    assert first["result"] == last["result"]
    (label,) = first["result"]
    assert label["label"] == f"class {label['index']}"


@pytest.mark.parametrize("form", ["--json", "--device=cpu"])
def test_run_tells_of_folders_that_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """They have a row as a file that cannot be read has, and the status is 1."""
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if os.fspath(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "scandir", guarded)
    (folder / "pictures/b.jpg").unlink()
    done = CliRunner().invoke(main, ["run", "several.flow", "--flow=shrink", "pictures", form])
    assert done.exit_code == 1
    good, bad = done.stdout.splitlines()
    assert "pictures/a.jpg" in good
    assert "pictures/more" in bad
    assert "Permission denied" in bad


@pytest.mark.parametrize("encoding", ["latin-1", "koi8-r"])
def test_what_a_terminal_cannot_show_is_escaped(folder: Path, encoding: str) -> None:
    """Neither a message nor an answer, nor what is quoted on stderr, ends in a traceback."""
    (folder / "arrow.flow").write_text("decode \u2192 rgb\n")
    (folder / "word.py").write_text("def f(x: bytes) -> str: return '\u20ac'\n")
    (folder / "word.flow").write_text('use "word.py" as w\nexport flow f = w.f\n')
    checked = flowlang(folder, "check", "arrow.flow", PYTHONIOENCODING=encoding)
    assert (checked.returncode, checked.stderr) == (1, "")
    assert "decode \\u2192 rgb" in checked.stdout
    done = flowlang(folder, "run", "word.flow", "pictures/a.jpg", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, "pictures/a.jpg  \\u20ac\n")
    done = flowlang(folder, "run", "arrow.flow", "pictures/a.jpg", PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert "decode \\u2192 rgb" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_of_good_files_ends_with_0(folder: Path) -> None:
    """Where every file has a result the status is 0."""
    assert flowlang(folder, "run", "app.flow", "pictures/a.jpg").returncode == 0


def test_run_of_a_flow_that_does_not_decode_says_how(folder: Path) -> None:
    """It takes an image, which no file is before it is decoded."""
    (folder / "late.flow").write_text("resize(8) -> rgb\n", "utf-8")
    done = flowlang(folder, "run", "late.flow", "pictures/a.jpg")
    assert done.returncode == 2
    assert "not the bytes of a file: begin it with `decode`" in done.stderr


def test_run_shows_arrays_shortly(folder: Path) -> None:
    """An array is its dtype, its shape and its first values; JSON holds all of it."""
    shrink = ("run", "several.flow", "--flow", "shrink", "pictures/a.jpg")
    row = flowlang(folder, *shrink).stdout
    assert re.fullmatch(r"pictures/a\.jpg  uint8 2x2x3 \[\d+(, \d+){3}, \.\.\.\]\n", row)
    result = json.loads(flowlang(folder, *shrink, "--json").stdout)["result"]
    assert [[len(pixel) for pixel in line] for line in result] == [[3, 3], [3, 3]]


def test_run_prints_any_file_name(folder: Path) -> None:
    """A name that is no UTF-8 is run, and printed with a sign in place of the wrong byte."""
    name = os.fsencode(folder / "pictures") + b"/\xff.jpg"
    os.rename(folder / "pictures/a.jpg", name)
    for more in ((), ("--json",)):
        done = flowlang(folder, "run", "app.flow", b"pictures/\xff.jpg", *more)
        assert done.returncode == 0
        assert "pictures/\N{REPLACEMENT CHARACTER}.jpg" in done.stdout


def test_run_ends_quietly_when_nobody_reads(folder: Path) -> None:
    """Who takes only the first line of the output gets no traceback with it."""
    run = " ".join(map(str, command("run", "app.flow", *["pictures/a.jpg"] * 200, "--json")))
    done = subprocess.run(
        ["bash", "-c", f"{run} | head -n 1"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert json.loads(done.stdout)["path"] == "pictures/a.jpg"
    assert done.stderr == ""


def test_encrypted_models_take_a_key(folder: Path) -> None:
    """A sealed model is opened with a key file or FLOWLANG_KEY, and refused without either."""
    text = base64.b64encode(secrets.token_bytes(32)).decode()
    (folder / "key").write_text(text)
    (folder / "key").chmod(0o600)
    blob = seal((folder / "net.onnx").read_bytes(), read_key(text), header=MODEL_HEADER)
    (folder / "net.onnx.encrypted").write_bytes(blob)
    (folder / "app.flow").write_text(APP.replace("net.onnx", "net.onnx.encrypted"))
    run = ("run", "app.flow", "pictures/a.jpg", "--json")
    by_file = flowlang(folder, *run, "--key-file", "key")
    by_variable = flowlang(folder, *run, FLOWLANG_KEY=text)
    assert (by_file.returncode, by_variable.returncode) == (0, 0)
    assert by_file.stdout == by_variable.stdout
    without = flowlang(folder, "check", "app.flow")
    assert without.returncode == 1
    assert "FLOWLANG_KEY" in without.stdout
    assert flowlang(folder, "check", "app.flow", "--key-file", "key").returncode == 0


# seal


@pytest.fixture
def key(folder: Path) -> str:
    """A new key, also in the file `key`."""
    text = base64.b64encode(secrets.token_bytes(32)).decode()
    (folder / "key").write_text(text)
    (folder / "key").chmod(0o600)
    return text


def test_seal_makes_a_model_that_a_flow_opens(folder: Path, key: str) -> None:
    """With the same key; without it nothing of the model can be read."""
    plain = (folder / "net.onnx").read_bytes()
    done = flowlang(folder, "seal", "net.onnx", "--key-file", "key")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "sealed net.onnx as net.onnx.encrypted\n"
    sealed = folder / "net.onnx.encrypted"
    assert sealed.stat().st_mode & 0o777 == 0o600
    with sealed.open("rb") as file:
        assert open_sealed(file, read_key(key), header=MODEL_HEADER) == plain
    assert plain[:64] not in sealed.read_bytes()
    assert not list(folder.glob(".*"))
    (folder / "app.flow").write_text(APP.replace("net.onnx", "net.onnx.encrypted"))
    assert flowlang(folder, "check", "app.flow", "--key-file", "key").returncode == 0
    assert flowlang(folder, "check", "app.flow").returncode == 1


def test_seal_replaces_nothing_by_itself(folder: Path, key: str) -> None:
    """A file that is there stays, until --force is given; and so does it where sealing fails."""
    at = folder / "deep.encrypted"
    at.write_bytes(b"precious")
    seal_it = ("seal", "net.onnx", "--output", "deep.encrypted")
    done = flowlang(folder, *seal_it, FLOWLANG_KEY=key)
    assert (done.returncode, done.stdout) == (2, "")
    assert "deep.encrypted is there already" in done.stderr
    failed = flowlang(folder, "seal", "names.txt", *seal_it[2:], "--force", FLOWLANG_KEY=key)
    assert failed.returncode == 1
    assert "names.txt is no ONNX model" in failed.stderr
    assert at.read_bytes() == b"precious"
    assert flowlang(folder, *seal_it, "--force", FLOWLANG_KEY=key).returncode == 0
    assert at.read_bytes().startswith(MAGIC)


def test_seal_refuses_weights_that_would_stay_in_plain(folder: Path, key: str) -> None:
    """A model in several files is no secret when one of them is sealed."""
    import onnx

    model = onnx.load(folder / "net.onnx")
    onnx.save_model(model, folder / "wide.onnx", save_as_external_data=True, location="wide.bin",
                    size_threshold=0)  # fmt: skip
    done = flowlang(folder, "seal", "wide.onnx", "--key-file", "key")
    assert (done.returncode, done.stdout) == (1, "")
    assert "weights in files of their own, as wide.bin" in done.stderr
    assert not (folder / "wide.onnx.encrypted").exists()


# Wrong use

WRONG_USES = {
    "no command": ((), "Usage:"),
    "unknown command": (("chek", "app.flow"), "chek"),
    "unknown option": (("check", "--fast", "app.flow"), "--fast"),
    "no file": (("check",), "FILES"),
    "missing file": (("check", "gone.flow"), "gone.flow"),
    "folder for a file": (("explain", "pictures"), "pictures"),
    "no pictures": (("run", "app.flow"), "PICTURES"),
    "empty folder": (("run", "app.flow", "empty"), "no file"),
    "set without a value": (("check", "app.flow", "--set", "best"), "NAME=VALUE"),
    "set without a name": (("check", "app.flow", "--set", "=3"), "NAME=VALUE"),
    "unknown device": (("run", "app.flow", "pictures", "--device", "tpu"), "cpu, gpu and gpu:"),
    "unknown flow": (("run", "several.flow", "pictures", "--flow", "x"), "`shrink`, `vector`"),
    "several flows": (("run", "several.flow", "pictures"), "several flows"),
    "flow of tensors": (("run", "several.flow", "pictures", "--flow", "vector"), "tensor<f32, 3>"),
    "set twice": (("check", "app.flow", "--set", "best=1", "--set", "best=2"), "`best` is given"),
    "param twice": (("run", "app.flow", "p", "--param", "k=1", "--param", "k=2"), "`k` is given"),
    "doc of no file": (("doc", "--set", "best=1"), "about a FILE"),
    "doc of no file's schedule": (("doc", "--schedule", "prod"), "about a FILE"),
    "no key": (("seal", "net.onnx"), "FLOWLANG_KEY"),
    "no flow for Thrift": (("serve", "app.flow", "--thrift-flow", "x"), "there is no flow `x`"),
    "sealed twice": (("seal", "net.onnx.encrypted", "--key-file", "key"), "encrypted already"),
    "port of no kind": (("serve", "app.flow", "--port", "70000"), "70000"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), WRONG_USES.values(), ids=WRONG_USES)
@pytest.mark.usefixtures("key")
def test_wrong_use_is_explained(arguments: tuple[str, ...], said: str, folder: Path) -> None:
    """Wrong use ends with status 2, nothing on stdout, and stderr says what was wrong."""
    (folder / "empty").mkdir()
    (folder / "net.onnx.encrypted").touch()
    done = flowlang(folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    """--device gpu says why there is none, in one line, and the status is 1."""
    done = flowlang(folder, "run", "app.flow", "pictures", "--device", "gpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("flowlang: there is no GPU to run on: ")
    assert done.stderr.count("\n") == 1


def test_a_model_that_cannot_be_loaded_is_one_line(folder: Path) -> None:
    """What only ONNX Runtime finds wrong with a model is said in words, without a traceback."""
    (folder / "net.onnx").unlink()
    models.resnet(folder / "net.onnx", width=8, size=64, classes=10)
    data = (folder / "net.onnx").read_bytes()
    (folder / "net.onnx").write_bytes(data.replace(b"GlobalAveragePool", b"GlobalAveragePuul"))
    done = flowlang(folder, "run", "app.flow", "pictures")
    assert (done.returncode, done.stdout) == (1, "")
    assert "net.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_files_may_not_serve_one_name(folder: Path) -> None:
    """serve names both files and the flow before it loads anything."""
    (folder / "again.flow").write_text(APP)
    done = flowlang(folder, "serve", "app.flow", "again.flow", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "app.flow and again.flow both serve a flow named `classify`" in done.stderr


def test_help_and_version(folder: Path) -> None:
    """Every command has a help page, and --version prints the package's version."""
    assert flowlang(folder, "--version").stdout == f"flowlang, version {__version__}\n"
    overview = flowlang(folder, "-h").stdout
    for name in main.commands:
        assert f"  {name} " in overview
        page = flowlang(folder, name, "--help")
        assert page.returncode == 0
        assert f"flowlang {name} [OPTIONS]" in page.stdout.splitlines()[0]


# Signals


def test_an_interrupt_ends_a_run(folder: Path) -> None:
    """SIGINT ends a run with status 130 and one line, though an item would wait for a minute."""
    os.mkfifo(folder / "slow.jpg")
    (folder / "held.flow").write_text(
        'decode -> resize(64) -> rgb -> trt("net.onnx", batch=1..64, wait=60s)'
    )
    process = subprocess.Popen(
        command("run", "held.flow", "pictures/a.jpg", "slow.jpg"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, SIGINT is ignored, and would be here too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            with open(folder / "slow.jpg", "wb"):  # opens once the run opens it to read
                process.send_signal(signal.SIGINT)
            printed, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, printed, said) == (130, "", "flowlang: interrupted\n")


def test_build_says_why_it_cannot(folder: Path) -> None:
    """Without a GPU there is no engine to build, and that is told in one line."""
    done = flowlang(folder, "build", "app.flow")
    assert done.returncode == 1
    assert done.stderr.startswith("flowlang: there is no GPU to run on: ")
    assert done.stderr.count("\n") == 1
