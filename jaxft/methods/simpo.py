"""Simple preference optimization (SimPO): mean log-probabilities of two answers, apart by a margin; no reference."""

import jax

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.methods.parts.pairs import pair_method
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.objectives.reference_free import CPOSettings, cpo_loss


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`cpo_loss` with SimPO's loss type and the settings of `method.simpo`."""
    own, router = config.method.simpo, router_coefficients(config, model)
    settings = CPOSettings(beta=own.beta, label_smoothing=own.label_smoothing, loss_type="simpo", gamma=own.gamma)

    def simpo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return cpo_loss(model, batch, key, settings, router=router)

    return simpo


def describe(config: RunConfig) -> str:
    """Such as `SimPO with beta=2 and gamma=0.5`."""
    own = config.method.simpo
    return f"SimPO with beta={own.beta:g} and gamma={own.gamma:g}"


METHOD = pair_method(loss, describe, lambda config, model: None)
