"""Cross-entropy from hidden vectors, in chunks: whole [B, S, V] logits never exist.

Each chunk's gradient is computed where its logits are, in the forward pass, so the backward pass has
only to scale it. Trained positions are gathered to the front of their rows first; chunks without any
are skipped, so a prompt costs no vocabulary products.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Unembed = Callable[[Any, jax.Array], jax.Array]
# Bytes of float32 logits that a chunk may hold.
CHUNK_BYTES = 64 * 2**20


class TokenSums(NamedTuple):
    """Sums over trained tokens, float32 scalars: of -log p, in nats, and of `target == argmax`."""

    nll: jax.Array
    correct: jax.Array


def token_sums(
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    chunk: int | None = None,
) -> TokenSums:
    """Weighted sums of the cross-entropy of every target.

    unembed(head, hidden [B, C, D]) -> logits [B, C, V] float32. targets_BS: int32. weights_BS: float32,
    0 where a position is not trained. chunk: positions of each row a chunk; by CHUNK_BYTES where None.
    Differentiable in head and hidden_BSD; `correct` has no gradient.
    """
    if chunk is None:
        vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
        chunk = CHUNK_BYTES // (4 * vocab * hidden_BSD.shape[0])
    chunk = max(1, min(chunk, hidden_BSD.shape[1]))
    # As a plain list: nnx.Variable answers for its value's attributes, which hides where a leaf begins.
    leaves, treedef = jax.tree.flatten(head)

    def unembed_leaves(leaves: list[jax.Array], hidden_BCD: jax.Array) -> jax.Array:
        return unembed(treedef.unflatten(leaves), hidden_BCD)

    return _token_sums(unembed_leaves, chunk, leaves, hidden_BSD, targets_BS, weights_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_sums(unembed, chunk, head, hidden_BSD, targets_BS, weights_BS):
    def sums(carry, piece):
        return jax.tree.map(jnp.add, carry, _where_trained(partial(_chunk_sums, unembed, head), TokenSums, piece)), None

    order_BS = _trained_first(weights_BS)
    pieces = [_chunks(_gather(x, order_BS), chunk) for x in (hidden_BSD, targets_BS, weights_BS)]
    zero = TokenSums(jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(sums, zero, tuple(pieces))[0]


def _forward(unembed, chunk, head, hidden_BSD, targets_BS, weights_BS):
    # symbolic_zeros tells whether the head moves; a frozen one gets no gradient computed.
    head_moves = any(leaf.perturbed for leaf in head)
    head = [leaf.value for leaf in head]
    hidden_BSD, targets_BS, weights_BS = hidden_BSD.value, targets_BS.value, weights_BS.value

    def chunk_grads(hidden_BCD, targets_BC, weights_BC):
        wrt = (0, 1) if head_moves else (1,)
        value_and_grad = jax.value_and_grad(
            lambda head, hidden: _chunk_sums(unembed, head, hidden, targets_BC, weights_BC), argnums=wrt, has_aux=True
        )
        (_, sums), grads = value_and_grad(head, hidden_BCD)
        return sums, grads[-1], grads[0] if head_moves else None

    def nothing(hidden_BCD, targets_BC, weights_BC):
        head_zero = jax.tree.map(jnp.zeros_like, head) if head_moves else None
        return TokenSums(jnp.float32(0), jnp.float32(0)), jnp.zeros_like(hidden_BCD), head_zero

    def step(carry, piece):
        total, head_grad = carry
        sums, hidden_grad_BCD, part = jax.lax.cond(jnp.any(piece[2] != 0), chunk_grads, nothing, *piece)
        total = jax.tree.map(jnp.add, total, sums)
        return (total, jax.tree.map(jnp.add, head_grad, part)), hidden_grad_BCD

    order_BS = _trained_first(weights_BS)
    pieces = tuple(_chunks(_gather(x, order_BS), chunk) for x in (hidden_BSD, targets_BS, weights_BS))
    zero = TokenSums(jnp.float32(0), jnp.float32(0))
    head_zero = jax.tree.map(jnp.zeros_like, head) if head_moves else None
    (sums, head_grad), grads_JBCD = jax.lax.scan(step, (zero, head_zero), pieces)
    batch, length, width = hidden_BSD.shape
    grad_BSD = jnp.swapaxes(grads_JBCD, 0, 1).reshape(batch, -1, width)[:, :length]
    back_BS = jnp.argsort(order_BS, axis=1)
    return sums, (head_grad, _gather(grad_BSD, back_BS))


def _backward(unembed, chunk, residuals, cotangents):
    head_grad, grad_BSD = jax.tree.map(lambda g: g * cotangents.nll.astype(g.dtype), residuals)
    return head_grad, grad_BSD, None, None


_token_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _where_trained(compute, empty, piece):
    zero = empty(jnp.float32(0), jnp.float32(0))
    return jax.lax.cond(jnp.any(piece[2] != 0), lambda *p: compute(*p)[1], lambda *p: zero, *piece)


def _chunk_sums(unembed, head, hidden_BCD, targets_BC, weights_BC):
    logits_BCV = unembed(head, hidden_BCD)
    top_BC1 = jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1, keepdims=True))
    logz_BC = jnp.log(jnp.sum(jnp.exp(logits_BCV - top_BC1), axis=-1)) + top_BC1[..., 0]
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll = jnp.sum((logz_BC - picked_BC) * weights_BC)
    # A target that reaches the maximum counts as predicted: no second pass for an argmax.
    correct = jnp.sum((jax.lax.stop_gradient(picked_BC) >= top_BC1[..., 0]) * weights_BC)
    return nll, TokenSums(nll, correct)


def _trained_first(weights_BS: jax.Array) -> jax.Array:
    return jnp.argsort(weights_BS == 0, axis=1, stable=True)


def _gather(x: jax.Array, order_BS: jax.Array) -> jax.Array:
    index = order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [J, B, C, ...], padded with zeros (weight 0) at the end."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 1)
