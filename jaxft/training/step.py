"""One optimizer step: pure, jitted once, its state donated."""

# B batch, S sequence, A accumulation steps

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import kind_of
from jaxft.objectives.loss import BatchSums, Loss, LossSums, MethodState, NextSaved, added, with_batch_sums
from jaxft.training.spikes import MEASURED, OnSpike
from jaxft.training.state import TrainState
from jaxft.trees import path_str

Limits = jax.Array | np.ndarray
# (state, batch, number of the first micro-batch in its step) -> (gradients, sums), neither of them divided.
Gradients = Callable[[TrainState, Any, jax.Array | int], tuple[Any, LossSums]]


class Step(Protocol):
    """One optimizer step."""

    def __call__(
        self, state: TrainState, batch: Any, limits: Limits | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]: ...


class Update(Protocol):
    """The second half of a step."""

    def __call__(
        self, state: TrainState, grads: Any, sums: LossSums, limits: Limits | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]: ...


def make_train_step(
    graphdef: nnx.GraphDef[Decoder],
    loss: Loss,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation_steps: int = 1,
    gradient_dtype: DTypeLike = jnp.float32,
    batch_sums: BatchSums | None = None,
    skips_empty: bool = False,
    next_saved: NextSaved | None = None,
    on_spike: OnSpike = "off",
) -> Step:
    """`train_step(state, batch, limits) -> (state, metrics)`, to be jitted by the caller.

    gradient_dtype: the type of matrices' gradients while they are summed over devices and until the update, which is in
    float32. The matrices are rounded to it first, as layers that compute in it do anyway. Gradients of experts'
    matrices and of adapters are summed over devices in the type of computation. Gradients of micro-batches add up in
    float32.
    batch_sums: sums over the whole batch that the loss of each micro-batch needs (`BatchSums`).
    skips_empty: whether a batch without a trained token leaves parameters and optimizer as they are (`_unless`), and
    the metric skipped_updates is then 1, otherwise 0. Without it, the loss of such a batch is not a number.
    next_saved: what becomes of the method's saved numbers after the step, also if its update is skipped.
    on_spike: what is done about a loss or gradient norm above limits, float32 [2] (`SpikeGuard.limits`), or one that is
    not finite, or an update after which the state would not be. `warn` makes the update; `skip` leaves it out, as of an
    empty batch; after `stop` the state is that before the step. The metric `spikes` is then 1, otherwise 0.
    batch: a pytree of [B, ...] arrays, B a multiple of accumulation_steps. The gradient is that of
    (sum of losses) / (sum of weights) over the whole batch, however it is cut into micro-batches.
    metrics, float32 scalars: loss, grad_norm (before clipping), learning_rate, num_tokens and trained_tokens of this
    step, and the metrics of the loss.
    """
    gradients = make_gradients(
        graphdef, loss, accumulation_steps=accumulation_steps, gradient_dtype=gradient_dtype, batch_sums=batch_sums
    )
    update = make_update(tx, schedule, skips_empty=skips_empty, on_spike=on_spike)

    def train_step(
        state: TrainState, batch: Any, limits: Limits | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        after, metrics = update(state, *gradients(state, batch, 0), limits)
        after = after._replace(method=_with_next_saved(state, batch, next_saved))
        if on_spike == "stop" and limits is not None:
            after = _undone(metrics["spikes"] > 0, after, state)
        return after, metrics

    return train_step


def make_gradients(
    graphdef: nnx.GraphDef[Decoder],
    loss: Loss,
    *,
    accumulation_steps: int = 1,
    gradient_dtype: DTypeLike = jnp.float32,
    batch_sums: BatchSums | None = None,
) -> Gradients:
    """`gradients(state, batch, first)`: the first half of a step; see `make_train_step` for the arguments.

    first: the number of the batch's first micro-batch in its step, from 0, by which dropout differs. Results of several
    batches of one step may be added up (`added`) before the update.
    """

    def total(trainable: nnx.State, state: TrainState, batch: Any, key: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = loss(nnx.merge(graphdef, trainable, state.frozen), batch, key, state.method)
        return sums.total, sums

    def gradients(state: TrainState, batch: Any, first: jax.Array | int) -> tuple[Any, LossSums]:
        trainable = rounded(state.trainable, gradient_dtype)
        sums = None if batch_sums is None else partial(batch_sums, nnx.merge(graphdef, trainable, state.frozen))
        grad = partial(jax.grad(total, has_aux=True), trainable)
        return _added_up(grad, sums, state, batch, accumulation_steps, first)

    return gradients


def make_update(
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    skips_empty: bool = False,
    on_spike: OnSpike = "off",
) -> Update:
    """`update(state, gradients, sums, limits) -> (state, metrics)`: the second half of `make_train_step`."""

    def update(
        state: TrainState, grads: Any, sums: LossSums, limits: Limits | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        empty = sums.trained_tokens == 0
        if skips_empty:
            sums = sums._replace(weight=sums.weight + (sums.weight == 0))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        metrics = {
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.float32(schedule(state.step)),
            "num_tokens": sums.tokens,
            "trained_tokens": sums.trained_tokens,
            **sums.means(),
        }
        trainable = optax.apply_updates(state.trainable, updates)
        after = state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)
        skipped = jnp.bool_(False)
        if skips_empty:
            skipped = empty
        if on_spike != "off" and limits is not None:
            spike = _is_spike(metrics, limits, after)
            metrics["spikes"] = spike.astype(jnp.float32)
            skipped = skipped | (spike & (on_spike == "skip"))
        if not (skips_empty or on_spike == "skip"):
            return after, metrics
        return _unless(skipped, after, state), metrics | {"skipped_updates": skipped.astype(jnp.float32)}

    return update


def _is_spike(metrics: dict[str, jax.Array], limits: Limits, after: TrainState) -> jax.Array:
    """Whether a metric is above its limit or not finite, or the state after the update is not finite."""
    measured = jnp.stack([metrics[name] for name in MEASURED])
    arrays = [x for x in jax.tree.leaves((after.trainable, after.opt_state)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in (measured, *arrays)])
    return ~(finite.all() & (measured <= limits).all())


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


def make_eval_sums(graphdef: nnx.GraphDef[Decoder], batch_sums: BatchSums) -> Callable[..., Any]:
    """`eval_sums(trainable, frozen, method_state, batch)`: `batch_sums` of one batch, to be jitted by the caller."""

    def eval_sums(trainable: nnx.State, frozen: nnx.State, method: MethodState | None, batch: Any) -> Any:
        return batch_sums(nnx.merge(graphdef, trainable, frozen), batch, method)

    return eval_sums


def _added_up(
    grad: Callable[[TrainState, Any, jax.Array], tuple[Any, LossSums]],
    batch_sums: Callable[[Any, MethodState | None], Any] | None,
    state: TrainState,
    batch: Any,
    parts: int,
    first_part: jax.Array | int,
) -> tuple[Any, LossSums]:
    """`grad(state, micro_batch, key)` added up over `parts` micro-batches, each of which knows the `batch_sums`."""
    key = jax.random.fold_in(state.key, state.step)
    if parts == 1:
        state = state if batch_sums is None else _with_batch_sums(state, batch_sums(batch, state.method))
        return grad(state, batch, jax.random.fold_in(key, first_part))
    micro_batches = jax.tree.map(lambda x: _cut(x, parts), batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if batch_sums is not None:
        whole = _scanned(lambda _, micro: batch_sums(micro, state.method), micro_batches, first)
        state = _with_batch_sums(state, whole)

    def part(index: jax.Array, micro: Any) -> tuple[Any, LossSums]:
        return grad(state, micro, jax.random.fold_in(key, index + first_part))

    return _scanned(part, micro_batches, first)


def _unless(skipped: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    """The state after a step; if its update is skipped, with the parameters and the optimizer of the state before.

    Neither momentum nor weight decay moves the parameters then, but the learning rate goes on by a step.
    """

    def is_schedule(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    def chosen(new: Any, old: Any) -> Any:
        # Otherwise the rate that is used would lag behind the rate of the step, which is logged.
        return new if is_schedule(new) else jnp.where(skipped, old, new)

    trainable = jax.tree.map(chosen, after.trainable, before.trainable)
    opt_state = jax.tree.map(chosen, after.opt_state, before.opt_state, is_leaf=is_schedule)
    return after._replace(trainable=trainable, opt_state=opt_state)


def _undone(undone: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    """The state after a step; if that is undone, the state before it, in all that a checkpoint has."""

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(undone, y, x), new, old)

    method = after.method
    if method is not None and before.method is not None and method.saved is not None:
        method = method._replace(saved=chosen(method.saved, before.method.saved))
    return after._replace(
        step=chosen(after.step, before.step),
        trainable=chosen(after.trainable, before.trainable),
        opt_state=chosen(after.opt_state, before.opt_state),
        method=method,
    )


def _with_next_saved(state: TrainState, batch: Any, next_saved: NextSaved | None) -> MethodState | None:
    """The method's arrays after a step."""
    if next_saved is None or state.method is None:
        return state.method
    return state.method._replace(saved=next_saved(state.method.saved, state.step, batch))


def _with_batch_sums(state: TrainState, sums: Any) -> TrainState:
    # For the loss alone: the state that a step returns never holds them.
    return state._replace(method=with_batch_sums(state.method, jax.lax.stop_gradient(sums)))


def _scanned(part: Callable[[jax.Array, Any], Any], micro_batches: Any, first: Any) -> Any:
    """`part(index, micro_batch)` added up over micro-batches (`added`), in float32."""
    shapes = jax.eval_shape(part, jnp.int32(0), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(carry: Any, scanned: Any) -> tuple[Any, None]:
        return added(carry, jax.tree.map(lambda x: x.astype(jnp.float32), part(*scanned))), None

    count = len(jax.tree.leaves(micro_batches)[0])
    return jax.lax.scan(add, zeros, (jnp.arange(count), micro_batches))[0]


def _cut(x: jax.Array, parts: int) -> jax.Array:
    # Row b goes to micro-batch b % parts, so that each device's rows spread over all of them.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
