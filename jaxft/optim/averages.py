"""Moving averages of the weights, and the choice of the weights that are evaluated and exported."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params


class AverageState(NamedTuple):
    """steps: int32, number of updates so far. inner: the optimizer's own state. average: shaped like the parameters."""

    steps: jax.Array
    inner: optax.OptState
    average: optax.Params


def with_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx` with an exponential moving average of the parameters in its state.

    After the first update the average is the parameters themselves, then decay * average + (1 - decay) * parameters, as
    in torch.optim.swa_utils.
    """

    def init(params: optax.Params) -> AverageState:
        return AverageState(jnp.int32(0), tx.init(params), jax.tree.map(jnp.copy, params))

    def update(
        grads: optax.Updates, state: AverageState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AverageState]:
        updates, inner = tx.update(grads, state.inner, params)
        share = jnp.where(state.steps == 0, 1.0, 1.0 - decay)
        new_params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda before, x: before + share * (x - before), state.average, new_params)
        return updates, AverageState(state.steps + 1, inner, average)

    return optax.GradientTransformation(init, update)


def evaluation_params(opt_state: optax.OptState, trainable: optax.Params, *, use_average: bool = True) -> optax.Params:
    """The parameters to evaluate and export: the kept average if there is one, else the trained ones, `trainable`.

    The average is that of `with_average`, unless use_average is False, or the averaged sequence x of schedule-free
    training, which takes its gradients at other weights (arXiv:2405.15682).
    """
    kinds = (AverageState, ScheduleFreeState)
    for part in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(part, AverageState):
            return part.average if use_average else evaluation_params(part.inner, trainable)
        if isinstance(part, ScheduleFreeState):
            return schedule_free_eval_params(part, trainable)
    return trainable
