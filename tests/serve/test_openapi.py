"""The OpenAPI document: what it says, held against its own rules and against what is answered."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

import flowlang
from flowlang import diagnostics
from flowlang.plan.types import FLOAT, LABEL, UNKNOWN, Image, ListOf, Optional, Scalar, Tensor
from flowlang.serve.openapi import ERRORS, schema_of
from tests.pictures import photographs
from tests.serve.asking import ask_application
from tests.serve.browser import Browser
from tests.serve.faces import write_types
from tests.serve.server import Server, serving, write

jsonschema = pytest.importorskip("jsonschema")
openapi_spec_validator = pytest.importorskip("openapi_spec_validator")

PICTURE = photographs(1)[0]
MORE = """
type who = { name: str, age: int?, spots: list<quad> }
use "more.py" as more
export flow greet(loud: bool = false, times: int, least: float = 0.5, note: str = "in /etc/notes",
    area: box?): who -> str { return in -> more.greet }
export flow maybe(mask: bytes?): bytes -> bytes? { return in -> more.maybe }
## Turns a picture round.
##
## Its size stays.
export flow turned: image<rgb, u8, hwc, 2x3> -> image<rgb, u8, hwc, 2x3> = more.turned
export flow moved = more.moved
"""
OPERATORS = """
from typing import Annotated, NamedTuple

import numpy as np

Small = Annotated[np.ndarray, "image<rgb, u8, hwc, 2x3>"]
Who = Annotated[dict, "{ name: str, age: int?, spots: list<quad> }"]

class Point(NamedTuple):
    x: int
    y: float = 0.5

def moved(p: Point) -> Point:
    return p._replace(x=p.x + 1)

def greet(who: Who) -> str:
    return "hello " + who["name"]

def maybe(data: bytes) -> bytes | None:
    return None if len(data) > 10 else data

def turned(image: Small) -> Small:
    return image[::-1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flows that take and give every type."""
    folder = tmp_path_factory.mktemp("openapi")
    write_types(folder)
    write(folder / "more.py", OPERATORS)
    write(folder / "more.flow", MORE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    files = [str(folder / name) for name in ("all.flow", "types.flow", "more.flow")]
    with serving(folder, *files, "--device", "cpu") as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    response = server.client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


# A client that knows nothing but the document


def whole(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for."""
    found: Any = value
    if "$ref" in value:
        found = document
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
    return dict(found)


def sample(schema: dict[str, Any]) -> Any:
    """A value that fits a schema."""
    if "anyOf" in schema:
        return sample(schema["anyOf"][0])
    if "contentSchema" in schema:
        return sample(schema["contentSchema"])
    if "default" in schema:
        return schema["default"]
    kind = schema.get("type")
    if kind == "object":
        return {name: sample(part) for name, part in schema["properties"].items()}
    if kind == "array":
        return [sample(schema["items"])] * max(schema.get("minItems", 2), 1)
    if kind == "string" and schema.get("contentEncoding") == "base64":
        return "YWJj"
    values = {"string": "a", "integer": 2, "number": 0.5, "boolean": True, None: [0.5, 1.5, 2.5]}
    return max(values[kind], schema.get("minimum", values[kind])) if kind else values[None]


def query_of(operation: dict[str, Any], *, all_of_them: bool) -> str:
    found = {}
    for parameter in operation["parameters"]:
        if parameter.get("in") != "query" or not (all_of_them or parameter["required"]):
            continue
        content = parameter.get("content")
        schema = content["application/json"]["schema"] if content else parameter["schema"]
        value = sample(schema)
        text = value if isinstance(value, str) and not content else json.dumps(value)
        found[parameter["name"]] = text
    return urlencode(found)


def bodies(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A body of each kind, as httpx takes it."""
    for kind, described in content.items():
        if kind == "application/json":
            yield kind, {"json": sample(described["schema"])}
        elif kind == "multipart/form-data":
            *of_fields, of_items = described["schema"].get("anyOf", [described["schema"]])
            for schema in of_fields:
                yield kind, {"files": list(form_parts(schema, described, 1))}
            for count in (1, 2):
                parts = list(form_parts(of_items, described, count))
                yield f"{kind} {count}", {"files": parts}
        else:
            sent = kind.replace("*", "jpeg")
            yield kind, {"content": PICTURE, "headers": {"Content-Type": sent}}


def form_parts(
    form: dict[str, Any], described: dict[str, Any], count: int
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, schema in form["properties"].items():
        kind = described["encoding"][name]["contentType"]
        of_one = schema.get("items", schema)
        for number in range(count if "items" in schema else 1):
            value: Any = sample(of_one) if kind != "application/octet-stream" else PICTURE
            value = json.dumps(value) if kind == "application/json" else value
            yield name, (f"{number}.part", value, kind)


def check_answer(
    document: dict[str, Any], operation: dict[str, Any], found: httpx.Response
) -> None:
    """Fail unless an answer is one that the document allows."""
    described = whole(document, operation["responses"][str(found.status_code)])
    for name in described["headers"]:
        assert name in found.headers
    kind = found.headers["content-type"].partition(";")[0]
    assert kind in described["content"]
    if kind == "application/json":
        schema = {
            "allOf": [described["content"][kind]["schema"]],
            "components": document["components"],
        }
        jsonschema.Draft202012Validator(schema).validate(found.json())


def calls(document: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return (
        (path.removeprefix("/flows/"), operations["post"])
        for path, operations in document["paths"].items()
        if "post" in operations
    )


def test_the_document_keeps_the_rules(document: dict[str, Any]) -> None:
    """It is an OpenAPI document of version 3.1, each operation with an id of its own."""
    openapi_spec_validator.validate(document)
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["version"] == flowlang.__version__


def test_what_it_offers_is_answered_as_it_says(server: Server, document: dict[str, Any]) -> None:
    """Requests made of the document alone, by every kind of body, get the answers it describes."""
    odd = {"fail": 500, "facts": 500, "held": 504, "thousand": 504}
    asked = 0
    for name, operation in calls(document):
        for all_of_them in (False, True):
            query = query_of(operation, all_of_them=all_of_them)
            for kind, body in bodies(operation["requestBody"]["content"]):
                headers = {**body.pop("headers", {}), "X-Deadline-Ms": "3000"}
                if odd.get(name) == 504:
                    headers["X-Deadline-Ms"] = "20"
                url = f"/flows/{name}?{query}"
                response = server.client.post(url, headers=headers, **body)
                wanted = 200 if kind.endswith(" 2") else odd.get(name, 200)
                assert response.status_code == wanted, (name, kind, response.text)
                check_answer(document, operation, response)
                asked += 1
    assert asked > 100


def test_what_is_looked_at_is_as_it_says(server: Server, document: dict[str, Any]) -> None:
    """Every path that is looked at is there, of the kind and of the form described."""
    for path, operations in document["paths"].items():
        if "get" in operations:
            response = server.client.get(path)
            assert response.status_code == 200, path
            check_answer(document, operations["get"], response)


def test_errors_are_as_it_says(server: Server, document: dict[str, Any]) -> None:
    """Requests that are refused, from each cause a client can bring about, are described."""
    _, operation = next(found for found in calls(document) if found[0] == "classify")
    gzip, late = {"Content-Encoding": "gzip"}, {"X-Deadline-Ms": "no"}
    for status, body in (
        (400, {"content": b"no picture"}),
        (400, {"content": PICTURE, "headers": late}),
        (400, {"content": PICTURE, "params": {"nothing": "1"}}),
        (413, {"content": bytes(40 << 20)}),
        (415, {"content": PICTURE, "headers": gzip}),
    ):
        response = server.client.post("/flows/classify", **body)
        assert response.status_code == status
        check_answer(document, operation, response)


def test_every_error_is_described(document: dict[str, Any]) -> None:
    """Each code that the face answers with, and its status, is in the document; and no other."""
    raised = {
        (kind.code, kind.http_status)
        for kind in vars(diagnostics).values()
        if isinstance(kind, type) and issubclass(kind, diagnostics.RequestError)
    } - {("request-failed", 500)}
    serve = Path(flowlang.__file__).parent / "serve"
    for name in ("routes", "body", "answer", "form", "token", "front"):
        for node in ast.walk(ast.parse((serve / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Refusal":
                code, status = (ast.literal_eval(argument) for argument in node.args[:2])
                raised.add((code, status))
    assert {(code, status) for code, (status, _) in ERRORS.items()} == raised
    described = document["components"]["responses"]
    for code, (status, words) in ERRORS.items():
        assert f"`{code}`: {words}" in described[str(status)]["description"]


def test_flows_are_described_in_their_authors_words(document: dict[str, Any]) -> None:
    """What stands before a flow behind `##` describes it, and its parameters have their types."""
    found = dict(calls(document))
    assert found["classify"]["description"] == "Three best classes of one picture."
    assert found["turned"]["description"] == "Turns a picture round.\n\nIts size stays."
    assert found["classify"]["summary"] == "classify: bytes -> list<label>"
    given = {p["name"]: p for p in found["greet"]["parameters"] if "name" in p}
    assert list(given) == ["loud", "times", "least", "note", "area"]
    assert [p["name"] for p in given.values() if p["required"]] == ["times"]
    assert given["loud"]["schema"] == {"type": "boolean", "default": False}
    assert given["least"]["schema"] == {"type": "number", "default": 0.5}
    assert given["area"]["content"]["application/json"]["schema"]["minItems"] == 4
    assert set(found["joined"]["requestBody"]["content"]) == {"multipart/form-data"}
    assert "name" not in {p.get("name") for p in found["joined"]["parameters"]}


def test_a_default_that_is_text_is_not_told(document: dict[str, Any], server: Server) -> None:
    """A text may be a place on the server, or come from its environment."""
    assert "/etc/notes" not in json.dumps(document)
    assert "/etc/notes" not in server.client.get("/flows").text


def test_optional_parameters_are_not_required(server: Server) -> None:
    """`/flows` says the same of parameters as the document, those that may be null included."""
    listed = {flow["name"]: flow for flow in server.client.get("/flows").json()["flows"]}
    required = {p["name"]: p["required"] for p in listed["greet"]["parameters"]}
    assert required == {"loud": False, "times": True, "least": False, "note": False, "area": False}
    assert [p["required"] for p in listed["maybe"]["parameters"]] == [False]


def test_fields_with_defaults_are_not_required(document: dict[str, Any], server: Server) -> None:
    """They may be left out of JSON, of a form and of an inference, and are in every answer."""
    call = document["paths"]["/flows/moved"]["post"]
    schemas = {name: c["schema"] for name, c in call["requestBody"]["content"].items()}
    assert schemas["application/json"]["required"] == ["x"]
    assert schemas["multipart/form-data"]["anyOf"][0]["required"] == ["x"]
    assert call["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"][0][
        "required"
    ] == ["x", "y"]
    listed = {flow["name"]: flow for flow in server.client.get("/flows").json()["flows"]}
    assert {f["name"]: f["required"] for f in listed["moved"]["fields"]} == {"x": True, "y": False}
    config = server.client.get("/v2/models/moved/config").json()
    assert {p["name"]: p["optional"] for p in config["input"]} == {"x": False, "y": True}
    moved = {"x": 2, "y": 0.5}
    assert server.client.post("/flows/moved", json={"x": 1}).json() == moved
    assert server.client.post("/flows/moved", files={"x": (None, "1")}).json() == moved
    sent = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [1]}]}
    answer = server.client.post("/v2/models/moved/infer", json=sent).json()
    assert {o["name"]: o["data"] for o in answer["outputs"]} == {"x": [2], "y": [0.5]}


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (Scalar("int"), {"type": "integer"}),
        (FLOAT, {"type": ["number", "null"]}),
        (Optional(Scalar("bool")), {"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
        (UNKNOWN, {}),
        (Tensor("u8", ()), {"type": "integer", "minimum": 0, "maximum": 255, "description": "u8"}),
        (
            Tensor("i8", (None, 2)),
            {
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": -128, "maximum": 127},
                    "minItems": 2,
                    "maxItems": 2,
                },
                "description": "tensor<i8, ?x2>",
            },
        ),
    ],
)
def test_types_become_schemas(kind: Any, schema: dict[str, Any]) -> None:
    """A type of an answer is a JSON Schema; a number that is none is null there."""
    assert schema_of(kind, is_answer=True) == schema


def test_records_are_closed_where_they_are_sent() -> None:
    """A field too many is refused by a flow, so what is sent has none; an answer may grow some."""
    sent, answered = (schema_of(ListOf(LABEL), is_answer=is_it)["items"] for is_it in (False, True))
    assert sent["required"] == answered["required"] == ["index", "label", "score"]
    assert (sent["additionalProperties"], "additionalProperties" in answered) == (False, False)
    assert schema_of(Image("gray"), is_answer=False)["items"]["items"]["type"] == "integer"


def test_the_only_flow_is_described_at_the_root_too(folder: Path) -> None:
    """With one flow `POST /` is its call as well; and a server with a token says who needs it."""
    path = write(folder / "echo.flow", "export flow echo: bytes -> bytes = pass\n")
    with serving(folder, str(path), environment={"FLOWLANG_TOKEN": "secret"}) as server:
        server.wait_ready()
        assert server.client.get("/openapi.json").status_code == 401
        assert server.client.get("/docs").status_code == 200
        headers = {"Authorization": "Bearer secret"}
        document = server.client.get("/openapi.json", headers=headers).json()
        openapi_spec_validator.validate(document)
        for path_, operations in document["paths"].items():
            for method, operation in operations.items():
                answer = server.client.request(method, path_, content=b"x" * (method == "post"))
                is_free = operation.get("security") == []
                assert answer.status_code == (200 if is_free else 401), (method, path_)
                check_answer(document, operation, answer)
        answer = server.client.post("/", content=b"x", headers=headers)
        check_answer(document, document["paths"]["/"]["post"], answer)


def test_it_is_there_once_the_flows_are(folder: Path) -> None:
    """While flows load there is nothing to describe, which is said as for all else."""
    from flowlang.serve.routes import Service

    response = ask_application(Service(), "GET", "/openapi.json")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    assert ask_application(Service(), "GET", "/docs").status_code == 200


# The page that shows it


def test_the_page_needs_nothing_else(server: Server) -> None:
    """The page is one HTML document that names no other resource, and may load none."""
    response = server.client.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = response.text
    assert page.startswith("<!doctype html>")
    assert re.findall(r"""(?:https?:)?//[a-z]|\bsrc=|@import|url\(|\bimport\b""", page) == []


def test_the_page_shows_the_document(
    chromium: Browser, server: Server, document: dict[str, Any]
) -> None:
    """Each operation is there with its parameters, bodies and answers, in words of types."""
    chromium.open(f"{server.url}/docs")
    chromium.wait_for("!!document.querySelector('article')")
    heads = chromium.evaluate("[...document.querySelectorAll('article h2')].map(h => h.innerText)")
    assert heads == [
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
    ]
    told = chromium.evaluate("document.querySelector('#call_greet').innerText")
    for words in (
        "times",
        "required; int",
        "default 0.5; float",
        "application/json",
        "name: string",
    ):
        assert words in told
    assert "number[4]" in told
    told = chromium.evaluate("document.querySelector('#call_hinted').innerText")
    assert "{\n  data: bytes,\n  hint?: bytes\n} | {\n  item: {" in told
    told = chromium.evaluate("document.querySelector('#call_greet').innerText")
    assert "age?: integer,\n  spots: JSON number[2][4][]\n} | {" in told
    assert "unsupported-encoding" in chromium.evaluate(
        "document.querySelector('#errors').innerText"
    )
    assert chromium.nameless() == []
    assert chromium.complaints() == []
    asked = {url.removeprefix(server.url) for url in chromium.requested()} - {"data:,"}
    assert asked == {"/docs", "/openapi.json"}


def test_the_page_asks_for_the_token(chromium: Browser, folder: Path) -> None:
    """Where the server asks for a token the page does too, and keeps it as the page at `/` does."""
    path = write(folder / "echo.flow", "export flow echo: bytes -> bytes = pass\n")
    with serving(folder, str(path), environment={"FLOWLANG_TOKEN": "secret"}) as server:
        server.wait_ready()
        chromium.open(f"{server.url}/docs")
        chromium.wait_for("!document.querySelector('#access').hidden")
        chromium.type("#token", "secret")
        chromium.click("#access button")
        chromium.wait_for("!!document.querySelector('article')")
        assert chromium.evaluate("document.querySelector('#access').hidden")
        assert "Needs the token." in chromium.evaluate("document.body.innerText")
        chromium.open(server.url)
        chromium.wait_for("typeof flows != 'undefined' && flows.length == 1")
