"""Rows exchanged between the shards of experts: each row goes to the expert that its token chose, and its answer back.

Rows are sorted by expert where they live, and arrive sorted by expert, so that both ways are one
`jax.lax.ragged_all_to_all` and nothing is sorted again. A shard receives rows into a window of `ROOM` times its even
share. If the rows for some shard do not fit, all devices take another turn with the next window of rows: no token is
dropped, and memory does not depend on the routers' choices.
"""

# R rows of a device (its tokens times the experts of one), D model, W rows of a window, S shards, C experts of a shard,
# E experts (S * C)

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EXPERT = "expert"
ROOM = 1.25  # of a window, in even shares
ALIGNMENT, LANES = 8, 128  # rows and columns of a tile of a TPU's memory
# (parameters, x [W, D] sorted by expert, sizes of the experts of this shard) -> [W, D]
Experts = Callable[[Sequence[jax.Array], jax.Array, jax.Array], jax.Array]


def contiguous(x_MD: jax.Array) -> jax.Array:
    """x as [M, D / 128, 128], each row of which is in one piece in a TPU's memory, as it is sent; [M, 1, D] otherwise.

    In the usual layout of [M, D], tiles have parts of several rows.
    """
    rows, width = x_MD.shape
    return x_MD.reshape(rows, -1, width if width % LANES else LANES)


class Slices(NamedTuple):
    """What a device sends: C slices for each shard, int32 [E]. sizes and received in rows; to: places at receivers."""

    starts: jax.Array
    sizes: jax.Array
    to: jax.Array
    received: jax.Array


def window_rows(rows: int, shards: int, most: int) -> int:
    """Rows of a window. rows: of each device, one for each choice of a token. most: of these for one shard."""
    share = -(-int(ROOM * rows) // ALIGNMENT) * ALIGNMENT
    return min(share, shards * most)


def over_shards(
    experts: Experts, parameters: Sequence[jax.Array], rows_RD: jax.Array, sizes_E: jax.Array, most: int
) -> jax.Array:
    """The outputs of rows sorted by expert, each computed on its expert's shard. rows_RD: of tokens made `contiguous`.

    sizes_E: rows of this device for every expert. most: rows of a device that can be for one shard. For use under
    an unchecked `jax.shard_map`, with `experts` computing those of the shard.
    """
    counts_SE = jax.lax.all_gather(sizes_E, EXPERT)
    window = window_rows(len(rows_RD), len(counts_SE), most)
    answers_RD = _turn(experts, window, parameters, counts_SE, rows_RD, 0)
    if window == len(counts_SE) * most:
        return answers_RD
    return _further_turns(experts, window, list(parameters), counts_SE, rows_RD, answers_RD)


def _turn(
    experts: Experts,
    window: int,
    parameters: Sequence[jax.Array],
    counts_SE: jax.Array,
    rows_RD: jax.Array,
    turn: int | jax.Array,
) -> jax.Array:
    """Outputs of the rows in one turn's window; zero for the others."""
    there, back, sizes_C = _slices(counts_SE, window, turn)
    x_WD = _sent(window, rows_RD, there, back)
    y_WD = experts(parameters, x_WD.reshape(window, -1), sizes_C).reshape(x_WD.shape)
    return _sent(len(rows_RD), y_WD, back, there)


def _slices(counts_SE: jax.Array, window: int, turn: int | jax.Array) -> tuple[Slices, Slices, jax.Array]:
    """The slices that a device sends to the experts and back in a turn, and the rows of each of its experts then.

    counts_SE: rows of every device for every expert. A shard's rows have places by expert, then by device; a turn takes
    those from `turn * window` on.
    """
    shards, experts = counts_SE.shape
    own = jax.lax.axis_index(EXPERT)
    totals_SC = counts_SE.sum(axis=0).reshape(shards, -1)
    first_E = (jnp.cumsum(totals_SC, axis=1) - totals_SC).reshape(-1)
    positions_SE = first_E + jnp.cumsum(counts_SE, axis=0) - counts_SE
    before_SE = jnp.clip(turn * window - positions_SE, 0, counts_SE)
    sizes_SE = jnp.clip((turn + 1) * window - positions_SE, 0, counts_SE) - before_SE
    home_SE = jnp.cumsum(counts_SE, axis=1) - counts_SE + before_SE
    # Slices of no rows still need places within the arrays.
    away_SE = jnp.where(sizes_SE > 0, positions_SE + before_SE - turn * window, 0)
    home_SE = jnp.where(sizes_SE > 0, home_SE, 0)

    def of_own_experts(table_SE: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(table_SE, own * (experts // shards), experts // shards, axis=1)

    sent_E, received_SC = sizes_SE[own], of_own_experts(sizes_SE)
    there = Slices(home_SE[own], sent_E, away_SE[own], received_SC.reshape(-1))
    back = Slices(of_own_experts(away_SE).reshape(-1), there.received, of_own_experts(home_SE).reshape(-1), sent_E)
    return there, back, received_SC.sum(axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sent(length: int, x: jax.Array, there: Slices, back: Slices) -> jax.Array:
    """What a device receives if all send these slices of x, [length, D], zero elsewhere. back: the way of gradients."""
    empty = jnp.zeros((length, *x.shape[1:]), x.dtype)
    return jax.lax.ragged_all_to_all(x, empty, there.starts, there.sizes, there.to, there.received, axis_name=EXPERT)


def _sent_forward(length: int, x: jax.Array, there: Slices, back: Slices) -> tuple[jax.Array, Any]:
    return _sent(length, x, there, back), (len(x), there, back)


def _sent_backward(length: int, residuals: Any, grad: jax.Array) -> tuple[jax.Array, None, None]:
    rows, there, back = residuals
    return _sent(rows, grad, back, there), None, None


_sent.defvjp(_sent_forward, _sent_backward)


def _turns(counts_SE: jax.Array, window: int) -> jax.Array:
    """Turns until all rows of all devices of the mesh were sent."""
    shards = len(counts_SE)
    most = counts_SE.sum(axis=0).reshape(shards, -1).sum(axis=1).max()
    return jax.lax.pmax(-(-most // window), jax.sharding.get_abstract_mesh().axis_names)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_turns(
    experts: Experts,
    window: int,
    parameters: list[jax.Array],
    counts_SE: jax.Array,
    rows_RD: jax.Array,
    answers_RD: jax.Array,
) -> jax.Array:
    """The answers of the first turn and of those that follow it. Nothing of these is kept for the backward pass."""

    def turn(at: jax.Array, answers_RD: jax.Array) -> jax.Array:
        return answers_RD + _turn(experts, window, parameters, counts_SE, rows_RD, at)

    # As a rule there are none, which the name says to `hardware.trips`.
    with jax.named_scope("turns_at_most_0"):
        return jax.lax.fori_loop(1, _turns(counts_SE, window), turn, answers_RD)


def _further_forward(experts: Experts, window: int, *operands: Any) -> tuple[jax.Array, Any]:
    parameters, counts_SE, rows_RD, answers_RD = operands
    values = [one.value for one in parameters]
    trained = [one.value if one.perturbed else None for one in parameters]
    frozen = [None if one.perturbed else one.value for one in parameters]
    y_RD = _further_turns(experts, window, values, counts_SE.value, rows_RD.value, answers_RD.value)
    return y_RD, (trained, frozen, counts_SE.value, rows_RD.value)


def _further_backward(experts: Experts, window: int, residuals: Any, grad_RD: Any) -> tuple[Any, ...]:
    trained, frozen, counts_SE, rows_RD = residuals
    if isinstance(grad_RD, jax.custom_derivatives.SymbolicZero):
        return [None for _ in trained], None, None, None

    def turn(at: jax.Array, sums: Any) -> Any:
        def answers(trained: list[jax.Array | None], rows_RD: jax.Array) -> jax.Array:
            parameters = [old if new is None else new for new, old in zip(trained, frozen, strict=True)]
            return _turn(experts, window, parameters, counts_SE, rows_RD, at)

        _, transpose = jax.vjp(answers, trained, rows_RD)
        return jax.tree.map(jnp.add, sums, transpose(grad_RD))

    zeros = jax.tree.map(jnp.zeros_like, (trained, rows_RD))
    with jax.named_scope("turns_at_most_0"):
        grads, grad_rows_RD = jax.lax.fori_loop(1, _turns(counts_SE, window), turn, zeros)
    return grads, None, grad_rows_RD, grad_RD


_further_turns.defvjp(_further_forward, _further_backward, symbolic_zeros=True)
