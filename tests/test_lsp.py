"""The language server as an editor meets it: a process, spoken to over its stdin and stdout."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from lsprotocol import types as lsp
from pygls.lsp.client import LanguageClient

from flowlang.syntax.parse import MAX_SOURCE_BYTES
from tests.editor.programs import write_used
from tests.standins import furnish

ROOT = Path(__file__).parents[1]
SERVE = "from flowlang.editor.server import serve; serve()"
LIMIT_S = 60.0
SNIPPETS = lsp.ClientCapabilities(
    text_document=lsp.TextDocumentClientCapabilities(
        completion=lsp.CompletionClientCapabilities(
            completion_item=lsp.ClientCompletionItemOptions(snippet_support=True)
        )
    )
)


class Server:
    """A server process, and whoever waits for what it tells of a file."""

    def __init__(self) -> None:
        self.client = LanguageClient("test", "1")
        self.published: dict[str, asyncio.Queue[lsp.PublishDiagnosticsParams]] = {}

        @self.client.feature(lsp.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)  # type: ignore[untyped-decorator]
        def publish(params: lsp.PublishDiagnosticsParams) -> None:
            if params.uri in self.published:
                self.published[params.uri].put_nowait(params)

    async def start(self, capabilities: lsp.ClientCapabilities) -> lsp.InitializeResult:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        await self.client.start_io(sys.executable, "-c", SERVE, env=env)
        found = await self.client.initialize_async(lsp.InitializeParams(capabilities=capabilities))
        self.client.initialized(lsp.InitializedParams())
        return found

    async def stop(self) -> None:
        await self.client.shutdown_async(None)
        self.client.exit(None)
        await self.client.stop()  # type: ignore[no-untyped-call]


class Editor:
    """An editor with one open file."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.client = server.client
        self.uri = (folder / "app.flow").as_uri()
        self.text = ""
        self.version = 0
        self.published = server.published.setdefault(self.uri, asyncio.Queue())

    @property
    def document(self) -> lsp.TextDocumentIdentifier:
        return lsp.TextDocumentIdentifier(self.uri)

    def open(self, text: str) -> None:
        self.text = text
        item = lsp.TextDocumentItem(self.uri, "flow", self.version, text)
        self.client.text_document_did_open(lsp.DidOpenTextDocumentParams(item))

    def write(self, text: str) -> None:
        self.text = text
        self.version += 1
        self.client.text_document_did_change(
            lsp.DidChangeTextDocumentParams(
                lsp.VersionedTextDocumentIdentifier(self.version, self.uri),
                [lsp.TextDocumentContentChangeWholeDocument(text)],
            )
        )

    async def told(self) -> list[lsp.Diagnostic]:
        """The next diagnostics of the file."""
        return list((await self.published.get()).diagnostics)

    async def mended(self) -> None:
        """Wait until nothing is wrong: what is told first may still be of the text before."""
        while await self.told():
            pass

    def at(self, marked: str, inside: int = 0) -> lsp.Position:
        """The position of a text, counted in units of UTF-16."""
        before = self.text[: self.text.index(marked) + inside]
        last = before.rpartition("\n")[2]
        return lsp.Position(before.count("\n"), len(last.encode("utf-16-le")) // 2)

    def marked(self, extent: lsp.Range) -> str:
        """The text of a range."""
        lines = self.text.split("\n")
        assert extent.start.line == extent.end.line
        units = lines[extent.start.line].encode("utf-16-le")
        return units[extent.start.character * 2 : extent.end.character * 2].decode("utf-16-le")

    async def complete(self, at: lsp.Position, trigger: str | None = None) -> lsp.CompletionList:
        kind = lsp.CompletionTriggerKind.TriggerCharacter
        context = lsp.CompletionContext(kind, trigger) if trigger else None
        found = await self.client.text_document_completion_async(
            lsp.CompletionParams(self.document, at, context)
        )
        assert isinstance(found, lsp.CompletionList)
        return found

    async def act(self, extent: lsp.Range) -> list[lsp.CodeAction]:
        found = await self.client.text_document_code_action_async(
            lsp.CodeActionParams(self.document, extent, lsp.CodeActionContext([]))
        )
        return [action for action in found or [] if isinstance(action, lsp.CodeAction)]


Scene: TypeAlias = Callable[[Editor], Awaitable[None]]
Edit: TypeAlias = Callable[[Scene], None]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[asyncio.AbstractEventLoop, Server]]:
    """One server for all scenes that ask nothing special of it."""
    server = Server()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(server.start(lsp.ClientCapabilities()))
    yield loop, server
    loop.run_until_complete(server.stop())
    loop.close()


@pytest.fixture
def edit(shared: tuple[asyncio.AbstractEventLoop, Server], tmp_path: Path) -> Edit:
    """Plays a scene with an editor in a folder of its own."""
    loop, server = shared
    write_used(furnish(tmp_path))

    def play(scene: Scene) -> None:
        loop.run_until_complete(asyncio.wait_for(scene(Editor(server, tmp_path)), LIMIT_S))

    return play


def edit_alone(folder: Path, scene: Scene, capabilities: lsp.ClientCapabilities) -> None:
    """Play a scene with an editor that can more, or counts otherwise."""

    async def whole() -> None:
        server = Server()
        await server.start(capabilities)
        await asyncio.wait_for(scene(Editor(server, furnish(folder))), LIMIT_S)
        await server.stop()

    asyncio.run(whole())


def test_the_server_says_what_it_can() -> None:
    """Everything an editor can ask of it is announced, and positions count as in UTF-16."""

    async def scene() -> lsp.ServerCapabilities:
        server = Server()
        found = await server.start(lsp.ClientCapabilities())
        await server.stop()
        assert found.server_info is not None
        assert found.server_info.name == "flowlang"
        return found.capabilities

    can = asyncio.run(scene())
    assert can.position_encoding == "utf-16"
    assert can.completion_provider is not None
    assert set(can.completion_provider.trigger_characters or []) >= {".", "(", "="}
    for each in (can.hover_provider, can.definition_provider, can.document_symbol_provider):
        assert each
    assert can.document_formatting_provider
    assert can.code_action_provider


def test_diagnostics_follow_what_is_typed(edit: Edit) -> None:
    """Errors come with place, severity, slug and cause, and go when they are mended."""

    async def scene(editor: Editor) -> None:
        editor.open('flow net = trt("model.onnx")\nexport flow f = decode -> net -> nothing')
        found = {str(d.code): d for d in await editor.told()}
        assert set(found) == {"type-mismatch", "unknown-operator"}
        unknown = found["unknown-operator"]
        assert unknown.severity == lsp.DiagnosticSeverity.Error
        assert unknown.source == "flowlang"
        editor.write(
            editor.text.replace(" -> nothing", "").replace("decode -> net", "decode -> rgb")
        )
        await editor.mended()
        editor.write('decode -> resize(224) -> rgb -> trt("model.onnx")')
        (hint,) = await editor.told()
        assert hint.severity == lsp.DiagnosticSeverity.Information
        assert "help: normalize(imagenet)" in hint.message

    edit(scene)


def test_an_error_shows_its_cause(edit: Edit) -> None:
    """The other places of a diagnostic are related information, in this file or in another."""

    async def scene(editor: Editor) -> None:
        editor.open('decode -> trt("model.onnx")')
        (found,) = await editor.told()
        assert editor.marked(found.range) == 'trt("model.onnx")'
        (related,) = found.related_information or []
        assert related.location.uri == editor.uri
        assert editor.marked(related.location.range) == "decode"
        assert "image" in related.message

    edit(scene)


def test_errors_in_a_used_file_stand_where_it_is_used(edit: Edit, tmp_path: Path) -> None:
    """The `use` is marked, and the place in the other file is told."""
    (tmp_path / "other.flow").write_text("flow a = rgb\nflow b = nowhere\n")

    async def scene(editor: Editor) -> None:
        editor.open('use "other.flow" as other\nexport flow f = decode -> other.b')
        found = next(d for d in await editor.told() if d.code == "unknown-operator")
        assert editor.marked(found.range) == 'use "other.flow" as other'
        assert "other.flow:2:10" in found.message
        (related,) = found.related_information or []
        assert related.location.uri == (tmp_path / "other.flow").as_uri()
        assert related.location.range.start == lsp.Position(1, 9)

    edit(scene)


def test_wide_characters_do_not_shift_places(edit: Edit) -> None:
    """Behind emoji and ideographs, diagnostics, hovers and edits are still where they belong."""

    async def scene(editor: Editor) -> None:
        text = 'export flow f = decode -> ctc("\U0001f642\u4e16.txt") -> resise(3)  # \U0001f642\n'
        editor.open(text)
        found = {str(d.code): d for d in await editor.told()}
        assert editor.marked(found["missing-file"].range) == '"\U0001f642\u4e16.txt"'
        assert editor.marked(found["unknown-operator"].range) == "resise"
        (action,) = await editor.act(found["unknown-operator"].range)
        assert action.edit is not None
        ((change,),) = (action.edit.changes or {}).values()
        assert (editor.marked(change.range), change.new_text) == ("resise", "resize")
        editor.write(text.replace("resise(3)", "re"))
        listed = await editor.complete(editor.at("-> re", 5))
        item = next(i for i in listed.items if i.label == "resize")
        assert isinstance(item.text_edit, lsp.TextEdit)
        assert editor.marked(item.text_edit.range) == "re"
        hover = await editor.client.text_document_hover_async(
            lsp.HoverParams(editor.document, editor.at("ctc", 1))
        )
        assert hover is not None
        assert hover.range is not None
        assert editor.marked(hover.range) == "ctc"

    edit(scene)


def test_an_editor_may_count_in_bytes(tmp_path: Path) -> None:
    """Positions are in UTF-8 where the editor asks for that first."""
    general = lsp.GeneralClientCapabilities(position_encodings=["utf-8", "utf-16"])

    async def scene(editor: Editor) -> None:
        before = 'flow f = ctc("\U0001f642\U0001f642.txt") -> '
        editor.open(f"{before}nothing")
        found = next(d for d in await editor.told() if d.code == "unknown-operator")
        assert found.range.start.character == len(before.encode())

    edit_alone(tmp_path, scene, lsp.ClientCapabilities(general=general))


def test_completion_answers_in_a_broken_line(tmp_path: Path) -> None:
    """Items come with what they replace; calls are snippets where the editor knows them."""

    async def scene(editor: Editor) -> None:
        editor.open("export flow f = decode -> ")
        listed = {i.label: i for i in (await editor.complete(editor.at("-> ", 3), " ")).items}
        assert listed["trt"].insert_text_format == lsp.InsertTextFormat.Snippet
        assert isinstance(listed["trt"].text_edit, lsp.TextEdit)
        assert listed["trt"].text_edit.new_text == "trt($0)"
        assert (listed["rgb"].sort_text or "") < (listed["softmax"].sort_text or "")
        editor.write("export flow f = decode -> .")
        listed = {i.label: i for i in (await editor.complete(editor.at("-> .", 4), ".")).items}
        assert set(listed) == {"height", "width"}
        editor.write("export flow f = decode ")
        assert not (await editor.complete(editor.at("decode ", 7), " ")).items

    edit_alone(tmp_path, scene, SNIPPETS)


def test_an_editor_without_snippets_gets_plain_text(edit: Edit) -> None:
    """Nobody is left with a `$0` in the program."""

    async def scene(editor: Editor) -> None:
        editor.open("export flow f = decode -> ")
        for item in (await editor.complete(editor.at("-> ", 3))).items:
            assert isinstance(item.text_edit, lsp.TextEdit)
            assert "$" not in item.text_edit.new_text

    edit(scene)


def test_quick_fixes_are_those_of_the_place(edit: Edit) -> None:
    """A fix is offered at its own diagnostic, and the sure ones are preferred."""

    async def scene(editor: Editor) -> None:
        editor.open("export flow f = decode -> resise(3)\nflow g = decode rgb\n")
        await editor.told()
        (first,) = await editor.act(lsp.Range(editor.at("resise"), editor.at("resise", 3)))
        (second,) = await editor.act(lsp.Range(editor.at("rgb"), editor.at("rgb")))
        assert (first.title, second.title) == ("write `resize`", "write `decode -> rgb`")
        assert first.is_preferred
        assert first.kind == lsp.CodeActionKind.QuickFix
        assert first.diagnostics is not None
        assert first.diagnostics[0].code == "unknown-operator"
        assert not await editor.act(lsp.Range(editor.at("export"), editor.at("export")))

    edit(scene)


def test_definitions_are_found_in_this_file_and_others(edit: Edit, tmp_path: Path) -> None:
    """A flow leads to its name, a Python operator to its function, a model to its file."""

    async def scene(editor: Editor) -> None:
        editor.open(
            'use "post.py" as post\nflow net = trt("model.onnx") -> ctc("keys.txt")\n'
            "export flow f = net -> post.shout\n"
        )
        await editor.told()

        async def leads(marked: str, inside: int) -> lsp.Location:
            found = await editor.client.text_document_definition_async(
                lsp.DefinitionParams(editor.document, editor.at(marked, inside))
            )
            assert isinstance(found, lsp.Location)
            return found

        assert editor.marked((await leads("net ->", 1)).range) == "net"
        shout = await leads("post.shout", 6)
        assert shout.uri == (tmp_path / "post.py").as_uri()
        assert shout.range.start == lsp.Position(11, 4)
        assert (await leads('"model.onnx"', 3)).uri == (tmp_path / "model.onnx").as_uri()

    edit(scene)


def test_definitions_are_found_behind_other_line_ends(edit: Edit, tmp_path: Path) -> None:
    """Lines of a file from Windows are counted as the editor counts them."""
    (tmp_path / "common.flow").write_bytes(b"# a\r\n# b\r\nflow ready = rgb\r\n")

    async def scene(editor: Editor) -> None:
        editor.open('use "common.flow" as common\nexport flow f = decode -> common.ready')
        await editor.told()
        found = await editor.client.text_document_definition_async(
            lsp.DefinitionParams(editor.document, editor.at("common.ready", 8))
        )
        assert isinstance(found, lsp.Location)
        assert found.range == lsp.Range(lsp.Position(2, 5), lsp.Position(2, 10))

    edit(scene)


def test_the_outline_lists_flows_with_their_values(edit: Edit) -> None:
    """Symbols nest: the lets of a flow are inside it."""

    async def scene(editor: Editor) -> None:
        editor.open("param a = 3\nexport flow f {\n  let b = in -> decode\n  return b\n}\n")
        found = await editor.client.text_document_document_symbol_async(
            lsp.DocumentSymbolParams(editor.document)
        )
        first, second = [s for s in found or [] if isinstance(s, lsp.DocumentSymbol)]
        assert (first.name, first.kind) == ("a", lsp.SymbolKind.Constant)
        assert [child.name for child in second.children or []] == ["b"]
        assert editor.marked(second.selection_range) == "f"

    edit(scene)


def test_formatting_touches_only_what_changes(edit: Edit) -> None:
    """The edit is between the first and last line that differ; a broken file is left alone."""

    async def scene(editor: Editor) -> None:
        async def formatted() -> Any:
            return await editor.client.text_document_formatting_async(
                lsp.DocumentFormattingParams(editor.document, lsp.FormattingOptions(2, True))
            )

        editor.open("flow a = rgb\nflow b=decode->rgb\nflow c = bgr\n")
        (change,) = await formatted()
        assert (change.new_text, change.range.start, change.range.end) == (
            "flow b = decode -> rgb\n",
            lsp.Position(1, 0),
            lsp.Position(2, 0),
        )
        editor.write("flow a = rgb\n")
        assert not await formatted()
        editor.write("flow a = = rgb\n")
        assert await formatted() is None

    edit(scene)


def test_closing_takes_the_diagnostics_back(edit: Edit) -> None:
    """A closed file has nothing wrong, and asking about it is no error."""

    async def scene(editor: Editor) -> None:
        editor.open("decode -> nothing")
        assert await editor.told()
        editor.client.text_document_did_close(lsp.DidCloseTextDocumentParams(editor.document))
        assert await editor.told() == []
        assert not (await editor.complete(lsp.Position(0, 3))).items
        assert not await editor.act(lsp.Range(lsp.Position(0, 0), lsp.Position(0, 9)))

    edit(scene)


def test_a_saved_file_is_looked_at_again_by_those_that_use_it(edit: Edit, tmp_path: Path) -> None:
    """What another file now says is found out when it is saved."""

    async def scene(editor: Editor) -> None:
        editor.open('use "common.flow" as common\nexport flow f = decode -> common.ready')
        assert {d.code for d in await editor.told()} == {"unknown-operator"}
        (tmp_path / "common.flow").write_text("flow ready = rgb\n")
        other = lsp.TextDocumentIdentifier((tmp_path / "common.flow").as_uri())
        editor.client.text_document_did_save(lsp.DidSaveTextDocumentParams(other))
        await editor.mended()

    edit(scene)


@pytest.mark.parametrize(
    ("file", "mention", "text"),
    [
        ("common.flow", "common.ready", "flow ready = rgb\n"),
        ("post.py", "post.ready", "def ready(image: bytes) -> str:\n    return ''\n"),
    ],
)
def test_a_used_file_is_read_as_it_is_open(
    edit: Edit, tmp_path: Path, file: str, mention: str, text: str
) -> None:
    """What is typed into another file counts before it is saved, and no more once it is closed."""
    alias = mention.partition(".")[0]
    uri = (tmp_path / file).as_uri()

    async def scene(editor: Editor) -> None:
        editor.open(f'use "{file}" as {alias}\nexport flow f: bytes -> str = {mention}')
        assert {str(d.code) for d in await editor.told()} == {"unknown-operator"}
        editor.client.text_document_did_open(
            lsp.DidOpenTextDocumentParams(lsp.TextDocumentItem(uri, "flow", 1, text))
        )
        while "unknown-operator" in {str(d.code) for d in await editor.told()}:
            pass
        editor.client.text_document_did_close(
            lsp.DidCloseTextDocumentParams(lsp.TextDocumentIdentifier(uri))
        )
        while "unknown-operator" not in {str(d.code) for d in await editor.told()}:
            pass

    edit(scene)


def test_an_editor_that_can_be_asked_watches_files() -> None:
    """The server registers for changes of the files that programs are checked with."""
    watched = lsp.DidChangeWatchedFilesClientCapabilities(dynamic_registration=True)
    workspace = lsp.WorkspaceClientCapabilities(did_change_watched_files=watched)

    async def scene() -> lsp.Registration:
        server = Server()
        asked: asyncio.Future[lsp.RegistrationParams] = asyncio.get_running_loop().create_future()

        @server.client.feature(lsp.CLIENT_REGISTER_CAPABILITY)  # type: ignore[untyped-decorator]
        def register(params: lsp.RegistrationParams) -> None:
            asked.set_result(params)

        await server.start(lsp.ClientCapabilities(workspace=workspace))
        (registration,) = (await asyncio.wait_for(asked, LIMIT_S)).registrations
        await server.stop()
        return registration

    found = asyncio.run(scene())
    assert found.method == lsp.WORKSPACE_DID_CHANGE_WATCHED_FILES
    assert "**/*.py" in str(found.register_options)


def test_a_file_of_any_size_and_content_is_survived(edit: Edit) -> None:
    """What is no flow at all gets its message, and the server goes on answering."""

    async def scene(editor: Editor) -> None:
        editor.open("#" * (MAX_SOURCE_BYTES + 1))
        assert {d.code for d in await editor.told()} == {"too-large"}
        assert not (await editor.complete(lsp.Position(0, 50))).is_incomplete
        editor.write("(" * 5000)
        assert {d.code for d in await editor.told()} == {"too-deep"}
        editor.write("\0\r\r\n\u2028decode")
        assert await editor.told()
        editor.write("decode -> rgb")
        await editor.mended()

    edit(scene)


def test_python_is_never_executed(edit: Edit, tmp_path: Path) -> None:
    """A file that writes when it is run is only read, whatever is asked."""

    async def scene(editor: Editor) -> None:
        editor.open('use "post.py" as post\nexport flow f: str -> str = post.shout(')
        await editor.told()
        assert await editor.complete(editor.at("shout(", 6), "(")
        await editor.client.text_document_hover_async(
            lsp.HoverParams(editor.document, editor.at("post.shout", 7))
        )

    edit(scene)
    assert not (tmp_path / "executed").exists()
