"""The frozen reference that preference methods compare a model with: the model at the start of the run."""

# B batch, P documents that a row can hold

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.adapters.attach import detach
from jaxft.checkpoint.folders.origin import continued_adapter
from jaxft.config import RunConfig
from jaxft.config.method_section import ReferenceSection
from jaxft.data.batch import Batch
from jaxft.errors import ConfigError
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import document_logps
from jaxft.objectives.loss import MethodState
from jaxft.training.step import rounded

# Numbers of documents in `Batch.values`: the log-probability of the document's trained tokens under the reference, as
# the `logps_of` of `reference_logps` would compute it.
REFERENCE_LOGPS = "reference_logps"


def is_cached(config: RunConfig) -> bool:
    """Whether the reference's log-probabilities are computed once, before the first step."""
    section = config.method.chosen
    return isinstance(section, ReferenceSection) and section.reference == "cached"


def reference_passes(config: RunConfig) -> int:
    """`Method.reference_passes`: 1, or 0 if the log-probabilities are cached."""
    return 0 if is_cached(config) else 1


def reference_values(config: RunConfig) -> tuple[str, ...]:
    """The names of the numbers that documents carry if the reference's log-probabilities are cached."""
    return (REFERENCE_LOGPS,) if is_cached(config) else ()


def check_reference(config: RunConfig) -> None:
    """Raises ConfigError for settings under which the reference would not be the model at the start of the run."""
    adapter, method = config.adapter, f"method.name={config.method.name!r}"
    continued = continued_adapter(config.model) is not None  # a copy of the adapter at the start is the reference
    if adapter.virtual_tokens and not continued:
        raise ConfigError(
            f"{method} compares the model with its base by switching the adapter off, but adapter.kind="
            f"{adapter.kind!r} puts virtual tokens into every row, which the base cannot read. Use adapter.kind='lora'."
        )
    if adapter.kind != "none" and adapter.dropout:
        raise ConfigError(
            f"adapter.dropout={adapter.dropout} would change the policy's log-probabilities but not the reference's, "
            "so that their ratio is not 1 at the start. Set it to 0."
        )
    if is_cached(config) or continued:
        return
    cached = f"method.{config.method.name}.reference='cached'"
    has_cache = isinstance(config.method.chosen, ReferenceSection)
    if adapter.kind != "none" and adapter.saved:
        raise ConfigError(
            f"{method} takes the model without its adapter as the reference, but adapter.modules_to_save="
            f"{adapter.modules_to_save!r} trains modules of the base itself, which cannot be switched off. Set it to "
            "None, or train all weights (adapter.kind='none'), which keeps a copy as the reference."
            + (f" Or set {cached}, which computes the reference before the first step." if has_cache else "")
        )
    if adapter.kind == "lora" and adapter.init_lora_weights.startswith("loftq"):
        raise ConfigError(
            f"adapter.init_lora_weights={adapter.init_lora_weights!r} starts from an adapter that corrects the "
            "quantised base. Without it the base is not the model that training starts from, so it cannot be the "
            f"reference of {method}. Set it to 'default'."
            + (f" Or set {cached}: its reference is the model at the start, with this adapter." if has_cache else "")
        )


def reference_state(config: RunConfig, trainable: nnx.State) -> MethodState | None:
    """`Method.initial_state`: a frozen copy of the trained parameters, its matrices in the type of computation.

    With a fresh adapter the base itself is the reference, and if its log-probabilities are cached no model is needed.
    Then there is nothing to keep: None. If the run goes on from an adapter, this is a copy of it.
    """
    fresh = config.adapter.kind != "none" and continued_adapter(config.model) is None
    if fresh or is_cached(config):
        return None
    return MethodState(rebuilt=rounded(trainable, jnp.dtype(config.model.dtype)))


def reference_model(model: Decoder, state: MethodState | None) -> Decoder:
    """The reference on the arrays of `model`: its adapters switched off, or the frozen copy in their place."""
    graphdef, arrays = nnx.split(model)
    if state is not None and state.rebuilt is not None:
        # Another state, not an update in place: merged models share their variables.
        return nnx.merge(graphdef, nnx.merge_state(arrays, state.rebuilt))
    reference = nnx.merge(graphdef, arrays)
    detach(reference)
    return reference


def reference_logps(
    model: Decoder,
    batch: Batch[jax.Array],
    state: MethodState | None,
    logps_of: Callable[[Decoder, Batch[jax.Array]], jax.Array] = document_logps,
) -> jax.Array:
    """The reference's log-probability of each document in nats, [B, P] float32, without gradient.

    It is what the batch carries as `REFERENCE_LOGPS`; without that, `logps_of` of the reference model.
    """
    if REFERENCE_LOGPS in batch.values:
        return batch.values[REFERENCE_LOGPS]
    logps_BP = logps_of(reference_model(model, state), batch)
    return jax.lax.stop_gradient(logps_BP)
