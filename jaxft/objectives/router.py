"""Losses on the routers of a model with experts, beside the model's own."""

# E experts

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.nn.experts.router_sums import RouterSums


@dataclass(frozen=True, kw_only=True)
class RouterCoefficients:
    """What the two losses count beside the cross-entropy, each a mean as below."""

    load_balancing: float = 0.0
    z_loss: float = 0.0


def load_balancing_loss(sums: RouterSums) -> jax.Array:
    """E * sum over experts of f * p, a float32 scalar: as small as it gets, K, where all experts are chosen evenly.

    f: tokens that went to the expert, K for each token; p: the probability that it was given; both as means over the
    tokens of all layers together, as transformers takes them. Source: Switch Transformer, arXiv:2101.03961, eq. 4 to 6,
    with f counting all K experts of a token.
    """
    tokens = jnp.maximum(sums.tokens, 1)
    return len(sums.chosen_E) * jnp.vdot(sums.chosen_E / tokens, sums.probability_E / tokens)


def router_z_loss(sums: RouterSums) -> jax.Array:
    """The mean of logsumexp(logits)^2 over the tokens of all layers, a float32 scalar.

    Source: ST-MoE, arXiv:2202.08906, eq. 5, its mean over layers.
    """
    return sums.squared_logz / jnp.maximum(sums.tokens, 1)
