"""The contract of a training loss: it returns sums and their weights, never means."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.nn.decoder import Decoder


class MethodState(NamedTuple):
    """Arrays of a training method beside the model: pytrees, or None.

    saved: numbers that change while training, such as an adaptive coefficient; checkpoints hold them.
    rebuilt: arrays that follow from the base weights, such as a frozen reference copy, or from files, such as a
    teacher. Checkpoints leave them out; a resumed run computes or loads them again.
    judge: the arrays of a frozen model that judges sampled answers, from files. No loss sees it, and checkpoints leave
    it out. It is here so that plans count it and it is on the mesh of the run.
    batch: the result of the method's `BatchSums` for the whole batch. Only losses see it; it is never in `TrainState`.
    """

    saved: Any = None
    rebuilt: Any = None
    judge: Any = None
    batch: Any = None


class Ratio(NamedTuple):
    """A metric as two float32 sums, whose quotient is reported: `Ratio(correct tokens, all tokens)`."""

    total: jax.Array
    weight: jax.Array


class LossSums(NamedTuple):
    """The sums of one batch or micro-batch, all float32 scalars.

    They are divided once, after micro-batches and devices have been added up, so that the gradient does not depend on
    how a batch is cut.

    total: the minimised loss, summed over its units (tokens, pairs, ...).
    weight: the number of units; the reported loss is total / weight.
    tokens: tokens in the batch, padding left out.
    trained_tokens: tokens that the loss is taken on.
    metrics: further values by the name under which they are logged.
    maxima: metrics that are the largest of some values, none of which is negative. `added` takes the larger ones.
    """

    total: jax.Array
    weight: jax.Array
    tokens: jax.Array
    trained_tokens: jax.Array
    metrics: dict[str, Ratio]
    maxima: dict[str, jax.Array] = {}

    def means(self) -> dict[str, jax.Array]:
        """`loss` and every metric, each divided by its own weight, and the maxima. A metric is 0 if its weight is."""
        # A batch may lack the units of a metric, such as answers of a class; a loss without units is an error.
        means = {name: total / (weight + (weight == 0)) for name, (total, weight) in self.metrics.items()}
        return {"loss": self.total / self.weight} | means | self.maxima


def added(whole: Any, part: Any) -> Any:
    """Two pytrees of sums added up; of the maxima of `LossSums` within them, the larger ones."""

    def add(whole: Any, part: Any) -> Any:
        if not isinstance(whole, LossSums):
            return whole + part
        sums = jax.tree.map(operator.add, whole._replace(maxima={}), part._replace(maxima={}))
        return sums._replace(maxima=jax.tree.map(jnp.maximum, whole.maxima, part.maxima))

    return jax.tree.map(add, whole, part, is_leaf=lambda x: isinstance(x, LossSums))


# (model, batch, key, method_state) -> LossSums. batch: the pytree that the method's source gives. key: a PRNG key turns
# dropout and noise on; None is evaluation. method_state: `TrainState.method`, None for methods without one.
Loss = Callable[[Decoder, Any, jax.Array | None, MethodState | None], LossSums]

# (model, batch, method_state) -> a pytree of float32 sums over the units of a batch. A training step computes it for
# the whole batch before any gradient, adds it up over micro-batches, and gives it to the loss of each of them as
# `MethodState.batch`. A loss that adds terms over different units (pairs and tokens) needs the numbers of both, and
# some losses need an estimate over the whole batch. No gradient passes through it.
BatchSums = Callable[[Decoder, Any, MethodState | None], Any]

# (saved, step, batch) -> `MethodState.saved` after optimizer step number `step`, int32 from 0, on that batch.
NextSaved = Callable[[Any, jax.Array, Any], Any]


def with_batch_sums(state: MethodState | None, sums: Any) -> MethodState | None:
    """The method's arrays with the sums over the whole batch; unchanged if `sums` is None."""
    if sums is None:
        return state
    return (state or MethodState())._replace(batch=sums)


def in_units_of(weight: jax.Array, other: Ratio) -> jax.Array:
    """The factor that turns a sum over other units into a part of a sum over the units of `weight`.

    weight: units of the loss in the whole batch. other.total, other.weight: a factor of the term, and its own units in
    the whole batch. `sum(a) + in_units_of(weight, Ratio(c, units)) * sum(b)`, divided by weight, is
    mean(a) + c * mean(b). A term without any unit counts nothing.
    """
    return other.total * weight / jnp.maximum(other.weight, 1)
