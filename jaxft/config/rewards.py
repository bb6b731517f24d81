"""The rewards section: the functions that judge sampled answers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxft.config.fields import ABOVE_ZERO, FREE_TO_CHANGE, Section
from jaxft.config.rollout import ONLINE


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """The functions that judge sampled answers, and the processes in which they run."""

    functions: Annotated[
        str | None,
        ONLINE,
        "reward functions, comma separated, each with its weight if it is not 1: "
        "`rewards.py:exact,rewards.py:brief=0.2`, or a built-in one: `exact_match`, `json_valid`, `json_exact`, "
        "`math_answer`, `python_tests`; see "
        "[rewards](rewards.md#reward-functions)",
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
