"""Direct preference optimization (DPO): training on pairs of a chosen and a rejected answer, without a reward model."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import detach
from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.preferences import prepare_pairs
from jaxft.errors import ConfigError
from jaxft.methods import sequences
from jaxft.methods.method import Method, Run
from jaxft.methods.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.dpo import dpo_loss
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.training.state import TrainState
from jaxft.training.step import rounded


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which the reference would not be the base model, or pairs would be cut."""
    adapter, data = config.adapter, config.data
    if adapter.virtual_tokens:
        raise ConfigError(
            f"method.name='dpo' compares the model with its base by switching the adapter off, but adapter.kind="
            f"{adapter.kind!r} puts virtual tokens into every row, which the base cannot read. Use adapter.kind='lora'."
        )
    if adapter.kind != "none" and adapter.saved:
        raise ConfigError(
            f"method.name='dpo' takes the model without its adapter as the reference, but adapter.modules_to_save="
            f"{adapter.modules_to_save!r} trains modules of the base itself, which cannot be switched off. Set it to "
            "None, or train all weights (adapter.kind='none'), which keeps a copy as the reference."
        )
    if adapter.kind == "lora" and adapter.init_lora_weights.startswith("loftq"):
        raise ConfigError(
            f"adapter.init_lora_weights={adapter.init_lora_weights!r} starts from an adapter that corrects the "
            "quantised base. Without it the base is not the model that training starts from, so it cannot be the "
            "reference of method.name='dpo'. Set it to 'default'."
        )
    if adapter.kind != "none" and adapter.dropout:
        raise ConfigError(
            f"adapter.dropout={adapter.dropout} would change the policy's log-probabilities but not the reference's, "
            "so that their ratio is not 1 at the start. Set it to 0."
        )
    if data.truncation == "right":
        raise ConfigError(
            "data.truncation='right' would cut the rejected answer of a pair and leave the chosen one whole. Use "
            "'drop' or 'refuse', or raise data.max_length: it must hold both answers, each with its prompt."
        )
    formats = {f"data.mixture.{name}.format": one.format for name, one in data.mixture.items()}
    for field, value in {"data.format": data.format, **formats}.items():
        if value not in ("auto", None):
            raise ConfigError(
                f"{field}={value!r} has one answer in a row, but method.name='dpo' reads rows of prompt, chosen and "
                "rejected. Leave it out."
            )
    if data.train_on == "all":
        raise ConfigError(
            "data.train_on='all' trains prompts too, which are the same in both answers of a pair. Use 'assistant'."
        )
    router_coefficients(config, model)


def initial_state(config: RunConfig, trainable: nnx.State) -> MethodState | None:
    """Without an adapter, a frozen copy of the trained parameters, its matrices in the type of computation.

    With an adapter the base itself is the reference, so there is nothing to keep.
    """
    if config.adapter.kind != "none":
        return None
    return MethodState(rebuilt=rounded(trainable, jnp.dtype(config.model.dtype)))


def reference_model(model: Decoder, state: MethodState | None) -> Decoder:
    """The reference on the arrays of `model`: its adapters switched off, or the frozen copy in their place."""
    graphdef, arrays = nnx.split(model)
    if state is not None:
        # Another state, not an update in place: merged models share their variables.
        return nnx.merge(graphdef, nnx.merge_state(arrays, state.rebuilt))
    reference = nnx.merge(graphdef, arrays)
    detach(reference)
    return reference


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
        return compute(model, reference_model(model, state), batch, key)

    return dpo


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> Callable[[TrainState], dict[str, float]] | None:
    """The held-out DPO loss and its metrics."""
    return sequences.make_evaluator(run, graphdef, loss(run.config, run.model))


METHOD = Method(
    prepare=prepare_pairs,
    source=sequences.source,
    feed=sequences.feed,
    batch_shapes=sequences.batch_shapes,
    check=check,
    initial_state=initial_state,
    loss=loss,
    evaluator=evaluator,
    describe=lambda config: f"DPO with beta={config.method.dpo.beta:g}",
    reference_passes=1,
)
