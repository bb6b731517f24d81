"""One optimizer step: pure, jitted once, its state donated."""

# B batch, S sequence, A accumulation steps

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import kind_of
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.training.state import TrainState
from jaxft.trees import path_str

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graphdef: nnx.GraphDef[Decoder],
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int = 1,
    gradient_dtype: DTypeLike = jnp.float32,
) -> Step:
    """`train_step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    gradient_dtype: the type of matrices' gradients while they are summed over devices and until the update, which is in
    float32. The matrices are rounded to it first, as layers that compute in it do anyway. Gradients of experts'
    matrices and of adapters are summed over devices in the type of computation. Gradients of micro-batches add up in
    float32.
    batch: a pytree of [B, ...] arrays, B a multiple of accumulation_steps. The gradient is that of
    (sum of losses) / (sum of weights) over the whole batch, however it is cut into micro-batches.
    metrics, float32 scalars: loss, grad_norm (before clipping), learning_rate, num_tokens and trained_tokens of this
    step, and the metrics of the loss.
    """

    def total(trainable: nnx.State, state: TrainState, batch: Any, key: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = loss(nnx.merge(graphdef, trainable, state.frozen), batch, key, state.method)
        return sums.total, sums

    def gradients(state: TrainState, batch: Any) -> tuple[Any, LossSums]:
        key = jax.random.fold_in(state.key, state.step)
        grad = jax.grad(total, has_aux=True)
        trainable = rounded(state.trainable, gradient_dtype)
        if accumulation_steps == 1:
            return grad(trainable, state, batch, jax.random.fold_in(key, 0))

        def add(carry: Any, scanned: Any) -> tuple[Any, None]:
            index, micro = scanned
            part = grad(trainable, state, micro, jax.random.fold_in(key, index))
            return jax.tree.map(lambda whole, x: whole + x.astype(whole.dtype), carry, part), None

        micro_batches = jax.tree.map(lambda x: _cut(x, accumulation_steps), batch)
        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(grad, state.trainable, state, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation_steps), micro_batches))[0]

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = gradients(state, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        means = sums.means()
        metrics = {
            "loss": means.pop("loss"),
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.float32(schedule(state.step)),
            "num_tokens": sums.tokens,
            "trained_tokens": sums.trained_tokens,
            **means,
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return train_step


def rounded(trainable: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Trainable parameters with the matrices of the model itself in `dtype`; norms and adapters stay as they are."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype) if kind_of(path_str(path), x.ndim).base_matrix else x

    return jax.tree_util.tree_map_with_path(cast, trainable)


def make_eval_step(graphdef: nnx.GraphDef[Decoder], loss: Loss) -> Callable[..., LossSums]:
    """`eval_step(trainable, frozen, method_state, batch) -> LossSums` without dropout, to be jitted by the caller."""

    def eval_step(trainable: nnx.State, frozen: nnx.State, method: MethodState | None, batch: Any) -> LossSums:
        return loss(nnx.merge(graphdef, trainable, frozen), batch, None, method)

    return eval_step


def _cut(x: jax.Array, parts: int) -> jax.Array:
    # Row b goes to micro-batch b % parts, so that each device's rows spread over all of them.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
