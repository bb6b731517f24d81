"""Direct preference optimization (DPO): training on pairs of a chosen and a rejected answer, without a reward model."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.preferences import prepare_pairs
from jaxft.methods.method import Method, Run
from jaxft.methods.parts import sequences
from jaxft.methods.parts.charts import PAIR_CHARTS
from jaxft.methods.parts.pairs import batch_shapes, check_pairs, unit_counts
from jaxft.methods.parts.reference import (
    check_reference,
    reference_logps,
    reference_passes,
    reference_state,
    reference_values,
)
from jaxft.methods.parts.reference_cache import with_reference_logps
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.dpo import DPOSettings, dpo_loss
from jaxft.objectives.loss import BatchSums, Loss, LossSums, MethodState
from jaxft.objectives.pairs import answer_logps


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which the reference would not be the base model, or pairs would be cut."""
    check_reference(config)
    check_pairs(config)
    router_coefficients(config, model)


def logps_of(config: RunConfig) -> Callable[[Decoder, Batch[jax.Array]], jax.Array]:
    """The function for `reference_logps`: `(model, batch) ->` the log-probability of each document, [B, P]."""
    return partial(answer_logps, ld_alpha=config.method.dpo.ld_alpha)


def precompute(run: Run, base: Callable[[], Decoder]) -> Run:
    """`Method.precompute`: the pairs with the log-probabilities of the reference, if they are cached."""
    settings = {"ld_alpha": run.config.method.dpo.ld_alpha}
    return with_reference_logps(run, base, logps_of(run.config), settings=settings)


def batch_sums(config: RunConfig, model: Decoder) -> BatchSums | None:
    """The pairs and chosen tokens of the whole batch, if there is a loss on tokens."""
    return unit_counts() if config.method.dpo.nll_weight else None


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`dpo_loss` with the settings of `method.dpo`, against the reference."""
    own = config.method.dpo
    settings = DPOSettings(
        beta=own.beta,
        label_smoothing=own.label_smoothing,
        losses=own.pair_losses,
        sft_weight=own.nll_weight,
        ld_alpha=own.ld_alpha,
        use_weighting=own.use_weighting,
        divergence=own.f_divergence_type,
        divergence_alpha=own.f_alpha_divergence_coef,
    )
    router, logps = router_coefficients(config, model), logps_of(config)

    def dpo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        reference_BP = reference_logps(model, batch, state, logps)
        counts = None if state is None else state.batch
        return dpo_loss(model, reference_BP, batch, key, settings, counts=counts, router=router)

    return dpo


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.Evaluator | None:
    """The held-out DPO loss and its metrics."""
    config, model = run.config, run.model
    return sequences.make_evaluator(run, graphdef, loss(config, model), batch_sums(config, model))


def describe(config: RunConfig) -> str:
    """`DPO with beta=0.1`, and the loss types unless they are the default."""
    own = config.method.dpo
    losses = "" if own.loss_type == "sigmoid" else f" and {own.loss_type} losses"
    return f"DPO with beta={own.beta:g}{losses}"


METHOD = Method(
    prepare=prepare_pairs,
    source=sequences.source,
    feed=sequences.feed,
    batch_shapes=lambda config: batch_shapes(config, reference_values(config)),
    check=check,
    initial_state=reference_state,
    batch_sums=batch_sums,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    loss_unit="mean over pairs",
    charts=PAIR_CHARTS,
    precompute=precompute,
    reference_passes=reference_passes,
)
