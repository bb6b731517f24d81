"""Direct preference optimization (DPO): training on pairs of a chosen and a rejected answer, without a reward model."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.preferences import prepare_pairs
from jaxft.methods import sequences
from jaxft.methods.method import Method, Run
from jaxft.methods.pairs import batch_shapes, check_pairs
from jaxft.methods.reference import check_reference, reference_logps, reference_state
from jaxft.methods.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.dpo import dpo_loss
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.training.state import TrainState


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which the reference would not be the base model, or pairs would be cut."""
    check_reference(config)
    check_pairs(config)
    router_coefficients(config, model)


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`dpo_loss` with the settings of `method.dpo`, against the reference."""
    settings = config.method.dpo
    compute = partial(
        dpo_loss,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        router=router_coefficients(config, model),
    )

    def dpo(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return compute(model, reference_logps(model, batch, state), batch, key)

    return dpo


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> Callable[[TrainState], dict[str, float]] | None:
    """The held-out DPO loss and its metrics."""
    return sequences.make_evaluator(run, graphdef, loss(run.config, run.model))


METHOD = Method(
    prepare=prepare_pairs,
    source=sequences.source,
    feed=sequences.feed,
    batch_shapes=batch_shapes,
    check=check,
    initial_state=reference_state,
    loss=loss,
    evaluator=evaluator,
    describe=lambda config: f"DPO with beta={config.method.dpo.beta:g}",
    reference_passes=1,
)
