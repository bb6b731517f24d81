"""Losses on the routers of a model with experts, added to the loss of a training method."""

# B batch, S sequence, D model, E experts

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.objectives.loss import LossSums, Ratio


@dataclass(frozen=True, kw_only=True)
class RouterCoefficients:
    """Factors of the two router losses, each a mean over tokens, beside the method's own loss."""

    load_balancing: float = 0.0
    z_loss: float = 0.0


def load_balancing_loss(sums: RouterSums) -> jax.Array:
    """E * sum over experts of f * p, a float32 scalar. Its minimum, K, means that all experts are chosen equally often.

    f: fraction of tokens sent to the expert (K experts a token, so f sums to K). p: mean probability of the expert.
    Both are means over the tokens of all layers together, as in transformers. Source: Switch Transformer,
    arXiv:2101.03961, eq. 4 to 6, with f counting all K experts of a token.
    """
    tokens = jnp.maximum(sums.tokens, 1)
    return len(sums.chosen_E) * jnp.vdot(sums.chosen_E / tokens, sums.probability_E / tokens)


def router_z_loss(sums: RouterSums) -> jax.Array:
    """The mean of logsumexp(logits)^2 over the tokens of all layers, a float32 scalar.

    Source: ST-MoE, arXiv:2202.08906, eq. 5, its mean over layers.
    """
    return sums.squared_logz / jnp.maximum(sums.tokens, 1)


def hidden_and_routing(
    model: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    router: RouterCoefficients | None,
    *,
    noise_alpha: float | None = None,
) -> tuple[jax.Array, RouterSums | None]:
    """The model's hidden vectors on a batch, [B, S, D], and the routers' sums if `router` needs them.

    Raises ValueError if it does and documents of the batch share tokens, which the sums would count once.
    """
    inputs = (batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    if router is None:
        return model(*inputs, key=key, noise_alpha=noise_alpha, whole=batch.whole)[0], None
    if batch.whole is not None:
        raise ValueError("the losses of routers count every token of a document, so documents cannot share tokens")
    return model.with_router_sums(*inputs, key=key, noise_alpha=noise_alpha)


def with_router_losses(sums: LossSums, router: RouterCoefficients | None, routing: RouterSums | None) -> LossSums:
    """`sums` with the router losses added and reported as `load_balancing_loss` and `router_z_loss`.

    They are means over the tokens of this batch, padding left out. Each is multiplied by the weight of the batch, so
    that over micro-batches it becomes their mean, weighted as the method's own loss is.
    """
    if router is None or routing is None:
        return sums
    balancing, z_loss = sums.weight * load_balancing_loss(routing), sums.weight * router_z_loss(routing)
    total = sums.total + (router.load_balancing * balancing + router.z_loss * z_loss)
    metrics = {"load_balancing_loss": Ratio(balancing, sums.weight), "router_z_loss": Ratio(z_loss, sums.weight)}
    return sums._replace(total=total, metrics=sums.metrics | metrics)
