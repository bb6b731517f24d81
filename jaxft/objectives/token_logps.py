"""Log-probabilities of given tokens, a chunk of positions at a time: [B, S, V] logits never exist.

A token's log-probability depends on the hidden vector of its own position alone. If the head is frozen, the forward
pass therefore keeps the gradient of each log-probability by that vector, [B, S, D], and the backward pass only
multiplies it by the gradient that arrives: two vocabulary products in all, whatever the loss is. A trained head needs
its logits again in the backward pass, since its own gradient weights the positions by what arrives.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.objectives import vocabulary
from jaxft.objectives.cross_entropy import Head, sums_and_gradients
from jaxft.objectives.token_loss import NLL, values_and_slope
from jaxft.objectives.vocabulary import Dimensions, Unembed, VocabLayout


def token_logps(
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    dimensions: Sequence[Dimensions] | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """The log-probability of every target in nats, [B, S] float32; 0 where mask_BS is 0.

    unembed(head, hidden [B, C, D]) -> logits [B, C, V] float32. targets_BS: int32. mask_BS: float32, 1 on the targets
    that are wanted. dimensions, chunk: as for `cross_entropy.token_sums`. Differentiable in head and hidden_BSD.
    """
    leaves, treedef = jax.tree.flatten(head)
    hidden_BSD = partition.gather(hidden_BSD, ("batch", "stream", None), ("batch", "sequence", None))

    def unembed_leaves(leaves: Head, hidden_BCD: jax.Array) -> jax.Array:
        return unembed(jax.tree.unflatten(treedef, leaves), hidden_BCD)

    vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
    layout = vocabulary.vocab_layout(leaves, targets_BS.shape, vocab, dimensions)
    return _token_logps(unembed_leaves, chunk, layout, leaves, hidden_BSD, targets_BS, mask_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_logps(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
) -> jax.Array:
    return _on_mesh(unembed, chunk, layout, False, head, hidden_BSD, targets_BS, mask_BS)[0]


def _forward(unembed, chunk, layout, head, hidden_BSD, targets_BS, mask_BS):  # type: ignore[no-untyped-def]
    # symbolic_zeros tells whether the head is trained.
    trained = any(leaf.perturbed for leaf in head)
    values = [leaf.value for leaf in head]
    arrays = (hidden_BSD.value, targets_BS.value, mask_BS.value)
    logps_BS, slope_BSD = _on_mesh(unembed, chunk, layout, not trained, values, *arrays)
    return logps_BS, ((values, *arrays) if trained else None, slope_BSD)


def _backward(
    unembed: Unembed, chunk: int | None, layout: VocabLayout | None, residuals: Any, cotangent_BS: jax.Array
) -> tuple[Head | None, jax.Array, None, None]:
    inputs, slope_BSD = residuals
    if inputs is None:
        return None, slope_BSD * cotangent_BS[..., None].astype(slope_BSD.dtype), None, None
    head, hidden_BSD, targets_BS, mask_BS = inputs
    # The sum of cotangent * log p is a sum of cross-entropies with weights of the other sign.
    weights_BS = -cotangent_BS * mask_BS
    _, head_grad, grad_BSD = sums_and_gradients(
        unembed, chunk, layout, NLL, True, head, hidden_BSD, targets_BS, weights_BS
    )
    return head_grad, grad_BSD, None, None


_token_logps.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    slopes: bool,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """(logps_BS, their gradients by hidden_BSD if `slopes`)."""
    compute = partial(_logps, unembed, chunk, layout, slopes)
    if layout is not None:
        hidden, rows = P(*layout.rows, None), layout.rows
        in_specs, out_specs = (list(layout.head), hidden, rows, rows), (rows, hidden if slopes else None)
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return compute(head, hidden_BSD, targets_BS, mask_BS)


def _logps(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    slopes: bool,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """The same on one device's rows."""
    head = vocabulary.gathered_head(head, layout, hidden_BSD.dtype)
    chunks, count, order_BS = vocabulary.chunked(unembed, chunk, layout, head, (hidden_BSD, targets_BS, mask_BS))
    axes = vocabulary.vocab_axes(layout)

    def body(index: jax.Array, carry: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        logps_JBC, slopes_JBCD = carry
        hidden_BCD, targets_BC, mask_BC = vocabulary.chunk_at(chunks, index, layout)
        if slopes_JBCD is None:
            (_, nll_BC, _), _ = values_and_slope(NLL, unembed(head, hidden_BCD), targets_BC, axes)
        else:
            logits_BCV, pull = jax.vjp(partial(unembed, head), hidden_BCD)
            (_, nll_BC, _), slope_BCV = values_and_slope(NLL, logits_BCV, targets_BC, axes)
            (slope_BCD,) = pull(-slope_BCV * mask_BC[..., None])
            own_BCD = vocabulary.own_gradient(slope_BCD, layout)
            slopes_JBCD = jax.lax.dynamic_update_index_in_dim(slopes_JBCD, own_BCD, index, 0)
        own_BC = vocabulary.own_rows(-nll_BC * mask_BC, layout)
        return jax.lax.dynamic_update_index_in_dim(logps_JBC, own_BC, index, 0), slopes_JBCD

    start = (jnp.zeros(chunks[2].shape, jnp.float32), jnp.zeros_like(chunks[0]) if slopes else None)
    logps_JBC, slopes_JBCD = vocabulary.over_chunks(chunks, count, body, start)
    slope_BSD = None if slopes_JBCD is None else vocabulary.unchunked(slopes_JBCD, order_BS)
    return vocabulary.unchunked(logps_JBC, order_BS), slope_BSD
