"""Attaches the adapters that a run's config names.

`kind` is the name of the module here that implements it, with `attach_to(model, config, key)`, which attaches fresh
adapters, and `describe(config)`, a short phrase for people.
"""

import dataclasses
import importlib
from typing import Any, Protocol, cast

import jax

from jaxft.adapters.attach import AdapterParam, adapters
from jaxft.adapters.saved import train_whole
from jaxft.config import AdapterConfig
from jaxft.nn.decoder import Decoder
from jaxft.nn.score import ScoreHead


class AdapterKind(Protocol):
    """The module of one kind of adapter."""

    def attach_to(self, model: Decoder, config: AdapterConfig, key: jax.Array) -> None:
        """Attaches fresh adapters. Raises ModelError if the model does not have what the config names."""

    def describe(self, config: AdapterConfig) -> str:
        """A short phrase for people: `LoRA r=16 on all-linear`."""


def attach_adapter(model: Decoder, config: AdapterConfig, seed: int) -> None:
    """Attaches fresh adapters of the configured kind, and makes `modules_to_save` and a score head trainable; nothing
    for kind `none`.

    Raises ModelError if the model does not have what the config names.
    """
    if config.kind == "none":
        return
    _kind(config).attach_to(model, config, jax.random.key(seed))
    train_whole(model, config.saved if model.value is None else (*config.saved, "value"))


def go_on_with(model: Decoder, config: AdapterConfig) -> None:
    """Prepares a model whose adapters were read from a folder for training: dropout is that of the config, and a fresh
    score head is trained too.
    """
    for adapter in adapters(model).values():
        settings = getattr(adapter, "settings", None)
        if settings is not None and settings.dropout != config.dropout:
            cast(Any, adapter).settings = dataclasses.replace(settings, dropout=config.dropout)
    if isinstance(model.value, ScoreHead) and not isinstance(model.value.weight, AdapterParam):
        train_whole(model, ("value",))


def describe(config: AdapterConfig) -> str:
    """A short phrase for people, about the configured adapter: `LoRA r=16 on all-linear`; `no adapter` for none."""
    return "no adapter" if config.kind == "none" else _kind(config).describe(config)


def _kind(config: AdapterConfig) -> AdapterKind:
    return cast(AdapterKind, importlib.import_module(f"jaxft.adapters.{config.kind}"))
