"""How complaints name the tokens of the grammar, and show text on one line.

Layer 1.
"""

from __future__ import annotations

from flowlang.diagnostics import Span

STARTS_STAGE = frozenset({"NAME", "LBRACE", "STRING", "IF", "MATCH", "FIELD", "LSQB"})

WORDS = {
    "ARROW": "`->`",
    "GIVES": "`=>`",
    "EQUAL": "`=`",
    "COMMA": "`,`",
    "COLON": "`:`",
    "RPAR": "`)`",
    "RBRACE": "`}`",
    "RSQB": "`]`",
    "MORETHAN": "`>`",
    "LPAR": "`(`",
    "LBRACE": "`{`",
    "NAME": "a name",
    "STRING": "a string",
    "INT": "a number",
    "THEN": "`then`",
    "ELSE": "`else`",
    "AS": "`as`",
    "RETURN": "`return`",
    "FLOW": "`flow`",
    "$END": "the end of the file",
}


def one_line(span: Span) -> str:
    return " ".join(span.text.split())


def listed(accepts: set[str]) -> str:
    if "PLUS" in accepts:
        accepts = accepts - {"MORETHAN"}  # a comparison is never what is missing
    words = [WORDS[a] for a in WORDS if a in accepts]
    if "NAME" in accepts and len(accepts) > 10:
        words = [
            "a stage",
            *[
                w
                for w in words
                if w not in ("a name", "a string", "a number", "`{`", "`(`", "`as`")
            ],
        ]
    if not words:
        return "something else"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"
