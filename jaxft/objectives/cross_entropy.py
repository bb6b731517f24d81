"""Sums of token losses from hidden vectors: cross-entropy and its variants, a chunk of positions at a time.

Each chunk's gradient is computed in the forward pass, where its logits are, so that the backward pass only scales it.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxft.objectives import vocabulary
from jaxft.objectives.token_loss import NLL, TokenLoss, TokenSums, sums_and_slope
from jaxft.objectives.vocabulary import Arrays, Dimensions, Unembed, VocabLayout

Head = list[jax.Array]
Gradients = tuple[Head | None, jax.Array]
# A NamedTuple of float32 scalars; the first of them is the loss, which alone is differentiated.
Sums = Any
# (logits_BCV, what is given about the positions, such as targets_BC, weights of positions [B, C, ...], mesh axes that
# split V) -> (sums, the gradient of the weighted loss by the logits, [B, C, V]): `partial(sums_and_slope, NLL)`.
SlopeOf = Callable[[jax.Array, Any, jax.Array, tuple[str, ...]], tuple[Sums, jax.Array]]


class FrozenHead(NamedTuple):
    """The head of another model over the same vocabulary. The first array that is given about positions is the hidden
    vectors of that model, [B, S, E]; `SlopeOf` gets their logits, [B, C, V], in its place.
    """

    unembed: Unembed
    layout: VocabLayout | None


class Products(NamedTuple):
    """How sums are computed: the head, the positions of each row in a chunk (None: as many as CHUNK_BYTES permits), the
    layout on the mesh, the function of the logits, and the type of its sums.
    """

    unembed: Unembed
    chunk: int | None
    layout: VocabLayout | None
    slope_of: SlopeOf
    sums: type[Any]
    frozen_head: FrozenHead | None = None

    def zero(self) -> Sums:
        """Sums over no positions."""
        return self.sums(*(jnp.float32(0) for _ in self.sums._fields))


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
    split, hidden_BSD = vocabulary.split_head(unembed, head, hidden_BSD, dimensions)
    products = Products(split.unembed, chunk, split.layout, partial(sums_and_slope, loss), TokenSums)
    sums = differentiable_sums(products, split.leaves, [], (hidden_BSD, targets_BS, weights_BS))
    return sums._replace(nll=sums.loss) if loss.plain else sums


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable_sums(products: Products, head: Head, frozen: Head, arrays: Arrays) -> Sums:
    """The sums over all rows; the loss is differentiable in head and hidden vectors.

    frozen: leaves of `products.frozen_head`, if there is one. arrays: (hidden_BSD, given, weights_BS); positions
    without a weight are left out.
    """
    compute, layout = partial(_sums, products), products.layout
    if layout is not None:
        compute = jax.shard_map(compute, in_specs=_specs(products, layout), out_specs=P(), check_vma=False)
    return compute(head, frozen, arrays)


def _forward(products, head, frozen, arrays):  # type: ignore[no-untyped-def]
    # symbolic_zeros tells whether the head is trained; a frozen one gets no gradient computed.
    trained = any(leaf.perturbed for leaf in head)
    values = jax.tree.map(lambda x: x.value, (head, frozen, arrays), is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    sums, *gradients = sums_and_gradients(products, trained, *values)
    return sums, tuple(gradients)


def _backward(
    products: Products, residuals: Gradients, cotangents: Sums
) -> tuple[Head | None, None, tuple[jax.Array, None, None]]:
    factor = jnp.float32(0) if isinstance(cotangents[0], SymbolicZero) else cotangents[0]
    head_grad, grad_BSD = jax.tree.map(lambda g: g * factor.astype(g.dtype), residuals)
    return head_grad, None, (grad_BSD, None, None)


differentiable_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def sums_and_gradients(
    products: Products, trained: bool, head: Head, frozen: Head, arrays: Arrays
) -> tuple[Sums, Head | None, jax.Array]:
    """The sums, and the gradients by the head (None unless it is trained) and by the hidden vectors.

    The other arguments are those of `differentiable_sums`; weights may be [B, S, ...].
    """
    compute = partial(_sums_and_gradients, products, trained)
    layout = products.layout
    if layout is not None:
        out = (P(), list(layout.head) if trained else None, P(*layout.rows, None))
        compute = jax.shard_map(compute, in_specs=_specs(products, layout), out_specs=out, check_vma=False)
    return compute(head, frozen, arrays)


def _specs(products: Products, layout: VocabLayout) -> tuple[Any, ...]:
    """Of (head, frozen, arrays)."""
    other = None if products.frozen_head is None else products.frozen_head.layout
    return list(layout.head), [] if other is None else list(other.head), layout.rows


def _with_frozen_logits(products: Products, frozen: Head, given: Any) -> Any:
    """What is given about a chunk's positions, with the logits of the other head in place of its hidden vectors."""
    other = products.frozen_head
    return given if other is None else (other.unembed(frozen, given[0]), *given[1:])


def _gathered(products: Products, head: Head, frozen: Head, dtype: jnp.dtype) -> tuple[Head, Head]:
    other = None if products.frozen_head is None else products.frozen_head.layout
    return (
        vocabulary.gathered_head(head, products.layout, dtype),
        vocabulary.gathered_head(frozen, other, dtype),
    )


def _sums(products: Products, head: Head, frozen: Head, arrays: Arrays) -> Sums:
    """From one device's rows; the sums are over all rows."""
    layout = products.layout
    head, frozen = _gathered(products, head, frozen, arrays[0].dtype)
    chunks, count, _ = vocabulary.chunked(products.unembed, products.chunk, layout, head, arrays)

    def body(index: jax.Array, total: Sums) -> Sums:
        hidden_BCD, given, weights_BC = vocabulary.chunk_at(chunks, index, layout)
        logits_BCV = products.unembed(head, hidden_BCD)
        given = _with_frozen_logits(products, frozen, given)
        sums, _ = products.slope_of(logits_BCV, given, weights_BC, vocabulary.vocab_axes(layout))
        return jax.tree.map(jnp.add, total, sums)

    return vocabulary.over_rows(vocabulary.over_chunks(chunks, count, body, products.zero()), layout)


def _sums_and_gradients(
    products: Products, trained: bool, head: Head, frozen: Head, arrays: Arrays
) -> tuple[Sums, Head | None, jax.Array]:
    """From one device's rows: the sums over all rows, the gradient of its part of the head, that of its rows."""
    unembed, layout, parts = products.unembed, products.layout, head
    head, frozen = _gathered(products, head, frozen, arrays[0].dtype)
    chunks, count, inverse_BS = vocabulary.chunked(unembed, products.chunk, layout, head, arrays)

    def body(index: jax.Array, carry: tuple[Sums, Head | None, jax.Array]) -> Any:
        total, head_grad, grads_JBCD = carry
        hidden_BCD, given, weights_BC = vocabulary.chunk_at(chunks, index, layout)
        inputs = (head, hidden_BCD) if trained else (hidden_BCD,)
        logits_BCV, pull = jax.vjp(unembed if trained else partial(unembed, head), *inputs)
        given = _with_frozen_logits(products, frozen, given)
        sums, slope_BCV = products.slope_of(logits_BCV, given, weights_BC, vocabulary.vocab_axes(layout))
        *part, grad_BCD = pull(slope_BCV)
        if trained:
            head_grad = jax.tree.map(lambda whole, x: whole + x.astype(whole.dtype), head_grad, part[0])
        own_BCD = vocabulary.own_gradient(grad_BCD, layout)
        grads_JBCD = jax.lax.dynamic_update_index_in_dim(grads_JBCD, own_BCD, index, 0)
        return jax.tree.map(jnp.add, total, sums), head_grad, grads_JBCD

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head) if trained else None
    start = (products.zero(), zero, jnp.zeros_like(chunks[0]))
    total, head_grad, grads_JBCD = vocabulary.over_chunks(chunks, count, body, start)
    reduced = None if head_grad is None else vocabulary.reduced_head_gradient(head_grad, parts, layout)
    return vocabulary.over_rows(total, layout), reduced, vocabulary.unchunked(grads_JBCD, inverse_BS)
