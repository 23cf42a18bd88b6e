"""flowlang: one line of pipeline, checked before it runs, served on the whole machine.

import flowlang

with flowlang.load("app.flow") as app:
    print(app(open("cat.jpg", "rb").read()))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "App",
    "BadRequest",
    "Cancelled",
    "CompileError",
    "DeadlineExceeded",
    "Diagnostic",
    "Draining",
    "EngineError",
    "Flow",
    "FlowError",
    "InternalError",
    "Overloaded",
    "RequestError",
    "StageFailed",
    "__version__",
    "batched",
    "check",
    "load",
]

if TYPE_CHECKING:
    from flowlang.app import App, Flow, load
    from flowlang.diagnostics import (
        BadRequest,
        Cancelled,
        CompileError,
        DeadlineExceeded,
        Diagnostic,
        Draining,
        EngineError,
        FlowError,
        InternalError,
        Overloaded,
        RequestError,
        StageFailed,
    )
    from flowlang.mark import batched
    from flowlang.plan.files import check

_MODULE = {
    "App": "app",
    "Flow": "app",
    "batched": "mark",
    "check": "plan.files",
    "load": "app",
}


def __getattr__(name: str) -> Any:
    """Public names, brought in when first used: importing flowlang itself costs nothing."""
    if name in __all__:
        from importlib import import_module

        module = import_module(f"flowlang.{_MODULE.get(name, 'diagnostics')}")
        return getattr(module, name)
    raise AttributeError(f"module 'flowlang' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
