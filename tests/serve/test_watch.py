"""`flowlang serve --watch`: a changed flow takes over without losing a request."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowlang.serve import watch
from tests.serve.server import KINDS, Server, head, serving, wait_until

FLOW = """use "post.py" as post
export flow tell: bytes -> {{ size: int, version: int }} = post.{name}
"""
POST = """from typing import TypedDict

class Told(TypedDict):
    size: int
    version: int

def {name}(item: bytes) -> Told:
    return {{"size": len(item), "version": {version}}}
"""


def write(folder: Path, version: int, name: str = "tell") -> None:
    (folder / "post.py").write_text(POST.format(name=name, version=version))


@pytest.fixture(params=KINDS)
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    write(tmp_path, 1)
    flow = tmp_path / "tell.flow"
    flow.write_text(FLOW.format(name="tell"))
    with serving(tmp_path, str(flow), *request.param, "--device", "cpu", "--watch") as server:
        yield server.wait_ready()


def version_of(server: Server) -> int:
    version: int = server.client.post("/", content=b"x").json()["version"]
    return version


def test_a_changed_file_takes_over_and_no_request_is_lost(server: Server, tmp_path: Path) -> None:
    """While clients go on asking, new versions answer, and every answer is one of either."""
    stop = threading.Event()
    seen: Counter[tuple[int, int]] = Counter()
    lock = threading.Lock()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=30.0) as client:
            while not stop.is_set():
                response = client.post("/", content=b"12345")
                form = client.post("/", files=[("a", b"12345"), ("b", b"54321")])
                results = [told.get("result", told) for told in form.json()["results"]]
                with lock:
                    for told in (response.json(), *results):
                        seen[response.status_code, told.get("version", 0)] += 1
                        assert told.get("size") == 5, told

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    for version in (2, 3):
        write(tmp_path, version)
        wait_until(lambda version=version: version_of(server) == version)  # type: ignore[misc]
    stop.set()
    for client in clients:
        client.join()
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {1, 2, 3}


def test_a_change_that_does_not_check_changes_nothing(server: Server, tmp_path: Path) -> None:
    """The old flow goes on, its reason is told, and the next right version is taken."""
    write(tmp_path, 2, name="tall")
    wait_until(lambda: "kept as it was" in server.errors)
    assert "there is no operator or flow named `post.tell`" in server.errors
    assert version_of(server) == 1
    write(tmp_path, 3)
    wait_until(lambda: version_of(server) == 3)


def test_a_change_of_one_file_loads_all_again(tmp_path: Path) -> None:
    """Several files are one app: the change of one of them is taken over with the others."""
    write(tmp_path, 1)
    (tmp_path / "tell.flow").write_text(FLOW.format(name="tell"))
    (tmp_path / "echo.flow").write_text("export flow echo = pass\n")
    files = [str(tmp_path / f"{name}.flow") for name in ("tell", "echo")]
    with serving(tmp_path, *files, "--device", "cpu", "--watch") as server:
        server.wait_ready()
        (tmp_path / "echo.flow").write_text("export flow same = pass\n")
        wait_until(lambda: server.client.post("/flows/same", content=b"x").status_code == 200)
        assert server.client.post("/flows/echo", content=b"x").status_code == 404
        write(tmp_path, 2)
        wait_until(lambda: server.client.post("/flows/tell").json()["version"] == 2)
        assert server.client.post("/flows/same", content=b"x").content == b"x"


def test_counts_go_on(server: Server, tmp_path: Path) -> None:
    """What was counted before is, and what the old flow answers meanwhile; each request once."""

    def counted(name: str) -> dict[str, float]:
        text = server.client.get("/metrics").text
        families = text_string_to_metric_families(text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return {s.labels.get("code", ""): s.value for s in samples}

    asked = 0

    def is_version(version: int) -> bool:
        nonlocal asked
        asked += 1
        return version_of(server) == version

    for many, version in enumerate((2, 3, 4), 1):
        assert server.client.post("/?k=1", content=b"x").status_code == 400
        with server.connect() as connection:  # begun for the old flow, and answered by the new one
            connection.send(head("/", 2), b"a")
            write(tmp_path, version)
            wait_until(lambda v=version: is_version(v))  # type: ignore[misc]
            connection.send(b"b")
            assert json.loads(connection.answer()[2]) == {"size": 2, "version": version}
        good = asked + many
        outcomes = {"ok": good, "bad-request": many}
        wait_until(lambda o=outcomes: counted("flowlang_requests_total") == o)  # type: ignore[misc]
        assert counted("flowlang_request_seconds_count") == {"": good}
        assert sum(counted("flowlang_stage_batch_size_sum").values()) == good


def test_a_stop_waits_for_no_reload(server: Server, tmp_path: Path) -> None:
    """However long the new flows take to load: those inside are answered, and it ends at once."""
    begun = tmp_path / "begun"
    slow = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(40)\n"
    (tmp_path / "post.py").write_text(slow + POST.format(name="tell", version=2))
    wait_until(begun.exists)
    assert version_of(server) == 1
    server.signal()
    began_s = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - began_s < 5
    assert server.errors == ""


def test_a_change_of_a_file_that_operators_import_counts(tmp_path: Path) -> None:
    """A helper, also one that is imported when it is needed, and one of a helper's."""
    (tmp_path / "post.py").write_text(
        "def tell(item: bytes) -> int:\n    import first\n    return first.second.K\n"
    )
    (tmp_path / "first.py").write_text("import second\n")
    (tmp_path / "second.py").write_text("K = 1\n")
    flow = tmp_path / "tell.flow"
    flow.write_text('use "post.py" as post\nexport flow tell = post.tell\n')
    with serving(tmp_path, str(flow), "--device", "cpu", "--watch") as server:
        server.wait_ready()
        assert server.client.post("/", content=b"").json() == 1
        (tmp_path / "second.py").write_text("K = 2\n")
        wait_until(lambda: server.client.post("/", content=b"").json() == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_links_that_lead_elsewhere_are_a_change(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """As Kubernetes changes what it mounts, though all files of a release have the same time."""
    for version in (1, 2):
        release = tmp_path / f"..{version}"
        release.mkdir()
        write(release, version)
        (release / "tell.flow").write_text(FLOW.format(name="tell"))
        for file in release.iterdir():
            os.utime(file, (0, 0))
    (tmp_path / "..data").symlink_to("..1")
    for name in ("tell.flow", "post.py"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    flow = str(tmp_path / "tell.flow")
    with serving(tmp_path, flow, *kind, "--device", "cpu", "--watch") as server:
        server.wait_ready()
        assert version_of(server) == 1
        (tmp_path / "..next").symlink_to("..2")
        (tmp_path / "..next").rename(tmp_path / "..data")
        server.line("reloaded: tell")
        assert version_of(server) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_moved_there_while_flows_load_counts(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """It was written long before, and is new all the same."""
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    slow = f"""
import pathlib, time
pathlib.Path({str(begun)!r}).touch()
while not pathlib.Path({str(gate)!r}).exists():
    time.sleep(0.01)
"""
    (tmp_path / "post.py").write_text(slow + POST.format(name="tell", version=1))
    flow, later = tmp_path / "tell.flow", tmp_path / "later"
    flow.write_text(FLOW.format(name="tell"))
    later.write_text(FLOW.format(name="tell").replace("flow tell", "flow told"))
    os.utime(later, (0, 0))
    with serving(tmp_path, str(flow), *kind, "--device", "cpu", "--watch") as server:
        wait_until(begun.exists)
        later.rename(flow)
        gate.touch()
        server.line("serving tell on ")
        server.line("reloaded: told")


def test_old_operators_go_once_new_ones_have_taken_over(tmp_path: Path) -> None:
    """They answer until then, with what they import only now, and do not pile up: what a thread
    still held when the collector came for it goes with the next.
    """
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    text = """
import gc, pathlib, time

class Table: pass

table = Table()
{waits}
def tell(item: bytes) -> list[int]:
    import late
    return [{version}, late.K, sum(type(o).__name__ == "Table" for o in gc.get_objects())]
"""
    waits = f"""
pathlib.Path({str(begun)!r}).touch()
while not pathlib.Path({str(gate)!r}).exists():
    time.sleep(0.01)
"""
    (tmp_path / "late.py").write_text("K = 5\n")
    (tmp_path / "post.py").write_text(text.format(version=1, waits=""))
    flow = tmp_path / "tell.flow"
    flow.write_text('use "post.py" as post\nexport flow tell = post.tell\n')
    with serving(tmp_path, str(flow), "--device", "cpu", "--watch") as server:
        server.wait_ready()

        def told() -> list[int]:
            answer: list[int] = server.client.post("/", content=b"").json()
            return answer

        (tmp_path / "post.py").write_text(text.format(version=2, waits=waits))
        wait_until(begun.exists)
        assert told() == [1, 5, 2]
        gate.touch()
        for version in (3, 4, 5):
            (tmp_path / "post.py").write_text(text.format(version=version, waits=""))
            wait_until(lambda v=version: told()[:2] == [v, 5])  # type: ignore[misc]
        wait_until(lambda: told()[2] <= 2)


def test_a_change_of_a_word_list_counts(tmp_path: Path) -> None:
    """Also of one that an operator inside a `map` is given; one that is no text is not taken."""
    names, flow = tmp_path / "names.txt", tmp_path / "tell.flow"
    names.write_text("cat\ndog\n")
    flow.write_text(
        'export flow tell: list<tensor<f32, 2>> -> list<label> = map(best(names="names.txt"))\n'
    )
    with serving(tmp_path, str(flow), "--device", "cpu", "--watch") as server:
        server.wait_ready()

        def told() -> list[str]:
            answer = server.client.post("/flows/tell", json=[[0.25, 0.75]])
            return [each["label"] for each in answer.json()]

        assert told() == ["dog"]
        names.write_text("cat\nwolf\n")
        wait_until(lambda: told() == ["wolf"])
        names.write_bytes("cat\nbear\n".encode("utf-16"))
        wait_until(lambda: "`names.txt` is not text in UTF-8" in server.errors)
        assert told() == ["wolf"]


def test_a_change_while_flows_are_loaded_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were read before it do not stay, neither the first nor any later ones."""
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    file = tmp_path / "changes.flow"
    file.write_text("0")
    loaded: list[str] = []

    async def load() -> Any:
        loaded.append(file.read_text())
        if len(loaded) < 3:
            file.write_text("x" * len(loaded))  # which is what has been read no more
        return None

    async def go() -> None:
        since_ns = time.time_ns()
        os.utime(file, ns=(since_ns + 1, since_ns + 1))  # while the first were loaded
        watching = asyncio.create_task(
            watch.reload_on_change(lambda: [str(file)], load, lambda app: None, since_ns)
        )
        await asyncio.to_thread(wait_until, lambda: len(loaded) == 3)
        watching.cancel()

    asyncio.run(go())
    assert loaded == ["0", "x", "xx"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_lets_no_changed_flows_in(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """A reload that ends while the last requests are answered changes nothing: none is let in."""
    begun, gate, loaded, free = (tmp_path / name for name in ("begun", "gate", "loaded", "free"))
    text = f"""
import pathlib, time

def wait(path: str) -> None:
    while not pathlib.Path(path).exists():
        time.sleep(0.01)

def tell(item: bytes) -> bytes:
    return item

def held(item: bytes) -> bytes:
    wait({str(free)!r})
    return item
"""
    (tmp_path / "post.py").write_text(text)
    flow = tmp_path / "tell.flow"
    flow.write_text(
        'use "post.py" as post\nexport flow tell = post.tell\nexport flow held = post.held\n'
    )
    with serving(tmp_path, str(flow), *kind, "--device", "cpu", "--watch") as server:
        server.wait_ready()
        with server.connect() as inside:
            inside.post("/flows/held", b"patience")
            server.wait_inside(1)
            slow = f"pathlib.Path({str(begun)!r}).touch()\nwait({str(gate)!r})\n"
            (tmp_path / "post.py").write_text(
                f"{text}{slow}pathlib.Path({str(loaded)!r}).touch()\n"
            )
            wait_until(begun.exists)
            server.signal()
            wait_until(lambda: server.health()["status"] == "draining")
            gate.touch()
            wait_until(loaded.exists)
            told = {server.client.post("/flows/tell", content=b"x").status_code}
            time.sleep(0.3)  # long enough for flows that are loaded to take over
            told.add(server.client.post("/flows/tell", content=b"x").status_code)
            assert server.health()["status"] == "draining"
            free.touch()
            assert inside.answer()[2] == b"patience"
        assert server.wait() == 0
        assert told == {503}
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""
        assert server.errors == ""
