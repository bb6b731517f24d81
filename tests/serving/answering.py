"""A server with a stand-in for its engines, and what a test asks it."""

import json
from pathlib import Path
from typing import Any

from servers import ENGINE, MODEL, in_thread

from jaxft.assets import ASSETS
from jaxft.serving.engines.engines import EngineLimits

SMOKE = str(ASSETS / "smoke")


class Served:
    """A server with a stand-in for its engines."""

    def __init__(self, running: Any, folder: Path) -> None:
        self.running, self.folder, self.client = running, folder, running.client()

    def chat(self, client: Any = None, *, todo: dict[str, Any] | None = None, **fields: Any) -> Any:
        messages = [{"role": "user", "content": json.dumps(todo or {})}]
        create = (client or self.client).chat.completions.create
        return create(**{"model": MODEL, "messages": messages, **fields})

    def engine(self) -> dict[str, Any]:
        """What the server says of its only engine."""
        (engine,) = self.client.get("/jaxft/system", cast_to=object)["engines"]
        return engine

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.is_file() else []

    def asked(self) -> dict[str, Any]:
        """The newest request that reached the engine."""
        return json.loads(self.lines("asked")[-1])


def serving(folder: Path, *, start: float = 540.0, **settings: Any) -> Any:
    parts = {"engine": (*ENGINE, f"--folder={folder}"), "engine_limits": EngineLimits(drain=1.0, start=start)}
    return in_thread(folder / "state", SMOKE, parts=parts, **{"slots": 2, "queue": 4, "context": 99, **settings})
