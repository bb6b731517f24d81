"""The rewards section: what judges sampled answers."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxft.config.fields import ABOVE_ZERO, BY_CONTENT, COMMA_SEPARATED, FREE_TO_CHANGE, PATH, Range, ReadBy, Section
from jaxft.config.rollout import ONLINE


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """The functions and the reward model that judge sampled answers, and the processes in which functions run."""

    functions: Annotated[
        str | None,
        BY_CONTENT,
        ONLINE,
        COMMA_SEPARATED,
        "reward functions, comma separated, each with its weight if it is not 1: "
        "`rewards.py:exact,rewards.py:brief=0.2`, or a built-in one: `exact_match`, `json_valid`, `json_exact`, "
        "`math_answer`, `python_tests`; see "
        "[rewards](rewards.md#reward-functions)",
    ] = None
    model: Annotated[
        str | None,
        BY_CONTENT,
        ONLINE,
        PATH,
        "a reward model whose scores are added to the reward: a run or export of `method.name='reward'`, whole or an "
        "adapter, or a Hugging Face folder of a `*ForSequenceClassification` with one label, or hf://owner/name; see "
        "[rewards](rewards.md#a-reward-model)",
    ] = None
    model_weight: Annotated[
        float,
        Range(lambda value: math.isfinite(value) and value != 0, "a finite number other than 0"),
        ONLINE,
        ReadBy("rewards.model"),
        "factor of the reward model's score in the reward",
    ] = 1.0
    missing_eos_penalty: Annotated[
        float | None,
        ABOVE_ZERO,
        ONLINE,
        "taken from the reward of every answer that was cut off before it ended; None: nothing",
    ] = None
    completions: Annotated[
        Literal["text", "messages"],
        ONLINE,
        "how functions get answers to prompts of messages: as `text`, or as TRL gives them, a list with one assistant "
        "message each",
    ] = "text"
    workers: Annotated[
        int, ABOVE_ZERO, FREE_TO_CHANGE, ONLINE, "processes in which reward functions run, and as many for environments"
    ] = 2
    timeout_seconds: Annotated[
        float,
        ABOVE_ZERO,
        FREE_TO_CHANGE,
        ONLINE,
        "longest time of one call of a reward function or an environment; a process that takes longer is ended, and "
        "its answers are not scored",
    ] = 60.0
