"""The loss of one token from its logits, negative log-likelihood or a variant, with its gradient by the logits."""

# B batch, C chunk of a sequence, V vocab or a device's part of it

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss of one token, in nats; by default -log p of its target.

    label_smoothing: share e of the target's weight that is distributed evenly over the whole vocabulary, the target
        included: (1 - e) * -log p + e * mean over v of -log p_v, as in torch's cross_entropy (arXiv:1512.00567,
        section 7).
    z_loss: coefficient of log(Z)^2, Z being the softmax's normaliser, which keeps logits from drifting (PaLM,
        arXiv:2204.02311, section 5, with 1e-4).
    dft: -log p times p, the latter without gradient (dynamic fine-tuning, arXiv:2508.05629, eq. 8), so that unlikely
        tokens do not have larger gradients than likely ones.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False

    @property
    def plain(self) -> bool:
        """Whether the loss is the negative log-likelihood itself."""
        return self == NLL


NLL = TokenLoss()


class TokenSums(NamedTuple):
    """Sums over trained tokens, float32 scalars: the loss, -log p in nats, and the number of `target == argmax`."""

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array


def sums_and_slope(
    loss: TokenLoss, logits_BCV: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[TokenSums, jax.Array]:
    """Weighted sums over the tokens, and the gradient of the sum of the loss by the logits, [B, C, V].

    logits_BCV: float32. vocab: mesh axes, within `shard_map`, over which the vocabulary is split; every device then
    has the sums, and the slope of its part.
    """
    values, slope_BCV = values_and_slope(loss, logits_BCV, targets_BC, vocab)
    return TokenSums(*(jnp.sum(x * weights_BC) for x in values)), slope_BCV * weights_BC[..., None]


def values_and_slope(
    loss: TokenLoss, logits_BCV: jax.Array, targets_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """((loss, -log p, `target == argmax`) of every token, [B, C]; gradient of its loss by its logits, [B, C, V]).

    The arguments are those of `sums_and_slope`.
    """
    length = logits_BCV.shape[-1]
    here_BCV, picked_BC, top_BC, powers_BCV, total_BC = _softmax_parts(logits_BCV, targets_BC, vocab)
    logz_BC, p_BCV = jnp.log(total_BC) + top_BC, powers_BCV / total_BC[..., None]
    nll_BC = jnp.log(total_BC) + top_BC - picked_BC
    loss_BC, slope_BCV = nll_BC, p_BCV - here_BCV
    if loss.label_smoothing:
        uniform_mass = loss.label_smoothing / (length * (jax.lax.axis_size(vocab) if vocab else 1))
        sum_BC = jnp.sum(logits_BCV, axis=-1)
        sum_BC = jax.lax.psum(sum_BC, vocab) if vocab else sum_BC
        loss_BC = loss_BC + loss.label_smoothing * picked_BC - uniform_mass * sum_BC
        slope_BCV = slope_BCV + loss.label_smoothing * here_BCV - uniform_mass
    if loss.dft:
        share_BC = jnp.exp(-nll_BC)
        loss_BC, slope_BCV = share_BC * loss_BC, share_BC[..., None] * slope_BCV
    if loss.z_loss:
        loss_BC = loss_BC + loss.z_loss * logz_BC**2
        slope_BCV = slope_BCV + 2 * loss.z_loss * logz_BC[..., None] * p_BCV
    # A target that reaches the maximum counts as predicted: no second pass for an argmax.
    return (loss_BC, nll_BC, picked_BC >= top_BC), slope_BCV


class TokenStatistics(NamedTuple):
    """Of the distribution at each position, float32: log p of the target and the entropy in nats, log of sum p^2."""

    logps: jax.Array
    entropies: jax.Array
    log_sum_squares: jax.Array


def statistics_and_slopes(
    logits_BCV: jax.Array, targets_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[TokenStatistics, tuple[jax.Array, jax.Array]]:
    """(statistics [B, C]; gradients of the log-probability and of the entropy by the logits, [B, C, V] each).

    The arguments are those of `sums_and_slope`.
    """
    here_BCV, picked_BC, top_BC, powers_BCV, total_BC = _softmax_parts(logits_BCV, targets_BC, vocab)
    shifted_BCV = logits_BCV - top_BC[..., None]
    # Where p is 0 to the last bit, p log p is 0, also for a logit of -inf.
    terms_BCV = jnp.where(powers_BCV > 0, powers_BCV * shifted_BCV, 0)
    sums = jnp.sum(terms_BCV, axis=-1), jnp.sum(powers_BCV**2, axis=-1)
    terms_BC, squares_BC = jax.lax.psum(sums, vocab) if vocab else sums
    log_total_BC, p_BCV = jnp.log(total_BC), powers_BCV / total_BC[..., None]
    entropies_BC = log_total_BC - terms_BC / total_BC
    statistics = TokenStatistics(
        picked_BC - top_BC - log_total_BC, entropies_BC, jnp.log(squares_BC) - 2 * log_total_BC
    )
    # dH/dlogit = -p (log p + H)
    entropy_slope_BCV = -terms_BCV / total_BC[..., None] + p_BCV * (log_total_BC - entropies_BC)[..., None]
    return statistics, (here_BCV - p_BCV, entropy_slope_BCV)


def _softmax_parts(
    logits_BCV: jax.Array, targets_BC: jax.Array, vocab: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(whether a logit is the target's [B, C, V], its logit [B, C], the largest logit [B, C], exp(logit - largest), the
    sum of these over the whole vocabulary [B, C])."""
    length = logits_BCV.shape[-1]
    first = jax.lax.axis_index(vocab) * length if vocab else 0
    here_BCV = jnp.arange(length) == (targets_BC - first)[..., None]
    top_BC = jnp.max(logits_BCV, axis=-1)
    top_BC = jax.lax.pmax(top_BC, vocab) if vocab else top_BC
    powers_BCV = jnp.exp(logits_BCV - top_BC[..., None])
    total_BC, picked_BC = jnp.sum(powers_BCV, axis=-1), jnp.sum(jnp.where(here_BCV, logits_BCV, 0), axis=-1)
    if vocab:
        total_BC, picked_BC = jax.lax.psum((total_BC, picked_BC), vocab)
    return here_BCV, picked_BC, top_BC, powers_BCV, total_BC
