"""Choosing the next token. Every setting is an array over rows, so one compiled function serves rows that differ.

Order, as in transformers: repetition penalty, then (if the temperature is not 0) temperature, top-k, top-p,
min-p.
"""

# B rows, V vocab, K alternatives

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Knobs(NamedTuple):
    """Settings of each row, all [B]; see `settings.Sampling`.

    temperature, top_p, min_p, penalty: float32; 0, 1, 0 and 1 do nothing (temperature 0 is greedy).
    top_k: int32; V or more does nothing. seed, stream: uint32; with a token's position they give its random key.
    logprob_temperature: float32, divides the logits of reported log-probabilities, and nothing else.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    penalty_B: jax.Array
    seed_B: jax.Array
    stream_B: jax.Array
    logprob_temperature_B: jax.Array


class Alternatives(NamedTuple):
    """The most likely tokens in one position of each row, the likeliest first, [..., K] int32, and their
    log-probabilities in nats, [..., K] float32.
    """

    tokens_BK: jax.Array
    logprobs_BK: jax.Array


def choose(
    logits_BV: jax.Array, seen_BV: jax.Array, knobs: Knobs, positions_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, [B] int32, and its log-probability in nats, [B] float32.

    logits_BV: float32. seen_BV: True for the tokens that the row has had, including its prompt. positions_B: the
    position of the new token. The log-probability is that of the given logits, divided by the rows'
    logprob_temperature, before any penalty or filter.
    """
    penalty_B = knobs.penalty_B
    scores_BV = _apply_if_any(penalty_B != 1, lambda x: repetition_penalty(x, seen_BV, penalty_B), logits_BV)
    greedy_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    # A batch with only greedy rows computes neither filters nor random numbers.
    chosen_B = jax.lax.cond(
        jnp.any(knobs.temperature_B > 0),
        lambda: jnp.where(knobs.temperature_B > 0, draw(filter_scores(scores_BV, knobs), knobs, positions_B), greedy_B),
        lambda: greedy_B,
    )
    logits_BV = logits_BV / knobs.logprob_temperature_B[:, None]
    logits_B = jnp.take_along_axis(logits_BV, chosen_B[:, None], axis=-1)[:, 0]
    return chosen_B, logits_B - jax.nn.logsumexp(logits_BV, axis=-1)


def most_likely(logits_BV: jax.Array, knobs: Knobs, count: int) -> Alternatives:
    """The `count` most likely tokens of each row. Their log-probabilities are those that `choose` gives."""
    logits_BV = logits_BV / knobs.logprob_temperature_B[:, None]
    logits_BK, tokens_BK = jax.lax.top_k(logits_BV, count)
    return Alternatives(tokens_BK.astype(jnp.int32), logits_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True))


def filter_scores(scores_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Scores after temperature, top-k, top-p and min-p: -inf for tokens that are dropped."""
    scores_BV = temperature(scores_BV, knobs.temperature_B)
    scores_BV = _apply_if_any(knobs.top_k_B < scores_BV.shape[-1], lambda x: top_k(x, knobs.top_k_B), scores_BV)
    scores_BV = _apply_if_any(knobs.top_p_B < 1, lambda x: top_p(x, knobs.top_p_B), scores_BV)
    return min_p(scores_BV, knobs.min_p_B)


def draw(scores_BV: jax.Array, knobs: Knobs, positions_B: jax.Array) -> jax.Array:
    """A token from softmax(scores), [B] int32, by the Gumbel-max trick.

    A row's draw depends on its seed, its stream and the position, and on nothing else in the batch.
    """

    def noise(seed: jax.Array, stream: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), position)
        return jax.random.gumbel(key, scores_BV.shape[-1:], jnp.float32)

    noise_BV = jax.vmap(noise)(knobs.seed_B, knobs.stream_B, positions_B)
    return jnp.argmax(scores_BV + noise_BV, axis=-1).astype(jnp.int32)


def repetition_penalty(scores_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """The scores; those of seen tokens are divided by the penalty if positive, else multiplied (arXiv:1909.05858)."""
    penalty_B1 = penalty_B[:, None]
    punished_BV = jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
    return jnp.where(seen_BV, punished_BV, scores_BV)


def temperature(scores_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Scores divided by the temperature; rows at 0 are unchanged."""
    return scores_BV / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]


def top_k(scores_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Keeps the k highest scores, and those equal to the k-th."""
    return _heaviest(scores_BV, jnp.ones_like(scores_BV), top_k_B.astype(jnp.float32))


def top_p(scores_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Keeps the fewest most probable tokens whose probabilities add up to top_p or more (arXiv:1904.09751)."""
    kept_BV = _heaviest(scores_BV, jax.nn.softmax(scores_BV, axis=-1), top_p_B)
    # A row at 1 must not lose its least probable tokens to the rounding of the sum.
    return jnp.where(top_p_B[:, None] < 1, kept_BV, scores_BV)


def min_p(scores_BV: jax.Array, min_p_B: jax.Array) -> jax.Array:
    """Keeps tokens at least min_p times as probable as the most probable one (arXiv:2407.01082)."""
    floor_B1 = jnp.max(scores_BV, axis=-1, keepdims=True) + jnp.log(min_p_B)[:, None]
    return jnp.where(scores_BV >= floor_B1, scores_BV, -jnp.inf)


def _heaviest(scores_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The fewest highest scores whose weights add up to the target, -inf elsewhere.

    The threshold is built bit by bit, with 32 sums over the row: sorting a vocabulary takes far longer.
    """
    bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.uint32)
    # Unsigned integers that sort as the floats do.
    order_BV = jnp.where(bits_BV >> 31 == 1, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def step(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        higher_B = threshold_B | jnp.left_shift(jnp.uint32(1), (31 - i).astype(jnp.uint32))
        weight_B = jnp.sum(jnp.where(order_BV >= higher_B[:, None], weights_BV, 0), axis=-1)
        return jnp.where(weight_B >= target_B, higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 32, step, jnp.zeros(scores_BV.shape[0], jnp.uint32))
    return jnp.where(order_BV >= threshold_B[:, None], scores_BV, -jnp.inf)


def _apply_if_any(wanted_B: jax.Array, change: Callable[[jax.Array], jax.Array], scores_BV: jax.Array) -> jax.Array:
    """The changed scores if any row wants the change, which then does nothing to the other rows."""
    return jax.lax.cond(jnp.any(wanted_B), change, lambda x: x, scores_BV)
