"""Contrastive preference optimization (CPO): pairs of answers without a reference, and a loss on chosen answers."""

import jax

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.methods.parts.pairs import pair_method, unit_counts
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import BatchSums, Loss, LossSums, MethodState
from jaxft.objectives.reference_free import CPOSettings, cpo_loss


def batch_sums(config: RunConfig, model: Decoder) -> BatchSums | None:
    """The pairs and chosen tokens of the whole batch, if there is a loss on tokens."""
    return unit_counts() if config.method.cpo.cpo_alpha else None


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`cpo_loss` with the settings of `method.cpo`."""
    own, router = config.method.cpo, router_coefficients(config, model)
    settings = CPOSettings(
        beta=own.beta, label_smoothing=own.label_smoothing, loss_type=own.loss_type, alpha=own.cpo_alpha
    )

    def cpo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return cpo_loss(model, batch, key, settings, counts=None if state is None else state.batch, router=router)

    return cpo


def describe(config: RunConfig) -> str:
    """`CPO with beta=0.1`, and the loss type unless it is the default."""
    own = config.method.cpo
    return f"CPO with beta={own.beta:g}" + ("" if own.loss_type == "sigmoid" else f" and {own.loss_type} loss")


METHOD = pair_method(loss, describe, batch_sums)
