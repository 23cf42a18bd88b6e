"""Colours for flow programs wherever Pygments writes them: documentation, `pygmentize`, notebooks.

Layer 4, and the only file importing pygments, which finds the lexer by the entry point in
pyproject.toml. It reads any text, also a broken one; whether a program is right, it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pygments.lexer import RegexLexer, bygroups, default, include, words
from pygments.token import (
    Comment,
    Keyword,
    Name,
    Number,
    Operator,
    Punctuation,
    String,
    Text,
    Whitespace,
)

from flowlang.plan.ops import OPS
from flowlang.plan.types import COLOURS, DTYPES, NAMED

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_DECLARATION = r"(?=(?:export|flow|param|type|use|schedule)\b)"
# A name may be written x4 too; it is a count of copies only right behind what is copied.
_COPIES = r"(?<=[A-Za-z0-9_)\]}\"%])(\s*)(x[1-9][0-9]*)(?![A-Za-z0-9_])"
_SAID_OF_ARRAYS = tuple(
    word for word in (*DTYPES, *COLOURS, "hwc", "undecided") if word not in NAMED
)
_BRACKETS: dict[str, list[Any]] = {
    name: [(closer, Punctuation, "#pop"), include("expression")]
    for name, closer in (("braces", r"\}"), ("squares", r"\]"))
}


class FlowlangLexer(RegexLexer):  # type: ignore[misc]
    """Pygments' lexer of flow programs."""

    name = "flowlang"
    aliases: ClassVar = ["flowlang", "flow"]
    filenames: ClassVar = ["*.flow"]
    mimetypes: ClassVar = ["text/x-flowlang"]
    tokens: ClassVar = {
        "root": [
            (
                r"\b(flowlang)(\s+)([0-9]+)",
                bygroups(Keyword.Namespace, Whitespace, Number.Integer),
            ),
            include("declaration"),
            include("expression"),
        ],
        "blank": [
            (r"\s+", Whitespace),
            (r"##[^\n]*", String.Doc),
            (r"#[^\n]*", Comment.Single),
        ],
        "declaration": [
            (r"\bexport\b", Keyword.Declaration),
            (
                rf"\b(flow)(\s+)({_NAME})",
                bygroups(Keyword.Declaration, Whitespace, Name.Function),
                "flow",
            ),
            (
                rf"\b(param)(\s+)({_NAME})",
                bygroups(Keyword.Declaration, Whitespace, Name.Constant),
                "param",
            ),
            (
                rf"\b(type)(\s+)({_NAME})(\s*)(=?)",
                bygroups(Keyword.Declaration, Whitespace, Name.Class, Whitespace, Operator),
                "type",
            ),
            (r"\buse\b", Keyword.Namespace, "use"),
            (
                rf"\b(schedule)\b(?:(\s+)({_NAME}))?",
                bygroups(Keyword.Declaration, Whitespace, Name.Label),
                "schedule",
            ),
        ],
        "use": [
            include("blank"),
            (r'"', String.Double, "string"),
            (
                rf"\b(as)(\s+)({_NAME})",
                bygroups(Keyword.Namespace, Whitespace, Name.Namespace),
                "#pop",
            ),
            default("#pop"),
        ],
        # From a flow's name to its `=` or its body; what stands there are types and inputs.
        "flow": [
            include("blank"),
            (r"->", Operator, "type"),
            (r":", Punctuation, "type"),
            (r"\(", Punctuation, "inputs"),
            (r"=", Operator, "#pop"),
            default("#pop"),
        ],
        "inputs": [
            include("blank"),
            (
                rf"({_NAME})(\s*)(:)",
                bygroups(Name.Variable, Whitespace, Punctuation),
                "type",
            ),
            (r",", Punctuation),
            (r"=", Operator, "input-default"),
            (r"\)", Punctuation, "#pop"),
            default("#pop"),
        ],
        "input-default": [(r"(?=[,)])", Text, "#pop"), include("expression")],
        "param": [
            include("blank"),
            (r":", Punctuation, "type"),
            (r"=", Operator, "#pop"),
            default("#pop"),
        ],
        "schedule": [
            include("blank"),
            (r"\{", Punctuation, ("#pop", "entries")),
            default("#pop"),
        ],
        "entries": [
            (r"\}", Punctuation, "#pop"),
            (_DECLARATION, Text, "#pop"),
            (_COPIES, bygroups(Whitespace, Number.Other)),
            include("blank"),
            (rf"{_NAME}(?:\.{_NAME})*", Name.Function),
            include("expression"),
        ],
        "type": [
            include("blank"),
            (r"\{", Punctuation, ("#pop", "type-end", "type-fields")),
            (
                words((*NAMED, "image", "tensor", "list"), r"\b", r"\b(?!\.)"),
                Keyword.Type,
                ("#pop", "type-end"),
            ),
            (rf"{_NAME}(?:\.{_NAME})*", Name.Class, ("#pop", "type-end")),
            default("#pop"),
        ],
        "type-end": [
            (r"(\s*)(<)", bygroups(Whitespace, Punctuation), "type-arguments"),
            (r"(\s*)(\?)(?!\?)", bygroups(Whitespace, Operator), "#pop"),
            default("#pop"),
        ],
        "type-arguments": [
            include("blank"),
            (r">", Punctuation, "#pop"),
            (r",", Punctuation),
            (r"(?:[0-9]+|\?)(?:x(?:[0-9]+|\?))*", Number.Other),
            (words(_SAID_OF_ARRAYS, r"\b", r"\b"), Keyword.Constant),
            (rf"(?={_NAME}|\{{)", Text, "type"),
            default("#pop"),
        ],
        "type-fields": [
            include("blank"),
            (r"\}", Punctuation, "#pop"),
            (rf"({_NAME})(\s*)(:)", bygroups(Name.Attribute, Whitespace, Punctuation), "type"),
            (r",", Punctuation),
            default("#pop"),
        ],
        "expression": [
            (_COPIES, bygroups(Whitespace, Number.Other)),
            include("blank"),
            include("declaration"),
            (r'"', String.Double, "string"),
            (
                rf"\b(let)(\s+)({_NAME})",
                bygroups(Keyword.Declaration, Whitespace, Name.Variable),
            ),
            (r"\b(as)\b", Keyword, "type"),
            (r"\b(if|then|else|match|return)\b(\s*)", bygroups(Keyword, Whitespace)),
            (r"\b(and|or|not)\b(\s*)", bygroups(Operator.Word, Whitespace)),
            (r"\b(true|false)\b", Keyword.Constant),
            (r"\bin\b", Name.Builtin.Pseudo),
            (r"\b(?:flowlang|let|flow|param|type)\b", Keyword),
            (r"\b[0-9]+(?:\.[0-9]+)?(?:us|ms|s|KiB|MiB|GiB|%)(?![A-Za-z0-9_])", Number.Other),
            (r"\b[0-9]+(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)", Number.Float),
            (r"\b[0-9]+", Number.Integer),
            (r"->|\?\?|=>|\.\.\.?|[=!<>]=|[-+*/<>|=?]", Operator),
            (r"\(", Punctuation, "arguments"),
            (r"\{", Punctuation, "fields"),
            (r"\[", Punctuation, "squares"),
            include("name"),
            (r"[,:)\]}]", Punctuation),
        ],
        "name": [
            (rf"\.{_NAME}", Name.Property),
            (words(tuple(OPS), r"\b", r"\b(?!\s*\.\w)"), Name.Builtin),
            (rf"{_NAME}(?=\()", Name.Function),
            (rf"{_NAME}(?=\.[A-Za-z_])", Name.Namespace),
            (_NAME, Name),
        ],
        "arguments": [
            (r"\)", Punctuation, "#pop"),
            (
                rf"({_NAME})(\s*)(=)(?![=>])",
                bygroups(Name.Attribute, Whitespace, Operator),
            ),
            include("expression"),
        ],
        "fields": [
            (rf"({_NAME})(\s*)(:)", bygroups(Name.Attribute, Whitespace, Punctuation)),
            include("braces"),
        ],
        **_BRACKETS,
        "string": [
            (r'\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4}|\{\{|\}\}', String.Escape),
            (rf"\{{{_NAME}\}}", String.Interpol),
            (r'[^"\\{}\n]+|\\.|[\\{}]', String.Double),
            (r'"', String.Double, "#pop"),
            default("#pop"),
        ],
    }

    def get_tokens_unprocessed(
        self, text: str, stack: Any = ("root",)
    ) -> Iterator[tuple[int, Any, str]]:
        """The tokens of a text with their places, but for the empty ones of lookaheads."""
        for token in super().get_tokens_unprocessed(text, stack):
            if token[2]:
                yield token
