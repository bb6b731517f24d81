"""Which prompts each rollout answers: a function of the step, so that a resumed run goes on with the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxft.config.rollout import MAX_DRAWS
from jaxft.data.batch import Batch
from jaxft.data.loader import steps_for
from jaxft.data.prompts import Prompt
from jaxft.data.stream import Stream


@dataclass(frozen=True, kw_only=True)
class PromptOrder:
    """The prompts of every rollout of a run; a `BatchSource` whose batches are made later, of sampled answers.

    prompts_per_rollout: groups of one rollout. updates: optimizer steps from one rollout to the next. epochs, steps:
    the length of a run; one pass over the prompts is an epoch, and `steps`, if given, decides. The prompts of all
    epochs form one endless stream, shuffled anew in each of them.
    """

    prompts: Sequence[Prompt]
    prompts_per_rollout: int
    updates: int
    shuffle: bool
    seed: int
    epochs: float
    steps: int | None

    @cached_property
    def _stream(self) -> Stream:
        return self._order(self.seed)

    @cached_property
    def _spare(self) -> Stream:
        # Another order, from which prompts are drawn that replace others.
        return self._order(self.seed + 1)

    def _order(self, seed: int) -> Stream:
        longest = max(len(prompt) for prompt in self.prompts)
        return Stream(self.prompts, max_length=longest, packing=False, shuffle=self.shuffle, seed=seed)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: the last rollout is trained on as often as every other."""
        if self.steps is not None:
            return self.steps
        return steps_for(self.epochs, len(self.prompts), self.prompts_per_rollout) * self.updates

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every prompt is answered once."""
        return len(self.prompts) / self.prompts_per_rollout * self.updates

    def epoch_of(self, step: int) -> float:
        """Epochs completed after the first `step` steps."""
        return step / self.steps_per_epoch

    def rollout_of(self, step: int) -> int:
        """The number of the rollout whose answers step `step` trains on, both from 0."""
        return step // self.updates

    def prompts_of(self, rollout: int) -> list[Prompt]:
        """The prompts that a rollout answers."""
        first = rollout * self.prompts_per_rollout
        return [self._prompt(self._stream, first + i) for i in range(self.prompts_per_rollout)]

    def spare_prompts(self, rollout: int, draw: int, count: int) -> list[Prompt]:
        """The first `count` prompts with which draw number `draw`, from 0, replaces prompts of a rollout.

        They come from an order of their own, whose place depends on the rollout and the draw alone.
        """
        first = (rollout * MAX_DRAWS + draw) * self.prompts_per_rollout
        return [self._prompt(self._spare, first + i) for i in range(count)]

    def metrics(self, step: int) -> dict[str, float]:
        """Nothing: the metrics of rollouts are those of their answers."""
        return {}

    def batch(self, step: int, rows: slice | None = None) -> Batch[np.ndarray]:
        """Raises TypeError: the batch of a step is made of answers, which only the model can give."""
        raise TypeError("a PromptOrder has prompts, not batches: the method's feed samples answers to them")

    def _prompt(self, stream: Stream, number: int) -> Prompt:
        (prompt,) = stream[number]
        if not isinstance(prompt, Prompt):
            raise TypeError(f"the examples of a PromptOrder are prompts, not {type(prompt).__name__}")
        return prompt
