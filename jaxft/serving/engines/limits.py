"""How many answers may be open: in all, and of one key."""

import math
from collections import Counter
from dataclasses import dataclass, field

from jaxft.serving.http.errors import ApiError

MOST_BYTES = 64 * 2**20  # of the bodies of open requests
LONGEST_WAIT = 60  # seconds that a client is told to wait
FIRST_SECONDS = 2.0  # that an answer is taken to need before one has ended


@dataclass
class Limits:
    """Counts open answers. slots: of an engine; queue: answers that may wait, of one key the half of them at most.

    seconds: that an answer took lately.
    """

    slots: int
    queue: int
    seconds: float = FIRST_SECONDS
    total: int = 0
    bytes: int = 0
    by_key: Counter[str] = field(default_factory=Counter)

    def enter(self, key: str, choices: int, size: int) -> None:
        """Counts a request of so many answers in. Raises ApiError 429 where there is no room, 400 if there never is."""
        most, of_key = self.slots + self.queue, self.slots + math.ceil(self.queue / 2)
        if choices > of_key:
            raise ApiError(400, f"A request may ask for {of_key} answers here; this one wants {choices}.", param="n")
        if self.total + choices > most or self.bytes + size > MOST_BYTES:
            raise self._full("The queue of this server is full")
        if self.by_key[key] + choices > of_key:
            raise self._full("This key has as many requests open as it may")
        self.total, self.bytes = self.total + choices, self.bytes + size
        self.by_key[key] += choices

    def leave(self, key: str, choices: int, size: int) -> None:
        """Counts it out."""
        self.total, self.bytes = self.total - choices, self.bytes - size
        self.by_key[key] -= choices
        if not self.by_key[key]:
            del self.by_key[key]

    def ended(self, seconds: float) -> None:
        """Takes note of how long a request took."""
        self.seconds += 0.1 * (seconds - self.seconds)

    def _full(self, why: str) -> ApiError:
        wait = min(LONGEST_WAIT, max(1, math.ceil(self.seconds * self.total / self.slots / 2)))
        return ApiError(
            429, f"{why}: try again in {wait} s.", code="rate_limit_exceeded", headers={"retry-after": str(wait)}
        )
