"""One request at an engine: what the engine tells of it, until it is done or given up."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from jaxft.serving.http.errors import ApiError

Message = Mapping[str, Any]


class OpenAnswer:
    """What an engine tells of a request. id: by which the engine knows it. closing: called when it is closed.

    opened, begun: when it was handed over and when the engine took it, in seconds of the monotonic clock.
    """

    def __init__(self, id: str) -> None:
        self.id, self.done = id, False
        self.closing: list[Callable[[], None]] = []
        self.opened = time.monotonic()
        self.begun: float | None = None
        self._messages: asyncio.Queue[Message | ApiError] = asyncio.Queue()

    def tell(self, message: Message | ApiError) -> None:
        """Adds what the engine told, or the error by which the answer ends."""
        kind = "error" if isinstance(message, ApiError) else message["kind"]
        self.begun = time.monotonic() if kind == "begun" else self.begun
        self.done = self.done or kind in ("error", "done", "refused")
        self._messages.put_nowait(message)

    async def begin(self) -> Message:
        """Waits until the engine has taken the request. Raises ApiError if it refuses it, or has ended."""
        message = await self._next()
        if message["kind"] == "refused":
            raise ApiError(400, message["message"], param=message.get("param"), code=message.get("code"))
        return message

    async def messages(self, beat: float | None = None) -> AsyncIterator[Message | None]:
        """The messages after the beginning, `done` the last one. beat: seconds of silence after which there is a None.

        Raises ApiError if the engine ended.
        """
        while True:
            try:
                message = await asyncio.wait_for(self._next(), beat)
            except TimeoutError:
                yield None
                continue
            yield message
            if message["kind"] == "done":
                return

    async def _next(self) -> Message:
        message = await self._messages.get()
        if isinstance(message, ApiError):
            raise message
        return message

    def close(self) -> None:
        """Ends the request: what is not answered by now is given up. Harmless when called again."""
        closing, self.closing = self.closing, []
        for call in closing:
            call()
