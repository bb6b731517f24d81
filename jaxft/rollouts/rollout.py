"""A sampled answer, token for token, and the sampling of answers to prompts in groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.batch import Example
from jaxft.data.prompts import Prompt
from jaxft.generation.settings import FinishReason
from jaxft.rollouts.environments.episode import Episode, episode_metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """An answer to a prompt. Nothing of it is ever tokenised again: the trained tokens are those that were sampled.

    number: its place in the rollout's answers. group: the number of its prompt there. tokens: int32[n], after the
    prompt, the stop token included. sampled: bool[n], whether the model sampled the token; others come from an
    environment. logprobs: float32[n], of the sampled tokens when they were sampled, in nats, under the temperature; 0
    of others. finish_reason: `stop`, or `length` if it was cut off. text: its sampled text, without stop tokens;
    with an environment that of the last turn. episode: what an environment made of it, None without one. parts:
    thoughts and answer of the text, if it answers a chat.
    """

    prompt: Prompt
    number: int
    group: int
    tokens: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    text: str
    episode: Episode | None = None
    parts: tuple[str, str] | None = None

    @property
    def thoughts(self) -> str:
        """What the model thought before its answer to a chat; empty if there is nothing, or it is not known."""
        return self.parts[0] if self.parts else ""

    @property
    def answer(self) -> str:
        """The text without thoughts."""
        return self.parts[1] if self.parts else self.text

    def example(self, values: dict[str, float], arrays: dict[str, np.ndarray] | None = None) -> Example:
        """The prompt and the answer as one document, trained on the sampled tokens.

        values: numbers of the document. arrays: values of the answer's tokens, [n]; beside `sampler_logps`.
        """
        before = len(self.prompt)
        given = {"sampler_logps": self.logprobs.astype(np.float32)} | (arrays or {})
        return Example(
            tokens=np.concatenate([self.prompt.tokens, self.tokens]).astype(np.int32),
            mask=np.concatenate([np.zeros(before, np.uint8), self.sampled.astype(np.uint8)]),
            row=self.prompt.row,
            values={name: (float(value),) for name, value in values.items()},
            arrays={name: np.concatenate([np.zeros(before, x.dtype), x]) for name, x in given.items()},
        )


def completion_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The lengths of the sampled answers in tokens, and the share that was cut off, under TRL's names.

    Those of answers with an environment count what the model sampled in all turns, and there are `episode_metrics`.
    """
    lengths = np.array([int(one.sampled.sum()) for one in rollouts])
    cut = np.array([one.finish_reason == "length" for one in rollouts])
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(cut.mean()),
    }
    ended = lengths[~cut]
    if len(ended):
        metrics["completions/mean_terminated_length"] = float(ended.mean())
    return metrics | episode_metrics([one.episode for one in rollouts])
