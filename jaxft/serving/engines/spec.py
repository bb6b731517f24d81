"""What the process of an engine is told first, and the ends of the socket over which it is spoken to.

Both sides send JSON objects, one a line. From the server: the spec; `answer` with an id; `cancel` with one. From the
engine: `phase`, `ready`, or `failed`, if the model cannot be loaded; and of an answer: `begun`, or `refused`; then of
each of its choices `piece` and `ended`; at last `done`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NOT_BY_ROW = "serve_alone"  # the code of a refusal: this adapter needs an engine of its own
LINE_BYTES = 64 * 2**20  # of one line, at most: a request's body with every character escaped


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """model: folder or file; base: of a PEFT folder. slots: answers at a time; context: tokens of each, prompt and all.

    adapters: places for adapters of at most max_rank. dtype, quantization: as of `jaxft.load_model`. cache: the folder
    for compiled programs.
    """

    model: str
    base: str | None
    slots: int
    context: int
    adapters: int
    max_rank: int
    dtype: str
    quantization: str | None
    cache: str

    def line(self) -> bytes:
        """The line that tells it."""
        return as_line(asdict(self))

    @classmethod
    def of(cls, line: bytes) -> "EngineSpec":
        """The spec that a line tells."""
        return cls(**json.loads(line))


def as_line(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"
