"""Distillation: a student learns the distributions of a teacher over the next token, on the trained tokens of rows."""

# B batch, S sequence, D model

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import LossSums, Ratio
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses
from jaxft.objectives.token_divergence import Divergence, Student, Teacher, TopLogps, divergence_sums


class FrozenArrays(NamedTuple):
    """A frozen model as a pytree, whose leaves are its arrays: `MethodState.rebuilt` of methods that have one."""

    graphdef: nnx.GraphDef[Decoder]
    arrays: nnx.State

    @property
    def model(self) -> Decoder:
        """The model itself."""
        return nnx.merge(self.graphdef, self.arrays)


def distill_loss(
    model: Decoder,
    teacher: Teacher | TopLogps,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    *,
    divergence: Divergence,
    router: RouterCoefficients | None = None,
) -> LossSums:
    """`Divergence` of every trained target, in nats, summed; the weight is the number of trained targets.

    batch: as for `sft_loss`. teacher: without gradient; see `as_teacher`. Metrics are means over trained targets:
    divergence, nll (of the data's own tokens), mean_token_accuracy, and teacher_agreement, the share of positions at
    which the likeliest tokens of teacher and student are the same.
    """
    weight = jnp.sum(batch.weights_BS)
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router)
    unembed, head, dimensions = model.split_unembed()
    student = Student(unembed, head, hidden_BSD, batch.targets_BS, batch.weights_BS, dimensions)
    sums = divergence_sums(student, teacher, divergence)
    metrics = {
        "divergence": Ratio(sums.divergence, weight),
        "nll": Ratio(sums.nll, weight),
        "mean_token_accuracy": Ratio(sums.correct, weight),
        "teacher_agreement": Ratio(sums.agreeing, weight),
    }
    tokens = jnp.sum(batch.segments_BS > 0).astype(jnp.float32)
    return with_router_losses(LossSums(sums.loss, weight, tokens, weight, metrics), router, routing)


def as_teacher(model: Decoder, batch: Batch[jax.Array]) -> Teacher:
    """A model's head and its hidden vectors on a batch, without dropout and without gradient."""
    hidden_BSD, _ = model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    unembed, head, dimensions = model.split_unembed()
    return Teacher(unembed, head, jax.lax.stop_gradient(hidden_BSD), dimensions)
