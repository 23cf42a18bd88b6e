"""Calls of a flow that have come in one piece, answered without a task of their own.

Layer 4. Most requests are read in one go, and ask for nothing but a flow's answer to their body. A
task, and the coroutines it passes through, cost more than all else that is done here for such a
call. Knows nothing of sockets, and of headers only those of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from flowlang.serve.answer import Answer, result_answer
from flowlang.serve.inference import taken_over

if TYPE_CHECKING:
    from flowlang.serve.door import Door


Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
Respond: TypeAlias = Callable[[int, Headers, bytes], object]  # with a status, headers and a body


class Hall(Protocol):
    """Where the doors are: who has a call begun, and has it answered."""

    def successor(self, door: Door) -> Door | None:
        """The door that has taken over from one, or that one itself; None where none is open."""

    def leave(self, call: DirectCall, answer: Answer | None) -> None:
        """The call is over, with an answer to be sent or without."""

    def unanswered(self, door: Door, error: BaseException, request_id: bytes) -> Answer:
        """The answer to a call that came to no result."""


class DirectCall:
    """A call under way: the future that its flow settles, in the thread of the event loop."""

    __slots__ = ("_body", "_door", "_give_up", "_hall", "_is_over", "request_id", "respond")

    def __init__(self, hall: Hall, body: bytes, request_id: bytes, respond: Respond) -> None:
        self._hall = hall
        self._body = body
        self._give_up: Callable[[], object] | None = None
        self._is_over = False
        self.request_id = request_id
        self.respond = respond

    def begin(self, door: Door) -> None:
        """Ask a flow. Where it refuses, that is told a turn of the loop later.

        Or of thousands of requests in one packet each would be begun within the one before it.
        """
        self._door = door
        try:
            self._give_up = door.flow.ask(door.item(self._body, is_checked=False), self)
        except Exception as error:
            asyncio.get_running_loop().call_soon(self._end, self._unanswered(error))

    def give_up(self) -> None:
        """The client has hung up: there is nobody to answer."""
        if self._give_up is not None:
            self._give_up()
        self._end(None)

    def _unanswered(self, error: BaseException) -> Answer:
        # Never in a variable where the error was caught: it leads back there, and the ring would
        # hold the body until the garbage is collected.
        return self._hall.unanswered(self._door, error, self.request_id)

    def _end(self, answer: Answer | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._give_up = None  # which holds the request, and that this call
        self._hall.leave(self, answer)

    # What a flow sees of it

    def done(self) -> bool:
        return self._is_over

    def set_result(self, result: Any) -> None:
        try:
            answer = result_answer(result)
        except Exception as error:
            self._end(self._unanswered(error))
        else:
            self._end(answer)

    def set_exception(self, error: BaseException) -> None:
        successor = taken_over(self._door, lambda: self._hall.successor(self._door), error)
        if successor is not None:
            self.begin(successor)
        else:
            self._end(self._unanswered(error))
