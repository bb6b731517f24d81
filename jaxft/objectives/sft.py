"""Supervised fine-tuning: next-token cross-entropy on the trained tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.objectives.cross_entropy import token_sums
from jaxft.objectives.router import RouterCoefficients, load_balancing_loss, router_z_loss
from jaxft.objectives.token_loss import NLL, TokenLoss


class LossSums(NamedTuple):
    """Sums, never means: divided once, after accumulation and across devices.

    total: float32, what is minimised. weight: float32, what to divide by. metrics: further sums; a step reports
    `tokens` as it is and all others divided by the weight.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


Loss = Callable[[Any, Any, jax.Array | None], LossSums]


def sft_loss(
    model: Any,
    batch: Any,
    key: jax.Array | None,
    *,
    router: RouterCoefficients | None = None,
    token_loss: TokenLoss = NLL,
    neftune_noise_alpha: float | None = None,
) -> LossSums:
    """The loss of every trained target, in nats, summed; the weight is how many there are.

    model: a Decoder. batch: a `Batch`, [B, S]. key: turns dropout on, and noise on embeddings where neftune_noise_alpha
    is given. token_loss: what a target costs; where that is not -log p, -log p is reported beside it as `nll`.
    router: losses that are added for a model with experts, and reported as `load_balancing_loss` and `router_z_loss`.
    They are means over the tokens of this batch, padding left out, and count in the sums as often as it has trained
    targets: over several batches they become their mean, each batch weighed by its trained targets.
    """
    tokens = jnp.sum(batch.segments_BS > 0).astype(jnp.float32)
    weight = jnp.sum(batch.weights_BS)
    given = (batch.tokens_BS, batch.positions_BS, batch.segments_BS)
    random = {"key": key, "noise_alpha": neftune_noise_alpha}
    if router is None:
        hidden_BSD, _ = model(*given, **random)
    else:
        hidden_BSD, routing = model.with_router_sums(*given, **random)
    unembed, head, stored = model.split_unembed()
    sums = token_sums(unembed, head, hidden_BSD, batch.targets_BS, batch.weights_BS, stored=stored, loss=token_loss)
    total, metrics = sums.loss, {"correct": sums.correct, "tokens": tokens}
    if not token_loss.plain:
        metrics["nll"] = sums.nll
    if router is not None:
        balancing, z_loss = weight * load_balancing_loss(routing), weight * router_z_loss(routing)
        total += router.load_balancing * balancing + router.z_loss * z_loss
        metrics |= {"load_balancing_loss": balancing, "router_z_loss": z_loss}
    return LossSums(total, weight, metrics)
