"""One optimizer step: pure, jitted once, its state donated."""

# B batch, S sequence, A accumulation steps

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft.objectives.sft import Loss, LossSums
from jaxft.training.state import TrainState
from jaxft.trees import path_str

NAMES = {"correct": "mean_token_accuracy"}  # what a sum of the loss is called once it is a mean

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graphdef: Any,
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    accumulation_steps: int = 1,
    gradient_dtype: jnp.dtype = jnp.float32,
) -> Step:
    """`train_step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    gradient_dtype: of the gradients of matrices, in their sum over devices and until the update, which is float32; the
    matrices are rounded to it first, as layers that compute in it do anyhow. Gradients of experts' matrices and of
    adapters are summed over devices in the type of computation, whatever it is. Gradients of micro-batches add up in
    float32.
    batch: a pytree of [B, ...] arrays, B a multiple of accumulation_steps. The gradient is that of
    (sum of losses) / (sum of weights) over the whole batch, however it is cut into micro-batches.
    metrics: loss (nats per trained token), grad_norm (before clipping), learning_rate,
    mean_token_accuracy, num_tokens and trained_tokens of this step, and what else the loss reports;
    all float32 scalars.
    """

    def total(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = loss(nnx.merge(graphdef, trainable, frozen), batch, key)
        return sums.total, sums

    def gradients(state: TrainState, batch: Any) -> tuple[Any, LossSums]:
        key = jax.random.fold_in(state.key, state.step)
        grad = jax.grad(total, has_aux=True)
        moving = rounded(state.trainable, gradient_dtype)
        if accumulation_steps == 1:
            return grad(moving, state.frozen, batch, jax.random.fold_in(key, 0))

        def add(carry: Any, scanned: Any) -> tuple[Any, None]:
            index, micro = scanned
            part = grad(moving, state.frozen, micro, jax.random.fold_in(key, index))
            return jax.tree.map(lambda whole, x: whole + x.astype(whole.dtype), carry, part), None

        micro_batches = jax.tree.map(lambda x: _cut(x, accumulation_steps), batch)
        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(grad, state.trainable, state.frozen, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(accumulation_steps), micro_batches))[0]

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = gradients(state, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        metrics = {
            "loss": sums.total / sums.weight,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.float32(schedule(state.step)),
            "num_tokens": sums.metrics["tokens"],
            "trained_tokens": sums.weight,
            **{NAMES.get(name, name): total / sums.weight for name, total in sums.metrics.items() if name != "tokens"},
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, state.key), metrics

    return train_step


def rounded(trainable: Any, dtype: jnp.dtype) -> Any:
    """Trainable parameters with the matrices of the model itself in `dtype`; norms and adapters stay as they are."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path_str(path).rsplit("/", 1)[-1] in ("kernel", "embedding") else x

    return jax.tree_util.tree_map_with_path(cast, trainable)


def make_eval_step(graphdef: Any, loss: Loss) -> Callable[[Any, Any, Any], LossSums]:
    """`eval_step(trainable, frozen, batch) -> LossSums` without dropout, to be jitted by the caller."""

    def eval_step(trainable: Any, frozen: Any, batch: Any) -> LossSums:
        return loss(nnx.merge(graphdef, trainable, frozen), batch, None)

    return eval_step


def _cut(x: jax.Array, parts: int) -> jax.Array:
    # Row b goes to micro-batch b % parts, so that each device's rows spread over all of them.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
