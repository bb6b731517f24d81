"""Training methods: one module each, whose `METHOD` says how rows become batches and what is minimised."""

import dataclasses
import importlib

from jaxft.config import RunConfig
from jaxft.config.method import MethodConfig
from jaxft.methods.method import Method


def method_of(config: RunConfig) -> Method:
    """The training method of a config: `METHOD` of the module `jaxft/methods/NAME.py` that `method.name` names."""
    return importlib.import_module(f"{__name__}.{config.method.name}").METHOD


def find_method(name: str) -> Method | None:
    """The method of this name; None if there is none, as for the run of another version."""
    names = {spec.name for spec in dataclasses.fields(MethodConfig)} - {"name"}
    return importlib.import_module(f"{__name__}.{name}").METHOD if name in names else None
