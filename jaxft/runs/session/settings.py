"""The settings of a session: its config, and the course of its learning rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxft.config import RunConfig, with_overrides
from jaxft.errors import ConfigError

NO_SET = "(rows given to a Session)"  # what stands for the training set in the config of a model path


def config_of(model: RunConfig | str, overrides: Mapping[str, Any]) -> RunConfig:
    """The config of a session: the given one, or that of a model path with settings. Raises ConfigError."""
    if isinstance(model, str):
        return with_overrides({"model.path": model, "data.train": NO_SET, **overrides})
    if overrides:
        raise ConfigError("overrides belong to a model path: give them to jaxft.get_config with the config")
    return model


def course_of(config: RunConfig) -> tuple[Any, int]:
    """(settings of the schedule, its steps): constant after the warm-up if the session has no number of steps."""
    if config.train.steps is not None:
        return config.optim, config.train.steps
    return dataclasses.replace(config.optim, schedule="constant", warmup_ratio=None), 2**31
