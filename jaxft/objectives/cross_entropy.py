"""Sums of token losses from hidden vectors: cross-entropy and its variants, a chunk of positions at a time.

Each chunk's gradient is computed in the forward pass, where its logits are, so that the backward pass only scales it.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.objectives import vocabulary
from jaxft.objectives.token_loss import NLL, TokenLoss, TokenSums, sums_and_slope
from jaxft.objectives.vocabulary import Arrays, Dimensions, Unembed, VocabLayout

Head = list[jax.Array]
Gradients = tuple[Head | None, jax.Array]
# (logits_BCV, targets_BC, weights of positions [B, C, ...], mesh axes that split V) -> (sums, the gradient by the
# logits, [B, C, V], of the weighted sum that is differentiated), such as `partial(sums_and_slope, NLL)`.
SlopeOf = Callable[[jax.Array, jax.Array, jax.Array, tuple[str, ...]], tuple[TokenSums, jax.Array]]


def token_sums(
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    dimensions: Sequence[Dimensions] | None = None,
    chunk: int | None = None,
    loss: TokenLoss = NLL,
) -> TokenSums:
    """Weighted sums of the loss of every target, by default its cross-entropy.

    unembed(head, hidden [B, C, D]) -> logits [B, C, V] float32. targets_BS: int32. weights_BS: float32, 0 if a position
    is not trained. dimensions: of each stored leaf of the head, in the order of jax.tree.leaves. chunk: positions of
    each row in a chunk; None: as many as CHUNK_BYTES permits. `loss` is differentiable in head and hidden_BSD, and so
    is `nll` if it is the loss; the other sums have no gradient.
    """
    # As a plain list: nnx.Variable passes on the attributes of its value, which hides the boundary of a leaf.
    leaves, treedef = jax.tree.flatten(head)
    hidden_BSD = partition.gather(hidden_BSD, ("batch", "stream", None), ("batch", "sequence", None))

    def unembed_leaves(leaves: Head, hidden_BCD: jax.Array) -> jax.Array:
        return unembed(jax.tree.unflatten(treedef, leaves), hidden_BCD)

    vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
    layout = vocabulary.vocab_layout(leaves, targets_BS.shape, vocab, dimensions)
    return _token_sums(unembed_leaves, chunk, layout, loss, leaves, hidden_BSD, targets_BS, weights_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _token_sums(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    loss: TokenLoss,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
) -> TokenSums:
    compute = partial(_sums, unembed, chunk, layout, loss)
    if layout is not None:
        rows = (P(*layout.rows, None), layout.rows, layout.rows)
        compute = jax.shard_map(compute, in_specs=(list(layout.head), *rows), out_specs=P(), check_vma=False)
    return compute(head, hidden_BSD, targets_BS, weights_BS)


def _forward(unembed, chunk, layout, loss, head, hidden_BSD, targets_BS, weights_BS):  # type: ignore[no-untyped-def]
    # symbolic_zeros tells whether the head is trained; a frozen one gets no gradient computed.
    trained = any(leaf.perturbed for leaf in head)
    values = [leaf.value for leaf in head]
    slope_of, arrays = partial(sums_and_slope, loss), (hidden_BSD.value, targets_BS.value, weights_BS.value)
    sums, *gradients = sums_and_gradients(unembed, chunk, layout, slope_of, trained, values, *arrays)
    return sums, tuple(gradients)


def _backward(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    loss: TokenLoss,
    residuals: Gradients,
    cotangents: TokenSums,
) -> tuple[Head | None, jax.Array, None, None]:
    wanted = (cotangents.loss, cotangents.nll) if loss.plain else (cotangents.loss,)
    factor = sum((c for c in wanted if not isinstance(c, SymbolicZero)), start=jnp.float32(0))
    head_grad, grad_BSD = jax.tree.map(lambda g: g * factor.astype(g.dtype), residuals)
    return head_grad, grad_BSD, None, None


_token_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def sums_and_gradients(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    slope_of: SlopeOf,
    trained: bool,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
) -> tuple[TokenSums, Head | None, jax.Array]:
    """The sums, and the gradients by the head (None unless it is trained) and by hidden_BSD.

    slope_of: the sums and the gradient by the logits. weights_BS: [B, S, ...]; positions without any are left out.
    """
    compute = partial(_sums_and_gradients, unembed, chunk, layout, slope_of, trained)
    if layout is not None:
        hidden, rows = P(*layout.rows, None), layout.rows
        out = (P(), list(layout.head) if trained else None, hidden)
        compute = jax.shard_map(
            compute, in_specs=(list(layout.head), hidden, rows, rows), out_specs=out, check_vma=False
        )
    return compute(head, hidden_BSD, targets_BS, weights_BS)


def _sums(
    unembed: Unembed, chunk: int | None, layout: VocabLayout | None, loss: TokenLoss, head: Head, *arrays: jax.Array
) -> TokenSums:
    """From one device's rows; the sums are over all rows."""
    hidden_BSD, targets_BS, weights_BS = arrays
    head = vocabulary.gathered_head(head, layout, hidden_BSD.dtype)
    chunks, count, _ = vocabulary.chunked(unembed, chunk, layout, head, (hidden_BSD, targets_BS, weights_BS))

    def body(index: jax.Array, total: TokenSums) -> TokenSums:
        hidden_BCD, targets_BC, weights_BC = vocabulary.chunk_at(chunks, index, layout)
        logits_BCV = unembed(head, hidden_BCD)
        sums, _ = sums_and_slope(loss, logits_BCV, targets_BC, weights_BC, vocabulary.vocab_axes(layout))
        return jax.tree.map(jnp.add, total, sums)

    return vocabulary.over_rows(vocabulary.over_chunks(chunks, count, body, _zero_sums()), layout)


def _sums_and_gradients(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    slope_of: SlopeOf,
    trained: bool,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
) -> tuple[TokenSums, Head | None, jax.Array]:
    """From one device's rows: the sums over all rows, the gradient of its part of the head, that of its rows."""
    parts, head = head, vocabulary.gathered_head(head, layout, hidden_BSD.dtype)
    arrays: Arrays = (hidden_BSD, targets_BS, weights_BS)
    chunks, count, order_BS = vocabulary.chunked(unembed, chunk, layout, head, arrays)

    def body(index: jax.Array, carry: tuple[TokenSums, Head | None, jax.Array]) -> Any:
        total, head_grad, grads_JBCD = carry
        hidden_BCD, targets_BC, weights_BC = vocabulary.chunk_at(chunks, index, layout)
        inputs = (head, hidden_BCD) if trained else (hidden_BCD,)
        logits_BCV, pull = jax.vjp(unembed if trained else partial(unembed, head), *inputs)
        sums, slope_BCV = slope_of(logits_BCV, targets_BC, weights_BC, vocabulary.vocab_axes(layout))
        *part, grad_BCD = pull(slope_BCV)
        if trained:
            head_grad = jax.tree.map(lambda whole, x: whole + x.astype(whole.dtype), head_grad, part[0])
        own_BCD = vocabulary.own_gradient(grad_BCD, layout)
        grads_JBCD = jax.lax.dynamic_update_index_in_dim(grads_JBCD, own_BCD, index, 0)
        return jax.tree.map(jnp.add, total, sums), head_grad, grads_JBCD

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head) if trained else None
    start = (_zero_sums(), zero, jnp.zeros_like(chunks[0]))
    total, head_grad, grads_JBCD = vocabulary.over_chunks(chunks, count, body, start)
    reduced = None if head_grad is None else vocabulary.reduced_head_gradient(head_grad, parts, layout)
    return vocabulary.over_rows(total, layout), reduced, vocabulary.unchunked(grads_JBCD, order_BS)


def _zero_sums() -> TokenSums:
    return TokenSums(*(jnp.float32(0) for _ in TokenSums._fields))
