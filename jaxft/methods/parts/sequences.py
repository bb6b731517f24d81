"""Functions that methods on packed token sequences share: batches, their shapes, and the held-out evaluator."""

# B batch, S sequence

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.data.batch import Batch, Example, most_documents
from jaxft.data.batch_source import BatchSource
from jaxft.data.loader import Loader
from jaxft.data.mixture import Mixture
from jaxft.evaluation.held_out import added_up, held_out_metrics
from jaxft.methods.method import Run
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import BatchSums, Loss, with_batch_sums
from jaxft.optim.averages import evaluation_params
from jaxft.sharding.arrays import from_rows
from jaxft.training.state import TrainState
from jaxft.training.step import make_eval_step, make_eval_sums

LINES = 10  # that tell the progress of `each_once`

# (state, between) -> held-out metrics; `between` is called before every batch, and may raise.
Evaluator = Callable[[TrainState, Callable[[], None]], dict[str, float]]


def source(config: RunConfig, data: Prepared, tokenizer: Tokenizer) -> BatchSource:
    """The batches of every step, of one training set or of a mixture.

    Raises DataError if a set of a mixture would be seen more often than its max_epochs.
    """
    train = config.train
    if not config.data.mixture:
        shuffle = config.data.shuffle
        return _loader(data.train_examples, config, tokenizer, shuffle=shuffle, epochs=train.epochs, steps=train.steps)
    mixture = Mixture(
        data.sets,
        config.data,
        batch_size=train.batch_size,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        epochs=train.epochs,
        steps=train.steps,
    )
    mixture.check_epochs()
    return mixture


@dataclass(frozen=True, kw_only=True)
class SequenceFeed:
    """The `Feed` of batches that are a function of the step alone. batch(step): on the devices of the mesh."""

    source: BatchSource
    batch: Callable[[int], Any]

    def __call__(self, state: TrainState, step: int) -> Any:
        return self.batch(step)

    def metrics(self, step: int) -> dict[str, float]:
        return self.source.metrics(step)

    def may_stop(self, step: int) -> bool:
        return True


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> SequenceFeed:
    """`Method.feed` of the batches of the run's source."""
    return SequenceFeed(source=run.source, batch=partial(device_batch, run))


def device_batch(run: Run, step: int, source: BatchSource | None = None) -> Batch[jax.Array]:
    """The batch of a step, from 0, on the devices of the mesh; every process makes the rows of its own devices.

    source: by default that of the run.
    """
    batch = (source or run.source).batch
    return from_rows(partial(batch, step), run.config.train.batch_size, run.mesh.batch_sharding())


def batch_shapes(config: RunConfig, values: Sequence[str] = ()) -> Batch[jax.ShapeDtypeStruct]:
    """The shapes of a `Batch`, [B, S]. values: names of the numbers that its documents carry, [B, P]."""
    shape = (config.train.batch_size, config.data.max_length)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    numbers = jax.ShapeDtypeStruct((shape[0], most_documents(shape[1])), jnp.float32)
    return Batch(
        tokens_BS=ids,
        targets_BS=ids,
        weights_BS=weights,
        positions_BS=ids,
        segments_BS=ids,
        values=dict.fromkeys(values, numbers),
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out batches on the devices of a mesh. count: their number. batch(number): one of them, from 0."""

    count: int
    batch: Callable[[int], Any]


def held_out_batches(run: Run, examples: Sequence[Example]) -> HeldOut:
    """Batches of the size of training batches, which have every example once."""
    loader = _loader(examples, run.config, run.tokenizer, shuffle=False)

    def batch(number: int) -> Batch[jax.Array]:
        return from_rows(partial(loader.eval_batch, number), loader.batch_size, run.mesh.batch_sharding())

    return HeldOut(count=loader.eval_steps, batch=batch)


def make_evaluator(
    run: Run,
    graphdef: nnx.GraphDef[Decoder],
    loss: Loss,
    batch_sums: BatchSums | None = None,
    held_out: HeldOut | None = None,
) -> Evaluator | None:
    """Held-out metrics by a loss without dropout; None if no rows are held out.

    One evaluator serves one device and many: the mesh of the run gives the devices of the batches and the weights. Sums
    over the whole batch, if the loss needs them, are those over all held-out rows, so that the batch size does not
    matter. held_out: by default the `held_out_batches` of the run.
    """
    if run.data.eval_examples is None:
        return None
    rows = held_out or held_out_batches(run, run.data.eval_examples)
    eval_step = jax.jit(run.mesh.bind(make_eval_step(graphdef, loss)))
    eval_sums = None if batch_sums is None else jax.jit(run.mesh.bind(make_eval_sums(graphdef, batch_sums)))

    def evaluate(state: TrainState, between: Callable[[], None]) -> dict[str, float]:
        def batches() -> Iterator[Any]:
            for number in range(rows.count):
                between()
                yield rows.batch(number)

        weights, method = evaluated_weights(run.config, state), state.method
        if eval_sums is not None:
            whole = added_up(partial(eval_sums, weights, state.frozen, method), batches())
            method = with_batch_sums(method, jax.tree.map(np.float32, whole))
        return held_out_metrics(partial(eval_step, weights, state.frozen, method), batches())

    return evaluate


def each_once(run: Run, examples: Sequence[Example], what: str) -> Iterator[tuple[Batch[jax.Array], list[list[int]]]]:
    """(batch of the size of a micro-batch, the examples of each of its rows, by index), each example once.

    For what is computed before the first step. The examples need not carry the same values and arrays. what: names the
    work in the lines that tell its progress.
    """
    config = run.config
    loader = Loader(
        [replace(example, values={}, arrays={}) for example in examples],
        batch_size=config.train.batch_size // config.train.accumulation_steps,
        max_length=config.data.max_length,
        shuffle=False,
        pad_id=run.tokenizer.pad_id,
    )
    shown = 0
    for number in range(loader.eval_steps):
        batch = from_rows(partial(loader.eval_batch, number), loader.batch_size, run.mesh.batch_sharding())
        yield batch, loader.plan[number * loader.batch_size :][: loader.batch_size]
        if (number + 1) * LINES // loader.eval_steps > shown and loader.eval_steps > LINES:
            shown = (number + 1) * LINES // loader.eval_steps
            run.print_line(f"{what}: batch {number + 1:,} of {loader.eval_steps:,}")


def digest_of(known: Any, examples: Iterable[Example]) -> str:
    """A hash of JSON values and of the tokens and masks of examples, for the name of what is computed from them."""
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16)
    for example in examples:
        for document in example.documents:
            for array in (document.tokens, document.mask):
                digest.update(np.int64(len(array)).tobytes() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def evaluated_weights(config: RunConfig, state: TrainState) -> nnx.State:
    """The trained parameters that held-out losses, scores and exports of a run use: an average if it keeps one."""
    return evaluation_params(state.opt_state, state.trainable, use_average=config.train.use_ema)


def _loader(
    examples: Sequence[Example],
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    shuffle: bool,
    epochs: float = 1.0,
    steps: int | None = None,
) -> Loader:
    return Loader(
        examples,
        batch_size=config.train.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        shuffle=shuffle,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        epochs=epochs,
        steps=steps,
    )
