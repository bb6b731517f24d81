"""The contract of a training loss: it returns sums and their weights, never means."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxft.nn.decoder import Decoder


class MethodState(NamedTuple):
    """Arrays of a training method beside the model: pytrees, or None.

    saved: numbers that change while training, such as an adaptive coefficient; checkpoints hold them.
    rebuilt: arrays that follow from the base weights, such as a frozen reference copy. Checkpoints leave them out; a
    resumed run computes them again from the base.
    """

    saved: Any = None
    rebuilt: Any = None


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
    """

    total: jax.Array
    weight: jax.Array
    tokens: jax.Array
    trained_tokens: jax.Array
    metrics: dict[str, Ratio]

    def means(self) -> dict[str, jax.Array]:
        """`loss` and every metric, each divided by its own weight."""
        ratios = {"loss": Ratio(self.total, self.weight)} | self.metrics
        return {name: ratio.total / ratio.weight for name, ratio in ratios.items()}


# (model, batch, key, method_state) -> LossSums. batch: the pytree that the method's source gives. key: a PRNG key turns
# dropout and noise on; None is evaluation. method_state: `TrainState.method`, None for methods without one.
Loss = Callable[[Decoder, Any, jax.Array | None, MethodState | None], LossSums]
