"""From a run's config to the adapters of a model: `kind` is the name of the module here that puts them there."""

import importlib

import jax
from flax import nnx

from jaxft.adapters.saved import train_whole
from jaxft.config import AdapterConfig


def attach_adapter(model: nnx.Module, config: AdapterConfig, seed: int) -> None:
    """Puts fresh adapters of the configured kind into a model; none for full fine-tuning.

    Raises ModelError for what the model does not have.
    """
    if config.kind == "none":
        return
    importlib.import_module(f"jaxft.adapters.{config.kind}").put(model, config, jax.random.key(seed))
    train_whole(model, config.saved)
