"""Training methods: one module each, whose `METHOD` says how rows become batches and what is minimised."""

import importlib

from jaxft.config import RunConfig
from jaxft.methods.method import Method


def method_of(config: RunConfig) -> Method:
    """The training method of a config: `METHOD` of the module `jaxft/methods/NAME.py` that `method.name` names."""
    return importlib.import_module(f"{__name__}.{config.method.name}").METHOD
