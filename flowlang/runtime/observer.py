"""Whoever follows requests through the stages, where somebody does.

Layer 3. The runtime knows no system of tracing, only this protocol: it asks at the entrance what
follows a request, keeps that with it, and shows each batch once its answers are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from flowlang.runtime.batcher import Item


@dataclass(frozen=True, slots=True)
class Worked:
    """A batch that an instance of a stage has worked on, and the outcome of each of its items."""

    stage: str
    instance: int
    items: Sequence[Item]
    outcomes: Sequence[Any]


class Observer(Protocol):
    """Told of what happens; neither method may raise or wait for anything."""

    def current(self) -> Any | None:
        """What follows the request now being submitted; None if nothing does.

        It is kept as the request's `trace`.
        """

    def observe(self, worked: Worked) -> None:
        """Take note of a batch. Called outside all locks, in the thread of the instance."""
