"""The batches of methods that learn from rewards: answers are sampled, judged, and packed into updates."""

# B rows, S sequence

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from jaxft.data.batch import Batch
from jaxft.data.prompts import Prompt
from jaxft.methods.method import Run
from jaxft.methods.online.judge import Judge
from jaxft.methods.online.passes import Passes, rows_of
from jaxft.nn.decoder import Decoder
from jaxft.objectives.policy.advantages import alike_groups
from jaxft.rollouts.completions import CompletionsLog
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.order import PromptOrder
from jaxft.rollouts.rollout import completion_metrics
from jaxft.rollouts.sample import Sampler, seed_of
from jaxft.sharding.arrays import from_rows
from jaxft.sharding.processes import is_primary
from jaxft.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The batches of the optimizer steps that train on one rollout, in turn, and what is logged of them.

    numbers: of every answer, by name, for `completions.jsonl`.
    """

    batches: tuple[Batch[np.ndarray], ...]
    metrics: dict[str, float]
    numbers: dict[str, np.ndarray]


class MakeUpdates(Protocol):
    """How a method turns judged answers into batches."""

    def __call__(self, run: Run, judged: Judged, state: TrainState, passes: Passes) -> Updates: ...


class RolloutFeed:
    """`(state, step) -> batch`: samples with the weights in `state` if a new rollout is due at `step`.

    The prompts and all random draws are functions of the step, so that a run that resumes at the first step of a
    rollout goes on with the same answers.
    """

    def __init__(
        self,
        run: Run,
        graphdef: nnx.GraphDef[Decoder],
        make_updates: MakeUpdates,
        *,
        answers_of_sequence: int = 1,
        compares: bool = True,
    ) -> None:
        """answers_of_sequence: so many prompts and answers must fit into a sequence of `data.max_length`. compares:
        whether the method learns from how the rewards of a group differ.
        """
        if not isinstance(run.source, PromptOrder):
            raise TypeError(f"rollouts answer the prompts of a PromptOrder, not of a {type(run.source).__name__}")
        self._run, self._graphdef, self._make_updates = run, graphdef, make_updates
        self._order, self._compares = run.source, compares
        self._sampler = sampler_of(run, answers_of_sequence=answers_of_sequence)
        self._passes, self._judge = Passes(run, graphdef), Judge(run, graphdef)
        self._current: int | None = None
        self._updates: Updates | None = None
        self._metrics: dict[str, float] = {}
        self._log: CompletionsLog | None = None

    def __call__(self, state: TrainState, step: int) -> Batch[jax.Array]:
        number = self._order.rollout_of(step)
        if self._updates is None or number != self._current:
            self._updates, self._current = self._rollout(state, number, step), number
        batches = self._updates.batches
        batch = batches[step % len(batches)]
        sharding = self._run.mesh.batch_sharding()
        return from_rows(partial(rows_of, batch), len(batch.tokens_BS), sharding)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics of the rollout that the last batch came from."""
        if self._log is not None:
            self._log.flush()
        return self._metrics

    def may_stop(self, step: int) -> bool:
        """Whether a run that stops after `step` steps can go on from there: not in the middle of a rollout."""
        return step % self._order.updates == 0

    def _rollout(self, state: TrainState, number: int, step: int) -> Updates:
        started = time.monotonic()
        judged, redrawn = self._judged(state, number)
        sampled = time.monotonic()
        updates = self._make_updates(self._run, judged, state, self._passes)
        rows = sum(batch.segments_BS.size for batch in updates.batches)
        filled = sum(int(np.count_nonzero(batch.segments_BS)) for batch in updates.batches)
        tokens = sum(int(one.sampled.sum()) for one in judged.rollouts)
        self._metrics = {
            **completion_metrics(judged.rollouts),
            **judged.metrics(compared=self._compares),
            **({"rollout/redrawn_groups": float(redrawn)} if self._run.config.rollout.max_redraws else {}),
            **updates.metrics,
            "padding_share": 1 - filled / rows,
            "rollout_seconds": sampled - started,
            **({"rollout_tokens_per_second": tokens / (sampled - started)} if sampled > started else {}),
        }
        self._write(step, judged, updates)
        return updates

    def _judged(self, state: TrainState, number: int) -> tuple[Judged, int]:
        """The answers of a rollout, and how many groups were replaced."""
        config = self._run.config
        judged = self._answer(state, self._order.prompts_of(number), seed_of(config.seed, number))
        redrawn = 0
        for draw in range(config.rollout.max_redraws):
            alike = alike_groups(judged.rewards, judged.groups).tolist()
            if not alike:
                break
            spare = self._order.spare_prompts(number, draw, len(alike))
            again = self._answer(state, spare, seed_of(config.seed, number, draw + 1))
            judged, redrawn = judged.with_groups(alike, again), redrawn + len(alike)
        return judged, redrawn

    def _answer(self, state: TrainState, prompts: Sequence[Prompt], seed: int) -> Judged:
        temperature = self._run.config.rollout.temperature
        # The state is donated to the step, so nothing may keep its arrays after this.
        model = nnx.merge(self._graphdef, state.trainable, state.frozen)
        return self._judge(state, self._sampler.sample(model, prompts, temperature=temperature, seed=seed))

    def _write(self, step: int, judged: Judged, updates: Updates) -> None:
        if not is_primary() or not self._run.config.rollout.log_completions:
            return
        if self._log is None:
            self._log = CompletionsLog(self._run.folder, step, say=self._run.print_line)
        self._log.add(step + 1, judged.rollouts, judged.by_function, {"reward": judged.rewards, **updates.numbers})


def sampler_of(run: Run, *, group: int | None = None, answers_of_sequence: int = 1) -> Sampler:
    """How answers of a run are sampled. group: answers to each prompt; by default those of training.

    answers_of_sequence: so many prompts and answers must fit into a sequence of `data.max_length`.
    """
    config = run.config
    return Sampler(
        tokenizer=run.tokenizer,
        group=group or config.rollout.num_generations,
        max_completion_length=config.rollout.max_completion_length,
        length=config.data.max_length,
        slots=config.rollout.slots,
        environments=run.environments,
        max_turns=config.rollout.max_turns,
        prompt_length=config.data.max_length // answers_of_sequence - config.rollout.max_completion_length,
    )
