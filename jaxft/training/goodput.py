"""What takes the time of a run: the share of it in steps, and what took the rest."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

Part = Literal[
    "steps", "rollouts", "compile", "input", "save", "evaluation", "peers", "setup", "scoring", "export", "lost",
    "other",
]  # fmt: skip
# steps: of training. rollouts: answers that the model samples for them. compile: the first step of each start, which
# compiles. input: making batches while no step runs. save: waiting for checkpoints. evaluation: on held-out rows.
# peers: waiting until all processes agree whether to stop. setup: reading rows and weights, restoring. scoring: by
# generation, before and after. lost: steps that had to be taken again, because the run was interrupted after its newest
# checkpoint.
PARTS: tuple[Part, ...] = get_args(Part)
PRODUCTIVE: tuple[Part, ...] = ("steps", "rollouts")
GOODPUT, PREFIX = "goodput", "time/"
KEYS = (GOODPUT, *(PREFIX + part for part in PARTS))  # in metrics.jsonl


class TimeUse:
    """Seconds by part, of this start of a run and, after `go_on`, of those before it. Every moment is in one part.

    clock: seconds since any origin, which never go back: the wall clock may be set while a run lasts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "other"
        self._since = clock()

    @contextlib.contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """Counts the time inside this context for a part; a context within it counts for its own."""
        outer = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def hide(self, part: Part, seconds: float) -> None:
        """Counts so many seconds of a part for steps: the devices were at work meanwhile."""
        self._seconds[part] -= seconds
        self._seconds["steps"] += seconds

    def go_on(self, earlier: Mapping[str, float], rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
        """Adds the time of earlier starts, and returns it, by part.

        earlier: what this returned when the run was last started. rows: of metrics.jsonl, before those after `step` are
        removed. step: from which the run goes on; what the steps after it took is lost.
        """
        timed = [_seconds_of(row) | {"step": row["step"]} for row in rows if PREFIX + "steps" in row]
        known: dict[str, float] = {part: float(earlier.get(part, 0.0)) for part in PARTS}
        if timed and _total(timed[-1]) > _total(known):
            known = {part: timed[-1][part] for part in PARTS}
        kept = [row for row in timed if row["step"] <= step]
        for part in PRODUCTIVE:
            lost = max(0.0, known[part] - (kept[-1][part] if kept else 0.0))
            known[part] -= lost
            known["lost"] += lost
        for part in PARTS:
            self._seconds[part] += known[part]
        return known

    def seconds(self) -> dict[str, float]:
        """Seconds by part, of all starts."""
        self._switch(self._part)
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """The entries of a row of metrics.jsonl, by KEYS: `goodput`, a share of 1, and seconds since the beginning."""
        seconds = self.seconds()
        return {GOODPUT: goodput(seconds), **{PREFIX + part: seconds[part] for part in PARTS}}

    def _switch(self, part: Part) -> None:
        now = self.clock()
        self._seconds[self._part] += max(0.0, now - self._since)
        self._part, self._since = part, now


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of steps, and of rollouts for them, in the seconds of all parts; 0 if no time has passed."""
    whole = _total(seconds)
    return sum(seconds[part] for part in PRODUCTIVE) / whole if whole else 0.0


def sentence(seconds: Mapping[str, float]) -> str:
    """`goodput 83.1% of 1:02:03: steps 83.1%, compile 9.0%, save 2.1%`, largest first, for people."""
    whole = _total(seconds)
    shares = sorted(((value / whole if whole else 0.0, part) for part, value in seconds.items()), reverse=True)
    parts = ", ".join(f"{part} {share:.1%}" for share, part in shares if share >= 0.001)
    hours, minutes, rest = int(whole) // 3600, int(whole) // 60 % 60, int(whole) % 60
    return f"goodput {goodput(seconds):.1%} of {hours}:{minutes:02d}:{rest:02d}: {parts}"


def seconds_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Seconds by part, of the last row of metrics.jsonl that has them; None if none has."""
    timed = [row for row in rows if PREFIX + "steps" in row]
    return _seconds_of(timed[-1]) if timed else None


def _seconds_of(row: Mapping[str, Any]) -> dict[str, float]:
    return {part: float(row.get(PREFIX + part, 0.0)) for part in PARTS}


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds[part] for part in PARTS)
