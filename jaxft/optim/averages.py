"""Averages of weights over training, and which weights are evaluated and exported."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params


class AverageState(NamedTuple):
    """count: int32, updates made. inner: the optimizer's own state. average: shaped like the parameters."""

    count: jax.Array
    inner: Any
    average: Any


def with_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx`, beside which an exponential moving average of the parameters is kept.

    It is the parameters themselves after the first update, then decay * average + (1 - decay) * parameters, as
    torch.optim.swa_utils has it.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.int32(0), tx.init(params), jax.tree.map(jnp.copy, params))

    def update(grads: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        updates, inner = tx.update(grads, state.inner, params)
        share = jnp.where(state.count == 0, 1.0, 1.0 - decay)
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda before, x: before + share * (x - before), state.average, moved)
        return updates, AverageState(state.count + 1, inner, average)

    return optax.GradientTransformation(init, update)


def evaluated(opt_state: Any, trainable: Any, *, use_average: bool = True) -> Any:
    """The parameters that losses, scores and exports are to be of, where `trainable` are those that are trained.

    That is the average of `with_average`, unless use_average is off, or the averaged sequence x of schedule-free
    training, whose gradients are taken elsewhere (arXiv:2405.15682); else `trainable` itself.
    """
    kinds = (AverageState, ScheduleFreeState)
    for part in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(part, AverageState):
            return part.average if use_average else evaluated(part.inner, trainable)
        if isinstance(part, ScheduleFreeState):
            return schedule_free_eval_params(part, trainable)
    return trainable
