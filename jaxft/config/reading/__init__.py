"""How configs are read: Python, YAML and JSON files, run folders, shipped configs by name, and overrides.

Every source ends as nested plain values over the defaults, to which overrides are applied; `resolve` makes a
`RunConfig` of them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.config.fields import build, check_fields
from jaxft.config.peer_names import refuse_peer_config
from jaxft.config.reading.locating import locate, shipped_names
from jaxft.config.reading.overrides import default_values, merge, parse_assignment, set_value
from jaxft.config.reading.python_file import ConfigDict, default_config, mixture_set, read_python
from jaxft.config.reading.text_files import read_json, read_yaml
from jaxft.config.run import RunConfig
from jaxft.config.smoke import smoke_values

__all__ = [
    "ConfigDict", "default_config", "from_json", "load", "mixture_set", "read_values", "resolve", "shipped_names",
    "with_overrides",
]  # fmt: skip


def load(source: str | None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """The run that a config describes.

    source: a Python, YAML or JSON file, a run folder, or the name of a shipped config, each with `:smoke` or another
    argument behind it if wanted; None: the defaults.
    overrides: `{"train.batch_size": 4}` or `["train.batch_size=4"]`, whose values are read by the type of the field.
    Raises ConfigError for a source that is no config, an unknown key, a wrong type, and a combination that cannot be
    carried out.
    """
    values = default_values() if source is None else read_values(source)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            set_value(values, key, value)
    else:
        for assignment in overrides:
            set_value(values, *parse_assignment(assignment))
    return resolve(values)


def with_overrides(overrides: Mapping[str, Any]) -> RunConfig:
    """The run with every field at its default but these, such as `{"model.path": "model"}`. Raises ConfigError."""
    return load(None, overrides)


def read_values(source: str) -> dict[str, Any]:
    """The nested values of a config, with defaults for what it does not set. Raises ConfigError as `load` does."""
    path, arg = locate(source)
    if path.endswith(".py"):
        return read_python(path, arg)
    given = read_json(path) if path.endswith(".json") else read_yaml(path)
    refuse_peer_config(given, path)
    values = default_values()
    merge(values, given, path)
    if path != source and os.path.isdir(source):
        values["output_dir"] = source  # a run folder that was moved goes on where it is
    return values if arg is None else smoke_values(values, arg)


def resolve(values: ConfigDict | Mapping[str, Any]) -> RunConfig:
    """The checked, frozen form of a ConfigDict, or of a nested mapping such as `RunConfig.to_dict()`.

    Raises ConfigError for an unknown key, a wrong type, and a combination that cannot be carried out.
    """
    nested = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    config = build(RunConfig, nested)
    check_fields(config)
    return config


def from_json(path: str) -> RunConfig:
    """The run written in a run folder's `config.json`. Raises ConfigError if the file is damaged or no config."""
    return resolve(read_json(path))
