"""A flow as HTTP calls it: what makes its item of a body.

Layer 4. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flowlang.diagnostics import RequestError
from flowlang.serve.answer import check_json, reader_of
from flowlang.serve.form import ParameterReader, form_fields

if TYPE_CHECKING:
    from flowlang.plan.graph import Parameter
    from flowlang.plan.types import Type
    from flowlang.runtime.request import Told


class Called(Protocol):
    """What is asked of a flow here, wherever it runs."""

    @property
    def name(self) -> str: ...
    @property
    def doc(self) -> str | None: ...
    @property
    def input(self) -> Type: ...
    @property
    def output(self) -> Type: ...
    @property
    def parameters(self) -> Sequence[Parameter]: ...

    async def acall(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Any: ...

    def ask(self, item: Any, told: Told) -> Callable[[], object]: ...

    def count_refusal(self, code: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Door:
    """A flow that can be called, and what makes its item of a body."""

    flow: Called
    read: Callable[[bytes], Any] | None
    parameters: ParameterReader

    def item(self, body: bytes | dict[str, Any], *, is_checked: bool) -> Any:
        """The flow's item, as a body brings it, or a form its fields. Raises BadRequest.

        Of a body that is JSON, `is_checked` says that it is known to be within bounds.
        """
        if self.read is None or isinstance(body, dict):
            return body
        try:
            if not is_checked:
                check_json([body])
            return self.read(body)
        except RequestError as error:
            self.flow.count_refusal(error.code)
            raise


def door_of(flow: Called) -> Door:
    parts = form_fields(flow.input, [p.name for p in flow.parameters])
    return Door(flow, reader_of(flow.input, parts), ParameterReader(flow.parameters, flow.input))
