"""What to generate and what came out."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxft.errors import ConfigError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one prompt are chosen. Names and meanings are those of transformers and vLLM.

    max_new_tokens: at least 1. temperature: 0 is greedy. top_k: at least 1. top_p: in (0, 1]. min_p: in
    [0, 1). repetition_penalty: above 0; prompt tokens count as seen. seed: in [0, 2**32); draws depend on the
    seed, the place of the prompt in its call and the position of the token, not on what else is generated.
    stop: strings that end the text and are cut off it.
    Raises ConfigError for values outside these bounds.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for no limit"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None for no limit"),
            ("min_p", self.min_p is None or 0 <= self.min_p < 1, "in [0, 1), or None for no limit"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1.0 does nothing"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 4294967296)"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of non-empty strings"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What one prompt gave.

    tokens: all produced ids, with the stop token where there was one. logprobs: of each token, in nats, by the
    model at temperature 1 without penalty or filters. finish_reason: "stop" for a stop token, a stop string or
    a callback that asked for it; "length" at max_new_tokens. text: None from `generate_tokens`; from
    `generate_text` the decoded tokens without special tokens, stop string or an unfinished last character.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str | None = None
