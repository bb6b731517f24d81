"""The engine's end of the socket to the server: a JSON object a line, both ways."""

import json
import queue
import socket
import threading
from collections.abc import Mapping
from typing import Any

from jaxft.serving.engines.spec import EngineSpec, as_line

Message = Mapping[str, Any]


class Channel:
    """Reads in a thread of its own, and writes what was added, all at once."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._file = self._socket.makefile("rb")
        self._came: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lines: list[bytes] = []

    def begin(self) -> EngineSpec:
        """The first line; from then on, those after it are read as they come."""
        spec = EngineSpec.of(self._file.readline())
        threading.Thread(target=self._read, name="channel", daemon=True).start()
        return spec

    def _read(self) -> None:
        for line in self._file:
            self._came.put(json.loads(line))
        self._came.put(None)

    def take(self, *, wait: bool) -> list[Message | None]:
        """What has come, None for the end of the connection. wait: for something, if there is nothing."""
        out = [self._came.get()] if wait else []
        while not self._came.empty():
            out.append(self._came.get())
        return out

    def add(self, message: Message) -> None:
        """Adds a message to what the next `flush` sends."""
        self._lines.append(as_line(message))

    def flush(self) -> bool:
        """Sends what was added; False if nobody listens any more."""
        lines, self._lines = b"".join(self._lines), []
        try:
            self._socket.sendall(lines)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def tell(self, kind: str, **values: Any) -> None:
        """Sends a message at once."""
        self.add({"kind": kind, **values})
        self.flush()
