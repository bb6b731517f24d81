"""Batches in which the model's own answers take the place of those of the rows (on-policy distillation)."""

# B rows, S sequence

import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from jaxft.data import Prepared
from jaxft.data.batch import Batch
from jaxft.data.prompts import Prompt
from jaxft.errors import DataError
from jaxft.methods.method import Run
from jaxft.methods.online.passes import rows_of
from jaxft.methods.online.updates import pack
from jaxft.methods.parts.sequences import device_batch
from jaxft.nn.decoder import Decoder
from jaxft.rollouts.rollout import completion_metrics
from jaxft.rollouts.sample import Sampler, seed_of
from jaxft.sharding.arrays import from_rows
from jaxft.training.state import TrainState


class OwnAnswersFeed:
    """The `Feed` of a run of which `share` of the steps trains on the model's own answers to the rows' prompts.

    Which steps these are, and what is drawn in them, are functions of the step. max_new_tokens: of an answer.
    temperature: of sampling.
    """

    def __init__(
        self, run: Run, graphdef: nnx.GraphDef[Decoder], *, share: float, max_new_tokens: int, temperature: float
    ) -> None:
        self._run, self._graphdef = run, graphdef
        self._share, self._temperature = share, temperature
        self._sampler = Sampler(
            tokenizer=run.tokenizer,
            group=1,
            max_completion_length=max_new_tokens,
            length=run.config.data.max_length,
            slots=run.config.eval.batch_size,
        )
        self._metrics: dict[str, float] = {}

    def __call__(self, state: TrainState, step: int) -> Batch[jax.Array]:
        if not self.is_on_policy(step):
            self._metrics = {"on_policy": 0.0}
            return device_batch(self._run, step)
        started = time.monotonic()
        prompts = prompts_of(self._run.source.batch(step))
        model = nnx.merge(self._graphdef, state.trainable, state.frozen)
        rollouts = self._sampler.sample(
            model, prompts, temperature=self._temperature, seed=seed_of(self._run.config.seed, step)
        )
        packed = pack(self._run, rollouts)
        seconds = time.monotonic() - started
        self._metrics = {"on_policy": 1.0, **completion_metrics(rollouts), "rollout_seconds": seconds}
        batch = packed.batch._replace(arrays={})
        return from_rows(partial(rows_of, batch), len(batch.tokens_BS), self._run.mesh.batch_sharding())

    def is_on_policy(self, step: int) -> bool:
        """Whether step `step`, from 0, trains on answers of the model."""
        return bool(np.random.default_rng([self._run.config.seed, step]).random() < self._share)

    def metrics(self, step: int) -> dict[str, float]:
        """`on_policy`, 1 or 0 for the last step, and the lengths of its answers."""
        return self._run.source.metrics(step) | self._metrics

    def may_stop(self, step: int) -> bool:
        return True


def prompts_of(batch: Batch[np.ndarray]) -> list[Prompt]:
    """The tokens of every document before its first trained one, in the order of the batch."""
    prompts = []
    for row, segments_S in enumerate(batch.segments_BS):
        for document in range(1, int(segments_S.max(initial=0)) + 1):
            inside = np.flatnonzero(segments_S == document)
            # A weight stands at the position that predicts the trained token, so that position is the prompt's last.
            end = inside[np.flatnonzero(batch.weights_BS[row, inside])[0]] + 1
            tokens = batch.tokens_BS[row, inside[0] : end]
            where = f"document {document} of row {row}"
            prompts.append(
                Prompt(tokens=tokens, mask=np.zeros(len(tokens), np.uint8), row=row, messages="", where=where)
            )
    return prompts


def check_room(data: Prepared, max_length: int, max_new_tokens: int) -> None:
    """Raises DataError if a prompt and an answer of max_new_tokens do not fit into a sequence."""
    longest = max(_prompt_length(example.mask) for example in data.train_examples)
    if longest + max_new_tokens > max_length:
        raise DataError(
            f"the longest prompt of the training rows has {longest} tokens, and with method.distill.max_new_tokens="
            f"{max_new_tokens} it does not fit into data.max_length={max_length}: raise that to "
            f"{longest + max_new_tokens}, or sample shorter answers"
        )


def _prompt_length(mask: Sequence[int] | np.ndarray) -> int:
    return int(np.argmax(mask))
