"""Odds ratio preference optimization (ORPO): supervised fine-tuning and preferences in one loss; no reference."""

from functools import partial

import jax

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.methods.parts.pairs import pair_method, unit_counts
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import BatchSums, Loss, LossSums, MethodState
from jaxft.objectives.reference_free import orpo_loss


def batch_sums(config: RunConfig, model: Decoder) -> BatchSums:
    """The pairs of the whole batch, and the tokens whose negative log-likelihood is taken."""
    return unit_counts(with_prompt=config.method.orpo.nll_on_prompt)


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`orpo_loss` with the settings of `method.orpo`."""
    own = config.method.orpo
    router = router_coefficients(config, model)
    compute = partial(orpo_loss, beta=own.beta, nll_on_prompt=own.nll_on_prompt, router=router)

    def orpo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return compute(model, batch, key, counts=None if state is None else state.batch)

    return orpo


METHOD = pair_method(loss, lambda config: f"ORPO with beta={config.method.orpo.beta:g}", batch_sums)
