"""The language server: `flowlang lsp`, spoken to over stdin and stdout.

Layer 4, and the only file importing pygls and lsprotocol. It turns the protocol's questions into
calls of this package and their answers back, and knows nothing of the language. A changed text is
read at once and checked in a thread when typing pauses, so no answer waits for a check.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lsprotocol import types as lsp
from pygls.lsp.server import LanguageServer
from pygls.uris import from_fs_path, to_fs_path

from flowlang import __version__
from flowlang.diagnostics import CompileError, Diagnostic, Source, Span
from flowlang.editor.completion import complete
from flowlang.editor.document import Document
from flowlang.editor.hover import hover
from flowlang.editor.lines import Lines
from flowlang.editor.mending import mend
from flowlang.editor.navigation import Place, Symbol, definition, symbols
from flowlang.editor.offers import Completion
from flowlang.syntax.format import format_program
from flowlang.syntax.parse import parse

PAUSE_S = 0.15  # without a key press, before a text is checked
LONG_PAUSE = 3  # times as long as checking takes, where that is more
SWITCH_S = 0.001  # how long an answer waits for a check to give the interpreter up
GARBAGE = 50_000  # objects made before garbage is looked for, which stops all answers meanwhile
WATCHED = ("flow", "py", "onnx", "txt")  # endings of the files that a flow is checked with
TRIGGERS = (".", "(", "=", " ", '"', "/", "{", "<")
# After a blank, only what cannot be meant otherwise is offered unasked.
AFTER_BLANK = frozenset({"operator", "flow", "value", "type", "word", "parameter"})

_SEVERITY = {
    "error": lsp.DiagnosticSeverity.Error,
    "warning": lsp.DiagnosticSeverity.Warning,
    "hint": lsp.DiagnosticSeverity.Information,  # editors hide the protocol's own hints
}
_KIND = {
    "operator": lsp.CompletionItemKind.Function,
    "flow": lsp.CompletionItemKind.Module,
    "value": lsp.CompletionItemKind.Variable,
    "param": lsp.CompletionItemKind.Constant,
    "parameter": lsp.CompletionItemKind.Property,
    "setting": lsp.CompletionItemKind.Unit,
    "type": lsp.CompletionItemKind.Struct,
    "field": lsp.CompletionItemKind.Field,
    "word": lsp.CompletionItemKind.EnumMember,
    "keyword": lsp.CompletionItemKind.Keyword,
    "file": lsp.CompletionItemKind.File,
    "folder": lsp.CompletionItemKind.Folder,
    "module": lsp.CompletionItemKind.Module,
}
_SYMBOL = {
    "flow": lsp.SymbolKind.Function,
    "param": lsp.SymbolKind.Constant,
    "type": lsp.SymbolKind.Struct,
    "module": lsp.SymbolKind.Module,
    "schedule": lsp.SymbolKind.Namespace,
    "value": lsp.SymbolKind.Variable,
}


class FlowServer(LanguageServer):
    """The open documents, and the checks that are due."""

    def __init__(self) -> None:
        # The whole text at each change: a flow is small, and positions in it are counted once.
        super().__init__(
            "flowlang", __version__, text_document_sync_kind=lsp.TextDocumentSyncKind.Full
        )
        self.documents: dict[str, Document] = {}
        self.texts: dict[str, str] = {}  # of all open files, by their real paths
        self._due: dict[str, asyncio.TimerHandle] = {}
        self._running: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._checks = ThreadPoolExecutor(1, "check")

    def open(self, uri: str, text: str) -> None:
        self._take(uri, text)
        if uri.endswith(".py"):
            return
        encoding = lsp.PositionEncodingKind(self.server_capabilities.position_encoding or "utf-16")
        path = to_fs_path(uri) or os.path.abspath("untitled.flow")
        self.documents[uri] = Document(path, text, encoding.value, self.texts)
        self.check_soon(uri, 0.0)

    def change(self, uri: str, text: str) -> None:
        document = self.documents.get(uri)
        if document is None:
            self.open(uri, text)
            return
        self._take(uri, text)
        document.change(text)
        self.check_soon(uri, PAUSE_S)

    def close(self, uri: str) -> None:
        self._take(uri, None)
        if self.documents.pop(uri, None) is not None:
            self._forget(uri)
            self._publish(uri, [])

    def _take(self, uri: str, text: str | None) -> None:
        """Note what an open file holds now, None when it is closed; who uses it is checked."""
        path = to_fs_path(uri)
        if path is None:
            return
        key = os.path.realpath(path)
        if text is None:
            self.texts.pop(key, None)
        else:
            self.texts[key] = text
        for other, document in self.documents.items():
            if other != uri and document.uses(key):
                self.check_soon(other, PAUSE_S)

    def check_soon(self, uri: str, after_s: float) -> None:
        """Check a document when nothing has changed for a while."""
        self._forget(uri)
        loop = asyncio.get_running_loop()
        self._due[uri] = loop.call_later(after_s, self._pause, uri)

    def _forget(self, uri: str) -> None:
        due = self._due.pop(uri, None)
        if due is not None:
            due.cancel()

    def _pause(self, uri: str) -> None:
        """Typing has paused: tell what is known, and check, which for a long file waits longer.

        A check takes the interpreter from the answer to the next key press.
        """
        document = self.documents[uri]
        more_s = LONG_PAUSE * document.check_s - PAUSE_S
        if more_s > 0:
            self._start(self._tell_known(uri, document))
        loop = asyncio.get_running_loop()
        self._due[uri] = loop.call_later(max(more_s, 0.0), self._start_check, uri)

    async def _tell_known(self, uri: str, document: Document) -> None:
        loop, draft = asyncio.get_running_loop(), document.draft
        found = await loop.run_in_executor(self._checks, document.known)
        if self.documents.get(uri) is document and draft is document.draft:
            self._show(uri, document, found)

    def _start(self, task: Coroutine[None, None, None]) -> None:
        started = asyncio.get_running_loop().create_task(task)
        self._tasks.add(started)
        started.add_done_callback(self._tasks.discard)

    def _start_check(self, uri: str) -> None:
        if uri in self._running:
            self.check_soon(uri, PAUSE_S)
            return
        self._forget(uri)
        self._running.add(uri)
        self._start(self._check(uri, self.documents[uri]))

    async def _check(self, uri: str, document: Document) -> None:
        loop = asyncio.get_running_loop()
        try:
            draft, findings = await loop.run_in_executor(self._checks, document.check)
        finally:
            self._running.discard(uri)
        document.accept(draft, findings)
        if self.documents.get(uri) is document and draft is document.draft:
            self._show(uri, document, findings.diagnostics)

    def _show(self, uri: str, document: Document, found: Iterable[Diagnostic]) -> None:
        self._publish(uri, [shown for d in found if (shown := diagnostic(document, uri, d))])

    def _publish(self, uri: str, found: list[lsp.Diagnostic]) -> None:
        self.text_document_publish_diagnostics(lsp.PublishDiagnosticsParams(uri, found))


server = FlowServer()


# Places


def position(lines: Lines, offset: int) -> lsp.Position:
    return lsp.Position(*lines.position(offset))


def extent(lines: Lines, start: int, end: int) -> lsp.Range:
    return lsp.Range(position(lines, start), position(lines, end))


def offset_of(document: Document, at: lsp.Position) -> int:
    return document.lines.offset(at.line, at.character)


def location(document: Document, uri: str, span: Span) -> lsp.Location | None:
    """A span of the document, or of another file that exists."""
    place = document.place(span)
    if place is not None:
        return lsp.Location(uri, extent(document.lines, *place))
    if not os.path.isfile(span.source.name):
        return None
    lines = Lines(span.source.text, document.encoding)
    other = from_fs_path(os.path.abspath(span.source.name)) or ""
    return lsp.Location(other, extent(lines, span.start, span.end))


# Diagnostics


def diagnostic(document: Document, uri: str, found: Diagnostic) -> lsp.Diagnostic | None:
    """A diagnostic as the protocol has it; one in a file that is used stands where it is used."""
    place = document.place(found.span)
    message = _message(found)
    if place is None:
        place = _use_of(document, found.span.source)
        message = f"{found.span}: {message}"
    related = [
        lsp.DiagnosticRelatedInformation(where, label.text or "here")
        for label in (*found.secondary, *([] if document.place(found.span) else [found.primary]))
        if (where := location(document, uri, label.span))
    ]
    return lsp.Diagnostic(
        range=extent(document.lines, *place),
        message=message,
        severity=_SEVERITY[found.severity],
        code=found.slug,
        source="flowlang",
        related_information=related or None,
    )


def _message(found: Diagnostic) -> str:
    lines = [found.message]
    if found.primary.text:
        lines.append(found.primary.text)
    if found.help:
        lines.append(f"help: {found.help}")
    if found.note:
        lines.append(f"note: {found.note}")
    return "\n".join(lines)


def _use_of(document: Document, source: Source) -> tuple[int, int]:
    """Where a file is named that a diagnostic lies in; the start, where it is used by another."""
    for item, start in document.declarations():
        path = getattr(getattr(item, "path", None), "value", None)
        if path and os.path.realpath(document.folder / path) == os.path.realpath(source.name):
            return start + item.span.start, start + item.span.end
    return 0, 0


@server.feature(lsp.TEXT_DOCUMENT_DID_OPEN)
def did_open(ls: FlowServer, params: lsp.DidOpenTextDocumentParams) -> None:
    ls.open(params.text_document.uri, params.text_document.text)


@server.feature(lsp.TEXT_DOCUMENT_DID_CHANGE)
def did_change(ls: FlowServer, params: lsp.DidChangeTextDocumentParams) -> None:
    uri = params.text_document.uri
    ls.change(uri, ls.workspace.get_text_document(uri).source)


@server.feature(lsp.TEXT_DOCUMENT_DID_SAVE)
def did_save(ls: FlowServer, params: lsp.DidSaveTextDocumentParams) -> None:
    for uri in ls.documents:  # another one may use the file
        ls.check_soon(uri, 0.0)


@server.feature(lsp.INITIALIZED)
def initialized(ls: FlowServer, params: lsp.InitializedParams) -> None:
    """Ask to be told of changed files, where the editor can be asked."""
    workspace = ls.client_capabilities.workspace
    asked = workspace.did_change_watched_files if workspace else None
    if asked and asked.dynamic_registration:
        watchers = [lsp.FileSystemWatcher(f"**/*.{ending}") for ending in WATCHED]
        options = lsp.DidChangeWatchedFilesRegistrationOptions(watchers)
        method = lsp.WORKSPACE_DID_CHANGE_WATCHED_FILES
        ls.client_register_capability(
            lsp.RegistrationParams([lsp.Registration(method, method, options)])
        )


@server.feature(lsp.WORKSPACE_DID_CHANGE_WATCHED_FILES)
def did_change_files(ls: FlowServer, params: lsp.DidChangeWatchedFilesParams) -> None:
    for uri in ls.documents:
        ls.check_soon(uri, PAUSE_S)


@server.feature(lsp.TEXT_DOCUMENT_DID_CLOSE)
def did_close(ls: FlowServer, params: lsp.DidCloseTextDocumentParams) -> None:
    ls.close(params.text_document.uri)


# Completion


@server.feature(
    lsp.TEXT_DOCUMENT_COMPLETION, lsp.CompletionOptions(trigger_characters=list(TRIGGERS))
)
def completion(ls: FlowServer, params: lsp.CompletionParams) -> lsp.CompletionList:
    document = ls.documents.get(params.text_document.uri)
    if document is None:
        return lsp.CompletionList(False, [])
    offset = offset_of(document, params.position)
    found = complete(document, offset)
    is_unasked = params.context is not None and params.context.trigger_character == " "
    if is_unasked and not {c.kind for c in found.items} & AFTER_BLANK:
        return lsp.CompletionList(False, [])
    typed = extent(document.lines, found.start, offset)
    has_snippets = _has_snippets(ls.client_capabilities)
    items = [_item(document.lines, c, typed, offset, has_snippets) for c in found.items]
    return lsp.CompletionList(not found.is_whole, items)


def _has_snippets(capabilities: lsp.ClientCapabilities) -> bool:
    asked = capabilities.text_document and capabilities.text_document.completion
    item = asked.completion_item if asked else None
    return bool(item and item.snippet_support)


def _item(
    lines: Lines, found: Completion, typed: lsp.Range, offset: int, has_snippets: bool
) -> lsp.CompletionItem:
    text, is_snippet = found.insert or found.label, "$0" in found.insert
    if is_snippet and not has_snippets:
        text, is_snippet = found.label, False
    snippet, plain = lsp.InsertTextFormat.Snippet, lsp.InsertTextFormat.PlainText
    replaced = typed if found.start is None else extent(lines, found.start, offset)
    return lsp.CompletionItem(
        label=found.label,
        kind=_KIND[found.kind],
        detail=found.detail or None,
        documentation=lsp.MarkupContent(lsp.MarkupKind.Markdown, found.doc) if found.doc else None,
        sort_text=f"{found.rank}{found.label}",
        insert_text_format=snippet if is_snippet else plain,
        text_edit=lsp.TextEdit(replaced, text),
    )


# Looking at things


@server.feature(lsp.TEXT_DOCUMENT_HOVER)
def on_hover(ls: FlowServer, params: lsp.HoverParams) -> lsp.Hover | None:
    document = ls.documents.get(params.text_document.uri)
    found = hover(document, offset_of(document, params.position)) if document else None
    if document is None or found is None:
        return None
    text, start, end = found
    content = lsp.MarkupContent(lsp.MarkupKind.Markdown, text)
    return lsp.Hover(content, extent(document.lines, start, end))


@server.feature(lsp.TEXT_DOCUMENT_DEFINITION)
def on_definition(ls: FlowServer, params: lsp.DefinitionParams) -> lsp.Location | None:
    uri = params.text_document.uri
    document = ls.documents.get(uri)
    found = definition(document, offset_of(document, params.position)) if document else None
    if document is None or found is None:
        return None
    if found.path is None:
        return lsp.Location(uri, extent(document.lines, found.start, found.end))
    return _elsewhere(document, found, found.path)


def _elsewhere(document: Document, place: Place, path: Path) -> lsp.Location:
    try:
        text = document.text_of(path) if place.end else ""
    except OSError:
        text = ""
    uri = from_fs_path(str(path.resolve())) or ""
    return lsp.Location(uri, extent(Lines(text, document.encoding), place.start, place.end))


@server.feature(lsp.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
def document_symbol(ls: FlowServer, params: lsp.DocumentSymbolParams) -> list[lsp.DocumentSymbol]:
    document = ls.documents.get(params.text_document.uri)
    return [_symbol(document.lines, s) for s in symbols(document)] if document else []


def _symbol(lines: Lines, found: Symbol) -> lsp.DocumentSymbol:
    return lsp.DocumentSymbol(
        name=found.name,
        detail=found.detail or None,
        kind=_SYMBOL[found.kind],
        range=extent(lines, found.start, found.end),
        selection_range=extent(lines, found.name_start, found.name_end),
        children=[_symbol(lines, child) for child in found.children] or None,
    )


# Edits


@server.feature(
    lsp.TEXT_DOCUMENT_CODE_ACTION,
    lsp.CodeActionOptions(code_action_kinds=[lsp.CodeActionKind.QuickFix]),
)
def code_action(ls: FlowServer, params: lsp.CodeActionParams) -> list[lsp.CodeAction]:
    uri = params.text_document.uri
    document = ls.documents.get(uri)
    if document is None:
        return []
    start, end = (offset_of(document, p) for p in (params.range.start, params.range.end))
    found = []
    for each in document.findings.diagnostics:
        place, edit = document.place(each.span), mend(each)
        where = document.place(edit.span) if edit else None
        if place is None or edit is None or where is None or place[0] > end or place[1] < start:
            continue
        change = lsp.TextEdit(extent(document.lines, *where), edit.text)
        shown = diagnostic(document, uri, each)
        found.append(
            lsp.CodeAction(
                title=edit.title,
                kind=lsp.CodeActionKind.QuickFix,
                diagnostics=[shown] if shown else None,
                is_preferred=edit.is_preferred,
                edit=lsp.WorkspaceEdit(changes={uri: [change]}),
            )
        )
    return found


@server.feature(lsp.TEXT_DOCUMENT_FORMATTING)
async def formatting(
    ls: FlowServer, params: lsp.DocumentFormattingParams
) -> list[lsp.TextEdit] | None:
    document = ls.documents.get(params.text_document.uri)
    if document is None:
        return None
    loop, lines = asyncio.get_running_loop(), document.lines
    text = await loop.run_in_executor(None, _formatted, document.draft.source)
    if text is None:
        return None
    start, end, new = _changed(lines.text, text)
    return [lsp.TextEdit(extent(lines, start, end), new)] if start < end or new else []


def _formatted(source: Source) -> str | None:
    """The canonical layout of a text, or None where it cannot be read."""
    try:
        return format_program(parse(source))
    except CompileError:
        return None


def _changed(old: str, new: str) -> tuple[int, int, str]:
    """The stretch of whole lines that differs, so that a cursor outside of it stays in place."""
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    start = sum(map(len, before[:head]))
    end = len(old) - sum(map(len, before[len(before) - tail :]))
    return start, end, "".join(after[head : len(after) - tail])


def serve() -> None:
    """Answer an editor over stdin and stdout until it says goodbye."""
    sys.setswitchinterval(SWITCH_S)
    gc.freeze()
    gc.set_threshold(GARBAGE)
    server.start_io()
