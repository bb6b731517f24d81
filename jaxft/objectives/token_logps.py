"""Log-probabilities of given tokens, a chunk of positions at a time: [B, S, V] logits never exist.

A token's log-probability depends on the hidden vector of its own position alone. If the head is frozen, the forward
pass therefore keeps the gradient of each log-probability by that vector, [B, S, D], and the backward pass only
multiplies it by the gradient that arrives: two vocabulary products in all, whatever the loss is. A trained head needs
its logits again in the backward pass, since its own gradient weights the positions by what arrives.

Entropies and log(sum of p squared) come from the same logits. Their values cost no further product; a gradient through
the entropies costs one more.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxft.objectives import vocabulary
from jaxft.objectives.cross_entropy import Head, Products, SlopeOf, sums_and_gradients
from jaxft.objectives.token_loss import NLL, TokenStatistics, TokenSums, statistics_and_slopes, values_and_slope
from jaxft.objectives.vocabulary import Dimensions, Unembed, VocabLayout

# What is computed: log-probabilities alone; also the other statistics; also the gradient through the entropies.
Kind = Literal["logps", "statistics", "entropy_gradient"]
# logps_BS alone, or all fields of TokenStatistics, [B, S] each.
Values = tuple[jax.Array, ...]
# The gradients of the log-probability, and of the entropy if it has one, by the hidden vector, [B, S, D] each.
Slopes = tuple[jax.Array, ...]


def token_logps(
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    temperature: float = 1.0,
    dimensions: Sequence[Dimensions] | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """The log-probability of every target in nats, [B, S] float32; 0 where mask_BS is 0.

    unembed(head, hidden [B, C, D]) -> logits [B, C, V] float32. targets_BS: int32. mask_BS: float32, 1 on the targets
    that are wanted. temperature: divides the logits; raises ValueError unless it is above zero. dimensions, chunk: as
    for `cross_entropy.token_sums`. Differentiable in head and hidden_BSD.
    """
    (logps_BS,) = _computed("logps", unembed, head, hidden_BSD, targets_BS, mask_BS, temperature, dimensions, chunk)
    return logps_BS


def token_statistics(
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    *,
    entropy_gradient: bool = False,
    temperature: float = 1.0,
    dimensions: Sequence[Dimensions] | None = None,
    chunk: int | None = None,
) -> TokenStatistics:
    """What `token_logps` gives, and of the same distributions their entropies in nats and log(sum over v of p_v^2).

    All are [B, S] float32, and 0 where mask_BS is 0. entropy_gradient: whether the entropies are differentiable in head
    and hidden_BSD, as the log-probabilities are; otherwise they are constants. log_sum_squares always is a constant.
    """
    kind: Kind = "entropy_gradient" if entropy_gradient else "statistics"
    return TokenStatistics(
        *_computed(kind, unembed, head, hidden_BSD, targets_BS, mask_BS, temperature, dimensions, chunk)
    )


def _computed(
    kind: Kind,
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    temperature: float,
    dimensions: Sequence[Dimensions] | None,
    chunk: int | None,
) -> Values:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} divides the logits, so it must be above zero")
    (unembed, leaves, layout), hidden_BSD = vocabulary.split_head(unembed, head, hidden_BSD, dimensions)

    def tempered(leaves: Head, hidden_BCD: jax.Array) -> jax.Array:
        logits_BCV = unembed(leaves, hidden_BCD)
        return logits_BCV if temperature == 1 else logits_BCV / temperature

    return _with_gradient(tempered, chunk, layout, kind, leaves, hidden_BSD, targets_BS, mask_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _with_gradient(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    kind: Kind,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
) -> Values:
    return _on_mesh(unembed, chunk, layout, kind, False, head, hidden_BSD, targets_BS, mask_BS)[0]


def _forward(unembed, chunk, layout, kind, head, hidden_BSD, targets_BS, mask_BS):  # type: ignore[no-untyped-def]
    # symbolic_zeros tells whether the head is trained.
    trained = any(leaf.perturbed for leaf in head)
    values = [leaf.value for leaf in head]
    arrays = (hidden_BSD.value, targets_BS.value, mask_BS.value)
    out, slopes = _on_mesh(unembed, chunk, layout, kind, not trained, values, *arrays)
    return out, ((values, *arrays) if trained else None, slopes)


def _backward(
    unembed: Unembed, chunk: int | None, layout: VocabLayout | None, kind: Kind, residuals: Any, cotangents: Any
) -> tuple[Head | None, jax.Array, None, None]:
    inputs, slopes = residuals
    cotangents = [jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c for c in cotangents]
    if inputs is None:
        # The slopes of logps and of entropies stand in the order of the values.
        parts = [slope * c[..., None].astype(slope.dtype) for slope, c in zip(slopes, cotangents, strict=False)]
        return None, sum(parts[1:], start=parts[0]), None, None
    head, hidden_BSD, targets_BS, mask_BS = inputs
    slope_of: SlopeOf = _logp_slope
    weights = cotangents[0] * mask_BS
    if kind == "entropy_gradient":
        slope_of, weights = _entropy_slope, jnp.stack(cotangents[:2], axis=-1) * mask_BS[..., None]
    products = Products(unembed, chunk, layout, slope_of, TokenSums)
    _, head_grad, grad_BSD = sums_and_gradients(products, True, head, [], (hidden_BSD, targets_BS, weights))
    return head_grad, grad_BSD, None, None


_with_gradient.defvjp(_forward, _backward, symbolic_zeros=True)


def _logp_slope(
    logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[TokenSums, jax.Array]:
    """`cross_entropy.SlopeOf` of the log-probabilities; the sums are not used."""
    _, slope_BCV = values_and_slope(NLL, logits_BCV, targets_BC, vocab)
    return _no_sums(), -slope_BCV * weights_BC[..., None]


def _entropy_slope(
    logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC2: jax.Array, vocab: tuple[str, ...]
) -> tuple[TokenSums, jax.Array]:
    """The same with weights of the log-probabilities and of the entropies."""
    _, slopes = statistics_and_slopes(logits_BCV, targets_BC, vocab)
    return _no_sums(), slopes[0] * weights_BC2[..., :1] + slopes[1] * weights_BC2[..., 1:]


def _no_sums() -> TokenSums:
    return TokenSums(*(jnp.float32(0) for _ in TokenSums._fields))


def _on_mesh(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    kind: Kind,
    with_slopes: bool,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
) -> tuple[Values, Slopes]:
    """(values, their gradients by hidden_BSD; none unless `with_slopes`)."""
    compute = partial(_values_and_slopes, unembed, chunk, layout, kind, with_slopes)
    if layout is not None:
        hidden, rows = P(*layout.rows, None), layout.rows
        # One spec serves all arrays of a tuple.
        compute = jax.shard_map(
            compute, in_specs=(list(layout.head), hidden, rows, rows), out_specs=(rows, hidden), check_vma=False
        )
    return compute(head, hidden_BSD, targets_BS, mask_BS)


def _values_and_slopes(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    kind: Kind,
    with_slopes: bool,
    head: Head,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
) -> tuple[Values, Slopes]:
    """The same on one device's rows."""
    head = vocabulary.gathered_head(head, layout, hidden_BSD.dtype)
    chunks, count, inverse_BS = vocabulary.chunked(unembed, chunk, layout, head, (hidden_BSD, targets_BS, mask_BS))
    axes = vocabulary.vocab_axes(layout)

    def body(index: jax.Array, carry: tuple[Values, Slopes]) -> tuple[Values, Slopes]:
        hidden_BCD, targets_BC, mask_BC = vocabulary.chunk_at(chunks, index, layout)
        if with_slopes:
            logits_BCV, pull = jax.vjp(partial(unembed, head), hidden_BCD)
        else:
            logits_BCV = unembed(head, hidden_BCD)
        values, slopes = _of_logits(kind, logits_BCV, targets_BC, axes)
        own = tuple(vocabulary.own_rows(value * mask_BC, layout) for value in values)
        pulled: Slopes = ()
        if with_slopes:
            gradients = (pull(slope * mask_BC[..., None])[0] for slope in slopes)
            pulled = tuple(vocabulary.own_gradient(gradient, layout) for gradient in gradients)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)

        return jax.tree.map(put, carry, (own, pulled))

    outputs, gradients = 1 if kind == "logps" else 3, 2 if kind == "entropy_gradient" else 1
    zeros, zero_slopes = jnp.zeros(chunks[2].shape, jnp.float32), jnp.zeros_like(chunks[0])
    start = ((zeros,) * outputs, (zero_slopes,) * (gradients if with_slopes else 0))
    values, slopes = vocabulary.over_chunks(chunks, count, body, start)
    return jax.tree.map(lambda x: vocabulary.unchunked(x, inverse_BS), (values, slopes))


def _of_logits(
    kind: Kind, logits_BCV: jax.Array, targets_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[Values, Slopes]:
    """(values of a chunk [B, C], the gradients by its logits [B, C, V] of those that have one)."""
    if kind == "logps":
        (_, nll_BC, _), slope_BCV = values_and_slope(NLL, logits_BCV, targets_BC, vocab)
        return (-nll_BC,), (-slope_BCV,)
    statistics, (logp_slope_BCV, entropy_slope_BCV) = statistics_and_slopes(logits_BCV, targets_BC, vocab)
    slopes = (logp_slope_BCV, entropy_slope_BCV) if kind == "entropy_gradient" else (logp_slope_BCV,)
    return tuple(statistics), slopes
