"""The rewards of sampled answers: by functions, by a reward model, and less a penalty for answers that were cut off."""

# B rows, P documents that a row can hold, n answers

import time
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.data.batch import Batch, Example, assemble
from jaxft.data.packing import pack
from jaxft.methods.method import Run
from jaxft.methods.online.passes import rows_of
from jaxft.methods.online.reward_model import AdapterArrays, RewardModel, reward_model_of
from jaxft.nn.decoder import Decoder
from jaxft.objectives.distill import FrozenArrays
from jaxft.objectives.reward import document_scores
from jaxft.rollouts.judged import Judged, ModelScores, judge
from jaxft.rollouts.reward_documents import Reader
from jaxft.rollouts.rollout import Rollout
from jaxft.sharding.arrays import from_rows, to_host
from jaxft.training.state import TrainState

STEP = 64  # rows of texts that were tokenised again are multiples of it, so that few lengths are compiled


class Judge:
    """`(state, answers) -> Judged`, by everything that the config of a run names under `rewards`."""

    def __init__(self, run: Run, graphdef: nnx.GraphDef[Decoder]) -> None:
        self._run = run
        model = reward_model_of(run.config)
        self._scorer = None if model is None else Scorer(run, graphdef, model)

    def __call__(self, state: TrainState, rollouts: Sequence[Rollout]) -> Judged:
        settings, scores = self._run.config.rewards, None
        if self._scorer is not None:
            started = time.monotonic()
            values = self._scorer(state, rollouts)
            scores = ModelScores(values=values, weight=settings.model_weight, seconds=time.monotonic() - started)
        return judge(rollouts, self._run.rewards, model=scores, missing_eos_penalty=settings.missing_eos_penalty)


class Scorer:
    """`(state, answers) -> scores`, float64 [n]: of each answer after its prompt, read at its last token by position.

    Documents are packed, and a pass has as many rows as a micro-batch of training. NaN for a document that is longer
    than the reward model's positions, which only texts that were tokenised again can be.
    """

    def __init__(self, run: Run, graphdef: nnx.GraphDef[Decoder], model: RewardModel) -> None:
        self._run = run
        family, trained = models.config_from_hf(models.score_config(model.hf_config())), run.model
        self._limit = family.max_position_embeddings
        self._reader = Reader(
            run.tokenizer,
            model.tokenizer(),
            virtual_tokens=trained.virtual_tokens,
            embeds_all=family.vocab_size >= trained.config.vocab_size,
        )

        def compute(
            judge: FrozenArrays | AdapterArrays, trainable: nnx.State, frozen: nnx.State, batch: Batch[jax.Array]
        ) -> jax.Array:
            if isinstance(judge, AdapterArrays):
                return document_scores(judge.model_on(nnx.merge(graphdef, trainable, frozen)), batch)
            return document_scores(judge.model, batch)

        self._compute = jax.jit(run.mesh.bind(compute))

    def __call__(self, state: TrainState, rollouts: Sequence[Rollout]) -> np.ndarray:
        if state.method is None or state.method.judge is None:
            raise RuntimeError("the state holds no reward model: runs.build.with_frozen adds it")
        documents = [self._reader.document(one) for one in rollouts]
        scored = [index for index, one in enumerate(documents) if len(one) <= self._limit]
        out = np.full(len(documents), np.nan)
        if scored:
            out[scored] = self._scores(state.method.judge, state, [documents[index] for index in scored])
        return out

    def _scores(
        self, judge: FrozenArrays | AdapterArrays, state: TrainState, documents: Sequence[np.ndarray]
    ) -> np.ndarray:
        config = self._run.config
        lengths = [max(2, len(one)) for one in documents]  # a row has at most one document for every two tokens
        longest, length = max(lengths), config.data.max_length
        if longest > length:
            length = -(-longest // STEP) * STEP
        plan = pack(lengths, length)
        count = config.train.batch_size // config.train.accumulation_steps
        out = np.zeros(len(documents))
        for start in range(0, len(plan), count):
            rows = plan[start : start + count]
            examples = [[_untrained(documents[index]) for index in row] for row in rows]
            batch = assemble(examples + [[]] * (count - len(rows)), length, self._run.tokenizer.pad_id)
            device = from_rows(partial(rows_of, batch), count, self._run.mesh.batch_sharding())
            values_BP = to_host(self._compute(judge, state.trainable, state.frozen, device))
            for row, indices in enumerate(rows):
                out[indices] = values_BP[row, : len(indices)]
        return out


def _untrained(tokens: np.ndarray) -> Example:
    return Example(tokens=tokens, mask=np.zeros(len(tokens), np.uint8), row=0)
