"""A conversation between the model and an environment, as it is kept with the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.rollouts.environments.protocol import Message

REWARD = "environment"  # the name of its reward among those of functions


@dataclass(frozen=True, kw_only=True)
class Part:
    """Text of a conversation, with its special tokens. sampled: whether the model wrote it."""

    text: str
    sampled: bool


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What an environment made of an answer.

    messages: all after the prompt, those of the assistant as their sampled text. parts: the same as text with special
    tokens. turns: of the model. cut: whether max_turns ended it. tool_calls: messages of role `tool`. lost: whether its
    process hung or died, which leaves it without a reward. reward: None if it was not scored.
    """

    messages: tuple[Message, ...]
    parts: tuple[Part, ...]
    turns: int
    cut: bool
    tool_calls: int
    lost: bool
    reward: float | None


def episode_metrics(episodes: Sequence[Episode | None]) -> dict[str, float]:
    """Means over the conversations of a rollout; nothing without an environment."""
    known = [episode for episode in episodes if episode is not None]
    if not known:
        return {}
    return {
        "environment/turns": float(np.mean([one.turns for one in known])),
        "environment/max_turns_ratio": float(np.mean([one.cut for one in known])),
        "environment/tool_calls": float(np.mean([one.tool_calls for one in known])),
        "environment/lost": float(sum(one.lost for one in known)),
    }
