"""Settings of generation, and its results.

`Sampling` declares each setting once: checks, the command line's options and their help read the declaration.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxft.config.fields import ABOVE_ZERO, BELOW_ONE, Range, Section, own_fields
from jaxft.errors import ConfigError

FinishReason = Literal["stop", "length"]

# NaN is outside of every range.
FINITE = Range(lambda value: value < math.inf, "finite")
AT_LEAST_ONE = Range(lambda value: value >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Sampling(Section):
    """The settings by which the tokens of one prompt are chosen. Names and meanings are those of transformers and vLLM.

    Random draws depend on the seed, the row of the prompt in its call and the position of the token, not on what else
    is generated. Raises ConfigError for values outside of a range.
    """

    max_new_tokens: Annotated[int, AT_LEAST_ONE, "most tokens of an answer"] = 128
    temperature: Annotated[
        float,
        Range(lambda value: 0 <= value < math.inf, "0 (greedy) or a positive number"),
        "divides the scores; 0 takes the most probable token (greedy)",
    ] = 0.0
    top_k: Annotated[int | None, AT_LEAST_ONE, "keep only the K most probable tokens"] = None
    top_p: Annotated[
        float | None,
        Range(lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "keep the fewest most probable tokens whose probabilities add up to top_p or more",
    ] = None
    min_p: Annotated[float | None, BELOW_ONE, "drop tokens less probable than min_p times the most probable one"] = None
    repetition_penalty: Annotated[
        float, ABOVE_ZERO, FINITE, "values above 1 penalise tokens already used, those of the prompt included"
    ] = 1.0
    seed: Annotated[
        int, Range(lambda value: 0 <= value < 2**32, "at least 0 and below 4294967296"), "seed of the random draws"
    ] = 0
    stop: Annotated[tuple[str, ...], "text that ends an answer and is cut off"] = ()

    def __post_init__(self) -> None:
        for field in own_fields(type(self)):
            field.check(getattr(self, field.key))
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"stop={self.stop!r} must be a tuple of non-empty strings")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The answer to one prompt.

    tokens: all new token ids, the stop token included. logprobs: of each token, in nats, by the model at temperature 1
    without penalty or filters. finish_reason: "stop" for a stop token, a stop string or a callback that ended the row;
    "length" at max_new_tokens. text: None from `generate_tokens`; from `generate_text` the decoded tokens without
    special tokens, stop string or an unfinished last character, and in a chat without thoughts. thoughts: those before
    the answer in a chat; empty if there are none.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str | None = None
    thoughts: str = ""
