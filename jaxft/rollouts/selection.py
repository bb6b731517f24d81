"""Which of the judged answers to a prompt become rows of data: the best, all good ones, and pairs of best and worst."""

# n answers to one prompt

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxft.data.chat.reasoning import FIELDS
from jaxft.data.prompts import Prompt
from jaxft.errors import ConfigError
from jaxft.rollouts.rollout import Rollout

Keep = Literal["best", "all"]
KEEPS = ("best", "all")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which answers are kept.

    keep: `best`, the answer with the largest reward, of equal ones the first drawn; or `all` different answers whose
    reward is at least the threshold. threshold: the smallest reward that is kept; None: any, for `best` alone.
    keep_cut: whether answers that were cut off at their length may be kept; they would be learned as if they ended
    there. Raises ConfigError for an unknown `keep`, and for `all` without a threshold.
    """

    keep: Keep = "best"
    threshold: float | None = None
    keep_cut: bool = False

    def __post_init__(self) -> None:
        if self.keep not in KEEPS:
            raise ConfigError(f"keep={self.keep!r} is not one of {', '.join(KEEPS)}")
        if self.keep == "all" and self.threshold is None:
            raise ConfigError(
                "keep='all' keeps every answer whose reward is at least a threshold, and threshold is None: give one, "
                "such as threshold=1.0, or keep the best answer to each prompt with keep='best'"
            )

    def kept(self, rollouts: Sequence[Rollout], rewards: np.ndarray) -> list[int]:
        """The indices of the answers to one prompt that are kept, as drawn. rewards: [n], NaN for unscored ones."""
        usable = self.usable(rollouts, rewards)
        if self.threshold is not None:
            usable = [index for index in usable if rewards[index] >= self.threshold]
        if self.keep == "best":
            return usable and [max(usable, key=lambda index: rewards[index])]
        first_of = {rollouts[index].text: index for index in reversed(usable)}
        return sorted(first_of.values())

    def pair(self, rollouts: Sequence[Rollout], rewards: np.ndarray) -> tuple[int, int] | None:
        """The indices of the best and the worst answer to one prompt; None if their rewards or texts are equal.

        The threshold does not count here.
        """
        usable = self.usable(rollouts, rewards)
        if not usable:
            return None
        best = max(usable, key=lambda index: rewards[index])
        worst = min(usable, key=lambda index: rewards[index])
        tie = rewards[best] == rewards[worst] or rollouts[best].text == rollouts[worst].text
        return None if tie else (best, worst)

    def usable(self, rollouts: Sequence[Rollout], rewards: np.ndarray) -> list[int]:
        """The answers that have a reward and some text, and were not cut off unless `keep_cut`."""
        return [
            index
            for index, one in enumerate(rollouts)
            if not np.isnan(rewards[index]) and one.answer.strip() and (self.keep_cut or one.finish_reason == "stop")
        ]


def answer_row(prompt: Prompt, answer: Rollout, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A row that supervised fine-tuning reads: the prompt and its answer as text, or as messages, and `numbers`.

    Thoughts before the answer are a field of its message.
    """
    return {"prompt": _question(prompt), "completion": _answer(prompt, answer), **_rendering(prompt), **numbers}


def pair_row(prompt: Prompt, best: Rollout, worst: Rollout, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A row that methods of preferences read: a prompt with a chosen and a rejected answer, and `numbers`."""
    answers = {"chosen": _answer(prompt, best), "rejected": _answer(prompt, worst)}
    return {"prompt": _question(prompt), **answers, **_rendering(prompt), **numbers}


def _question(prompt: Prompt) -> Any:
    return prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)


def _answer(prompt: Prompt, answer: Rollout) -> Any:
    if isinstance(prompt.messages, str):
        return answer.text
    message = {"role": "assistant", "content": answer.answer}
    return [message | ({FIELDS[0]: answer.thoughts} if answer.thoughts else {})]


def _rendering(prompt: Prompt) -> dict[str, Any]:
    """The columns that the prompt's rendering reads beside its messages."""
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return tools | ({"chat_template_kwargs": dict(prompt.template_kwargs)} if prompt.template_kwargs else {})
