"""Supervised fine-tuning: next-token cross-entropy on the trained tokens."""

# B batch, S sequence, D model

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.nn.decoder import Decoder
from jaxft.objectives.cross_entropy import token_sums
from jaxft.objectives.loss import LossSums, MethodState, Ratio
from jaxft.objectives.router import RouterCoefficients, hidden_and_routing, with_router_losses
from jaxft.objectives.token_loss import NLL, TokenLoss


def sft_loss(
    model: Decoder,
    batch: Batch[jax.Array],
    key: jax.Array | None,
    method_state: MethodState | None = None,
    *,
    router: RouterCoefficients | None = None,
    token_loss: TokenLoss = NLL,
    neftune_noise_alpha: float | None = None,
) -> LossSums:
    """The loss of every trained target, in nats, summed; the weight is the number of trained targets.

    batch: tokens, targets, weights, positions and segments, [B, S]. key: turns dropout on, and noise on embeddings if
    neftune_noise_alpha is given. token_loss: the loss of one token; if it is not -log p, then -log p is reported beside
    it as `nll`. router: losses on the routers of a model with experts; see `with_router_losses`.
    """
    weight = jnp.sum(batch.weights_BS)
    hidden_BSD, routing = hidden_and_routing(model, batch, key, router, noise_alpha=neftune_noise_alpha)
    unembed, head, dimensions = model.split_unembed()
    sums = token_sums(
        unembed, head, hidden_BSD, batch.targets_BS, batch.weights_BS, dimensions=dimensions, loss=token_loss
    )
    metrics = {"mean_token_accuracy": Ratio(sums.correct, weight)}
    if not token_loss.plain:
        metrics["nll"] = Ratio(sums.nll, weight)
    tokens = jnp.sum(batch.segments_BS > 0).astype(jnp.float32)
    return with_router_losses(LossSums(sums.loss, weight, tokens, weight, metrics), router, routing)
