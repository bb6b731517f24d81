"""Divergence between a teacher's and a student's distributions of the next token, a chunk of positions at a time.

The logits of both are computed from their hidden vectors in the same chunk, so that [B, S, V] logits of neither exist.
Only the student's have a gradient, which is computed in the forward pass, as in `cross_entropy`.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it, K largest
# log-probabilities, R those and the logarithm of the remaining probability

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxft.objectives import vocabulary
from jaxft.objectives.cross_entropy import FrozenHead, Products, differentiable_sums
from jaxft.objectives.token_loss import NLL, values_and_slope
from jaxft.objectives.vocabulary import Arrays, Dimensions, Unembed

# The smallest logarithm of a remaining probability: float32 has no smaller normal number.
SMALLEST = -87.0


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """(1 - sft_weight) D + sft_weight * -log q of the target, in nats, for a teacher p and a student q.

    D is the generalised Jensen-Shannon divergence (GKD, arXiv:2306.13649, eq. 1): beta KL(p||m) + (1 - beta) KL(q||m)
    with m = beta p + (1 - beta) q. As in TRL, beta = 0 is KL(p||q), forward, and beta = 1 is KL(q||p), reverse.
    temperature: divides both models' logits within D, but not those of -log q.
    """

    beta: float
    temperature: float = 1.0
    sft_weight: float = 0.0


class DivergenceSums(NamedTuple):
    """Sums over trained tokens, float32 scalars.

    loss: see `Divergence`. divergence: D in nats. nll: -log q of the targets at temperature 1. correct: number of
    targets that are the student's likeliest token. agreeing: number of positions at which that is the teacher's, too.
    """

    loss: jax.Array
    divergence: jax.Array
    nll: jax.Array
    correct: jax.Array
    agreeing: jax.Array


class Student(NamedTuple):
    """A head, its hidden vectors, and the targets. The fields are those of `cross_entropy.token_sums`."""

    unembed: Unembed
    head: Any
    hidden_BSD: jax.Array
    targets_BS: jax.Array
    weights_BS: jax.Array
    dimensions: Sequence[Dimensions] | None = None


class Teacher(NamedTuple):
    """A head with hidden vectors of any width, over the student's vocabulary."""

    unembed: Unembed
    head: Any
    hidden_BSD: jax.Array
    dimensions: Sequence[Dimensions] | None = None


class TopLogps(NamedTuple):
    """The largest log-probabilities of a distribution, under the temperature of the divergence.

    ids_BSK: int32, the likeliest first. logps_BSR: float32 in nats, those of the ids and, last, the logarithm of the
    probability of all other tokens together.
    """

    ids_BSK: jax.Array
    logps_BSR: jax.Array


def divergence_sums(
    student: Student, teacher: Teacher | TopLogps, divergence: Divergence, *, chunk: int | None = None
) -> DivergenceSums:
    """Weighted sums over the positions. `loss` is differentiable in the student's head and hidden vectors.

    With TopLogps, the divergence is that of distributions over the K tokens and one further outcome, any other token.
    chunk: as for `cross_entropy.token_sums`.
    """
    split, hidden_BSD = vocabulary.split_head(student.unembed, student.head, student.hidden_BSD, student.dimensions)
    given: tuple[jax.Array, ...]
    frozen: list[jax.Array] = []
    frozen_head, known = None, False
    if isinstance(teacher, TopLogps):
        given, known = (teacher.ids_BSK, teacher.logps_BSR, student.targets_BS), True
    else:
        # The teacher's vocabulary is split as the student's, since that depends on its size and on the rows alone.
        unembed, head, rows_BSD, dimensions = teacher
        other, rows_BSD = vocabulary.split_head(unembed, head, rows_BSD, dimensions if split.layout else None)
        frozen_head, frozen = FrozenHead(other.unembed, other.layout), jax.lax.stop_gradient(other.leaves)
        given = (jax.lax.stop_gradient(rows_BSD), student.targets_BS)
    slope_of = partial(_sums_and_slope_of_top if known else _sums_and_slope, divergence)
    products = Products(split.unembed, chunk, split.layout, slope_of, DivergenceSums, frozen_head)
    return differentiable_sums(products, split.leaves, frozen, (hidden_BSD, given, student.weights_BS))


def top_logps(
    teacher: Teacher, mask_BS: jax.Array, count: int, *, temperature: float = 1.0, chunk: int | None = None
) -> TopLogps:
    """The `count` largest log-probabilities at every position that mask_BS holds; zeros elsewhere. No gradient."""
    split, hidden_BSD = vocabulary.split_head(teacher.unembed, teacher.head, teacher.hidden_BSD, teacher.dimensions)
    layout = split.layout

    def compute(head: list[jax.Array], arrays: Arrays) -> TopLogps:
        head = vocabulary.gathered_head(head, layout, hidden_BSD.dtype)
        chunks, turns, inverse_BS = vocabulary.chunked(split.unembed, chunk, layout, head, arrays)
        axes = vocabulary.vocab_axes(layout)

        def body(index: jax.Array, whole: TopLogps) -> TopLogps:
            hidden_BCD, _, mask_BC = vocabulary.chunk_at(chunks, index, layout)
            top = _top_of(split.unembed(head, hidden_BCD) / temperature, count, axes)
            own = (vocabulary.own_rows(x * mask_BC[..., None].astype(x.dtype), layout) for x in top)
            return TopLogps(
                *(jax.lax.dynamic_update_index_in_dim(x, part, index, 0) for x, part in zip(whole, own, strict=True))
            )

        shape = chunks[2].shape
        start = TopLogps(jnp.zeros((*shape, count), jnp.int32), jnp.zeros((*shape, count + 1), jnp.float32))
        whole = vocabulary.over_chunks(chunks, turns, body, start)
        return TopLogps(*(vocabulary.unchunked(x, inverse_BS) for x in whole))

    if layout is not None:
        specs = (list(layout.head), layout.rows)
        compute = jax.shard_map(compute, in_specs=specs, out_specs=P(*layout.rows), check_vma=False)
    return compute(split.leaves, (hidden_BSD, (), mask_BS))


def _top_of(logits_BCV: jax.Array, count: int, vocab: tuple[str, ...]) -> TopLogps:
    length = logits_BCV.shape[-1]
    first = jax.lax.axis_index(vocab) * length if vocab else 0
    values_BCK, ids_BCK = jax.lax.top_k(logits_BCV, min(count, length))
    ids_BCK = ids_BCK + first
    if vocab:
        values_BCK, ids_BCK = (jax.lax.all_gather(x, vocab, axis=-1, tiled=True) for x in (values_BCK, ids_BCK))
        values_BCK, order_BCK = jax.lax.top_k(values_BCK, count)
        ids_BCK = jnp.take_along_axis(ids_BCK, order_BCK, axis=-1)
    top_BC = values_BCK[..., :1]
    # The remaining probability is added up, since 1 minus the others would be lost in rounding.
    rest_BCV = _scattered(jnp.exp(logits_BCV - top_BC), ids_BCK - first, jnp.zeros(values_BCK.shape))
    rest_BC = jnp.sum(rest_BCV, axis=-1, keepdims=True)
    rest_BC = jax.lax.psum(rest_BC, vocab) if vocab else rest_BC
    logz_BC = jnp.log(jnp.sum(jnp.exp(values_BCK - top_BC), axis=-1, keepdims=True) + rest_BC) + top_BC
    rest_BC = jnp.maximum(jnp.log(rest_BC) + top_BC - logz_BC, SMALLEST)
    return TopLogps(ids_BCK, jnp.concatenate([values_BCK - logz_BC, rest_BC], axis=-1))


def _scattered(x_BCV: jax.Array, ids_BCK: jax.Array, values_BCK: jax.Array) -> jax.Array:
    """x with other values at the ids; those outside this device's part of the vocabulary are left out."""
    length = x_BCV.shape[-1]
    ids_BCK = jnp.where((ids_BCK >= 0) & (ids_BCK < length), ids_BCK, length)
    rows, columns = (jnp.arange(size) for size in x_BCV.shape[:2])
    return x_BCV.at[rows[:, None, None], columns[None, :, None], ids_BCK].set(values_BCK, mode="drop")


def _sums_and_slope(
    divergence: Divergence, logits_BCV: jax.Array, given: Any, weights_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[DivergenceSums, jax.Array]:
    """`cross_entropy.SlopeOf`. given: (the teacher's logits, [B, C, V]; targets_BC)."""
    teacher_BCV, targets_BC = given
    logp_BCV = _log_softmax(teacher_BCV / divergence.temperature, vocab)
    likeliest_BCV = teacher_BCV >= _max(teacher_BCV, vocab)
    logq_BCV = _log_softmax(logits_BCV / divergence.temperature, vocab)
    return _summed(divergence, logits_BCV, (logp_BCV, logq_BCV, likeliest_BCV), targets_BC, weights_BC, vocab)


def _sums_and_slope_of_top(
    divergence: Divergence, logits_BCV: jax.Array, given: Any, weights_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[DivergenceSums, jax.Array]:
    """The same with (ids_BSK, logps_BSR, targets_BC) of `TopLogps`.

    The teacher's remaining probability is distributed over the other tokens in proportion to the student's. The ratio
    of the two is then the same for all of them, and the divergence and its slope over the whole vocabulary are those
    over the K tokens and one further outcome.
    """
    ids_BCK, logps_BCR, targets_BC = given
    first = jax.lax.axis_index(vocab) * logits_BCV.shape[-1] if vocab else 0
    logq_BCV = _log_softmax(logits_BCV / divergence.temperature, vocab)
    # Log-probabilities are never above 0, so 1 marks the other tokens.
    logp_BCV = _scattered(jnp.ones_like(logq_BCV), ids_BCK - first, logps_BCR[..., :-1])
    other_BCV = logp_BCV > 0
    rest_BC = _sum(jnp.where(other_BCV, jnp.exp(logq_BCV), 0), vocab)
    logp_BCV = jnp.where(other_BCV, logps_BCR[..., -1:] - jnp.log(rest_BC) + logq_BCV, logp_BCV)
    likeliest_BCV = jnp.arange(logq_BCV.shape[-1]) == ids_BCK[..., :1] - first
    return _summed(divergence, logits_BCV, (logp_BCV, logq_BCV, likeliest_BCV), targets_BC, weights_BC, vocab)


def _summed(
    divergence: Divergence,
    logits_BCV: jax.Array,
    both: tuple[jax.Array, jax.Array, jax.Array],
    targets_BC: jax.Array,
    weights_BC: jax.Array,
    vocab: tuple[str, ...],
) -> tuple[DivergenceSums, jax.Array]:
    """both: log-probabilities of the teacher and of the student, and where the teacher's likeliest token is."""
    logp_BCV, logq_BCV, likeliest_BCV = both
    divergence_BC, slope_BCV = _divergence_and_slope(divergence.beta, logp_BCV, logq_BCV, vocab)
    slope_BCV = slope_BCV / divergence.temperature
    (nll_BC, _, correct_BC), nll_slope_BCV = values_and_slope(NLL, logits_BCV, targets_BC, vocab)
    loss_BC, share = divergence_BC, divergence.sft_weight
    if share:
        loss_BC = (1 - share) * divergence_BC + share * nll_BC
        slope_BCV = (1 - share) * slope_BCV + share * nll_slope_BCV
    agreeing_BC = _max(jnp.where(likeliest_BCV, logits_BCV, -jnp.inf), vocab) >= _max(logits_BCV, vocab)
    values = (loss_BC, divergence_BC, nll_BC, correct_BC, agreeing_BC[..., 0])
    return DivergenceSums(*(jnp.sum(x * weights_BC) for x in values)), slope_BCV * weights_BC[..., None]


def _divergence_and_slope(
    beta: float, logp_BCV: jax.Array, logq_BCV: jax.Array, vocab: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """(D of every position [B, C]; its gradient by the student's logits [B, C, V])."""
    p_BCV, q_BCV = jnp.exp(logp_BCV), jnp.exp(logq_BCV)
    if beta == 0:
        forward_BC = _sum(_weighted(p_BCV, logp_BCV - logq_BCV), vocab)
        return forward_BC[..., 0], q_BCV - p_BCV
    if beta == 1:
        log_ratio_BCV = logq_BCV - logp_BCV
        reverse_BC = _sum(_weighted(q_BCV, log_ratio_BCV), vocab)
        return reverse_BC[..., 0], _weighted(q_BCV, log_ratio_BCV - reverse_BC)
    mixture_BCV = jnp.logaddexp(jnp.log1p(-beta) + logq_BCV, jnp.log(beta) + logp_BCV)
    terms_BC = _sum(_weighted(p_BCV, logp_BCV - mixture_BCV), vocab)
    log_ratio_BCV = logq_BCV - mixture_BCV
    own_BC = _sum(_weighted(q_BCV, log_ratio_BCV), vocab)
    # dD/dq = (1 - beta) (log q - log m): what m itself contributes is the same for every token.
    slope_BCV = (1 - beta) * _weighted(q_BCV, log_ratio_BCV - own_BC)
    return (beta * terms_BC + (1 - beta) * own_BC)[..., 0], slope_BCV


def _weighted(probability: jax.Array, x: jax.Array) -> jax.Array:
    # A probability of 0 counts nothing, also if x is infinite.
    return jnp.where(probability > 0, probability * x, 0)


def _log_softmax(logits_BCV: jax.Array, vocab: tuple[str, ...]) -> jax.Array:
    shifted_BCV = logits_BCV - _max(logits_BCV, vocab)
    return shifted_BCV - jnp.log(_sum(jnp.exp(shifted_BCV), vocab))


def _max(x_BCV: jax.Array, vocab: tuple[str, ...]) -> jax.Array:
    top_BC = jnp.max(x_BCV, axis=-1, keepdims=True)
    return jax.lax.pmax(top_BC, vocab) if vocab else top_BC


def _sum(x_BCV: jax.Array, vocab: tuple[str, ...]) -> jax.Array:
    total_BC = jnp.sum(x_BCV, axis=-1, keepdims=True)
    return jax.lax.psum(total_BC, vocab) if vocab else total_BC
