"""What a comparison is asked to do, and the time that it has."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxft.comparison.examples import require_bm25
from jaxft.comparison.prompts import OWN, SystemPrompt
from jaxft.comparison.verdict import parse_requirement
from jaxft.errors import ConfigError, did_you_mean
from jaxft.files.strict_json import parse_json
from jaxft.home import local_path

WAYS, CHOOSERS, METHODS = ("zero", "shots", "tuned", "bare"), ("fixed", "bm25", "own"), ("lora", "full")
USUAL_WAYS, USUAL_CHOOSERS = WAYS[:3], CHOOSERS[:2]
AUTO_SHOTS = (2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of `jaxft compare`.

    ways: of `WAYS`. endpoint: the name of a model behind an OpenAI-compatible server. shots: numbers of examples, None
    for all of `AUTO_SHOTS` that fit. choose: of `CHOOSERS`; draws: sets of fixed examples. prompts: a JSON file of
    names and system messages. dev_rows: most training rows on which prompts are chosen. methods: of `METHODS`, to be
    trained here; seeds: runs of each; sizes: parts of the rows. margin: the smallest difference that counts. cluster: a
    column of the held-out rows. calls: a month. usd_per_hour, prices, endpoint_usd, label_usd: see `costs.prices_of`.
    topology: accelerators whose prices and speed count, in place of this machine's.
    probe: `builtin`, or a file of requests; see `trained.probe`.
    minutes: after which nothing is begun. hide_rows: whether the page leaves out texts of the data.
    require: see `verdict.parse_requirement`.
    """

    to: str
    ways: tuple[str, ...] = USUAL_WAYS
    runs: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    endpoint: str | None = None
    shots: tuple[int, ...] | None = None
    choose: tuple[str, ...] = USUAL_CHOOSERS
    draws: int = 3
    prompts: str | None = None
    dev_rows: int = 50
    methods: tuple[str, ...] = ()
    seeds: int = 1
    sizes: tuple[float, ...] = ()
    margin: float = 0.02
    cluster: str | None = None
    calls: int | None = None
    usd_per_hour: float | None = None
    prices: str | None = None
    topology: str | None = None
    endpoint_usd: str | None = None
    label_usd: float | None = None
    probe: str | None = None
    minutes: float | None = None
    hide_rows: bool = False
    require: str | None = None

    def check(self) -> None:
        """Raises ConfigError for options out of range or against each other, and if bm25s is needed and absent."""
        for name, given, known in (
            ("ways", self.ways, WAYS), ("choose", self.choose, CHOOSERS), ("methods", self.methods, METHODS),
        ):  # fmt: skip
            for one in given:
                if one not in known:
                    raise ConfigError(f"--{name}: {one!r} is not one of {', '.join(known)}.{did_you_mean(one, known)}")
        ranges: tuple[tuple[str, Any, bool, str], ...] = (
            ("margin", self.margin, 0 < self.margin < 1, "above 0 and below 1"),
            ("draws", self.draws, self.draws >= 1, "1 or more"),
            ("dev_rows", self.dev_rows, self.dev_rows >= 1, "1 or more"),
            ("seeds", self.seeds, self.seeds >= 1, "1 or more"),
            ("calls", self.calls, self.calls is None or self.calls >= 1, "1 or more"),
            ("minutes", self.minutes, self.minutes is None or self.minutes > 0, "above zero"),
            ("shots", self.shots, self.shots is None or min(self.shots, default=0) >= 1, "numbers of 1 or more"),
            ("sizes", self.sizes, all(0 < size <= 1 for size in self.sizes), "shares above 0 and up to 1"),
        )
        for name, value, fits, words in ranges:
            if not fits:
                raise ConfigError(f"--{name}={value} must be {words}")
        if "tuned" in self.ways and not self.runs and not self.methods:
            raise ConfigError(
                "the way tuned needs a model: give --run=FOLDER of a finished run, or --methods=lora to train one here "
                "(--ways=zero,shots compares prompts alone)"
            )
        if "bare" in self.ways and "tuned" not in self.ways:
            raise ConfigError("the way bare asks the tuned model: leave tuned in --ways")
        if "bm25" in self.choose and "shots" in self.ways:
            require_bm25()
        if self.topology is not None and self.usd_per_hour is not None:
            raise ConfigError(
                f"--topology={self.topology} has its price in the price file, and --usd_per_hour is one too: leave one "
                "of them out"
            )
        if self.seeds > 1 and not self.methods:
            raise ConfigError(f"--seeds={self.seeds} is for runs that are trained here: add --methods=lora")
        if self.sizes and not self.methods:
            raise ConfigError("--sizes trains on parts of the rows: add --methods=lora")
        if self.require is not None:
            parse_requirement(self.require)
            if "tuned" not in self.ways:
                raise ConfigError(f"--require={self.require} needs both sides: leave tuned in --ways")

    def system_prompts(self) -> list[SystemPrompt]:
        """The rows' own system message, and those of the file `prompts`, a JSON object of names and texts."""
        if self.prompts is None:
            return [OWN]
        form = '{"short": "Answer in one word.", "strict": "Reply with JSON only."}'
        source = local_path(self.prompts)
        try:
            with open(source, "rb") as file:
                given = parse_json(file.read())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--prompts={self.prompts} cannot be read: {error}. Write {form}") from error
        if not isinstance(given, dict) or not given or not all(isinstance(text, str) for text in given.values()):
            raise ConfigError(f"--prompts={self.prompts} must be a JSON object of names and texts, such as {form}")
        return [OWN, *(SystemPrompt(name=name, text=text) for name, text in given.items())]

    def settings(self) -> dict[str, Any]:
        """What of the options the figures depend on, as it is written to compare.json."""
        return {
            "ways": list(self.ways), "margin": self.margin, "dev_rows": self.dev_rows, "choose": list(self.choose),
            "draws": self.draws, "shots": None if self.shots is None else list(self.shots), "cluster": self.cluster,
            "calls": self.calls, "seeds": self.seeds, "topology": self.topology,
        }  # fmt: skip


class OutOfTime(Exception):
    """The minutes of a comparison are used up."""


@dataclass
class Budget:
    """The time of a comparison. minutes: None for as long as it takes. left_out: what was not done, in words."""

    minutes: float | None
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = None if self.minutes is None else self.clock() + 60 * self.minutes

    def check(self) -> None:
        """Raises OutOfTime if nothing more may be begun."""
        if self._end is not None and self.clock() >= self._end:
            raise OutOfTime

    def leave_out(self, what: str) -> None:
        """Notes that something was not done for lack of time."""
        self.left_out.append(what)


def as_json(value: Any) -> str:
    """How compare.json is written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
