"""How configs are read: files, command-line overrides and JSON. The only reader of `ml_collections`."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from jaxft.config.data import MixtureSet
from jaxft.config.fields import Field, Section, all_fields, as_mapping, build, check_fields, own_fields, unknown_key
from jaxft.config.run import RunConfig
from jaxft.errors import ConfigError, did_you_mean


def default_config() -> ConfigDict:
    """A locked ConfigDict with every field of `RunConfig` at its default, for config files to fill."""
    config = ConfigDict(_defaults(RunConfig)).lock()
    config.data.mixture.unlock()  # users choose the names in it
    return config


def mixture_set(**fields: Any) -> ConfigDict:
    """A set for `config.data.mixture.NAME`, with every field of MixtureSet. Raises ConfigError for an unknown one."""
    out = ConfigDict(_defaults(MixtureSet)).lock()
    for name, value in fields.items():
        if name not in out:
            raise ConfigError(f"a mixture set has no field {name!r}.{did_you_mean(name, out)}")
        _set_value(out, name, value)
    return out


def load(path_with_arg: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """The run that a config file describes.

    path_with_arg: `configs/NAME.py` or `configs/NAME.py:arg`.
    overrides: `{"train.batch_size": 4}` or `["train.batch_size=4"]`.
    Raises ConfigError for a missing file, an unknown key, a wrong type, and a combination that cannot be carried out.
    """
    if isinstance(overrides, Mapping):
        values = load_file(path_with_arg, ())
        for key, value in overrides.items():
            _set_value(values, key, value)
        return resolve(values)
    return resolve(load_file(path_with_arg, overrides))


def load_file(path_with_arg: str, assignments: Sequence[str]) -> ConfigDict:
    """The file's ConfigDict after `a.b=value` assignments, which ml_collections' config flags read."""
    path = path_with_arg.split(":", 1)[0]
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        known = sorted(f for f in os.listdir(folder) if f.endswith(".py")) if os.path.isdir(folder) else []
        hint = did_you_mean(os.path.basename(path), known)
        raise ConfigError(f"no config file {path!r}.{hint} Files there: {', '.join(known) or 'none'}.")
    for assignment in assignments:
        if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", assignment, re.DOTALL):
            raise ConfigError(f"override {assignment!r} is not of the form section.field=value")
        _check_assignment(*assignment.split("=", 1))
    # ml_collections has no way to say None for a field whose type is a number.
    emptied = [a.split("=", 1)[0] for a in assignments if a.endswith("=None")]
    kept = [a for a in assignments if not a.endswith("=None")]
    values = flags.FlagValues()
    argv = ["jaxft", f"--config={path_with_arg}", *(f"--config.{a}" for a in kept)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections wraps what a config file raises into its own traceback text.
        first = _first_cause(error)
        if isinstance(first, ConfigError):
            raise first from error
        if isinstance(first, (AttributeError, KeyError)):
            raise ConfigError(_unknown_in_file(first)) from error
        raise ConfigError(f"{path_with_arg}: {first}") from error
    for key in emptied:
        _set_value(values.config, key, None)
    return values.config


def resolve(values: ConfigDict | Mapping[str, Any]) -> RunConfig:
    """The checked, frozen form of a ConfigDict, or of a nested mapping such as `RunConfig.to_dict()`.

    Raises ConfigError for an unknown key, a wrong type, and a combination that cannot be carried out.
    """
    nested = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    config = build(RunConfig, nested)
    check_fields(config)
    return config


def from_json(path: str) -> RunConfig:
    """The run written in a run folder's `config.json`."""
    with open(path, encoding="utf-8") as file:
        return resolve(json.load(file))


def _defaults(cls: type[Section]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in own_fields(cls):
        if issubclass(field.base, Section):
            out[field.key] = _defaults(field.base)
        elif field.sections:
            out[field.key] = ConfigDict()
        elif field.optional:
            # A placeholder keeps the type of a field whose default is None.
            out[field.key] = config_dict.placeholder(field.base)
            out[field.key].set(field.default)
        else:
            out[field.key] = field.default
    return out


def _field(key: str) -> Field | None:
    """The field of a key, which may have the name of a mixture's set in it; None for an unknown key."""
    known, parts = all_fields(RunConfig), key.split(".")
    field = known.get(key) or known.get(".".join([*parts[:-2], "NAME", *parts[-1:]]))
    return None if field is None or field.sections else field


def _check_assignment(key: str, text: str) -> None:
    field = _field(key)
    if field is None:
        raise ConfigError(unknown_key(key, RunConfig))
    name = field.base.__name__
    if text == "None":
        if not field.optional:
            raise ConfigError(f"{key}=None: the field takes {name} and cannot be left out")
    elif field.base in (int, float):
        try:
            field.base(text)
        except ValueError:
            raise ConfigError(f"{key}={text}: the field takes {name}") from None


def _first_cause(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error


def _set_value(values: ConfigDict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    node = values
    for section in sections:
        if not isinstance(node, ConfigDict) or section not in node:
            raise ConfigError(unknown_key(key, RunConfig))
        node = node[section]
    if not isinstance(node, ConfigDict) or name not in node:
        raise ConfigError(unknown_key(key, RunConfig))
    if isinstance(node.get_ref(name).get_type(), type) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if node.get_ref(name).get_type() is float else value
    if key == "data.mixture":
        sets = {n: mixture_set(**as_mapping(fields, f"{key}.{n}")) for n, fields in as_mapping(value, key).items()}
        value = ConfigDict(sets)
    try:
        node[name] = value
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r}: {error}") from error


def _unknown_in_file(error: BaseException) -> str:
    # The config file itself named a field that does not exist; ml_collections tells only its last part.
    match = re.search(r"[\"']([\w.]+)[\"']", str(error))
    return unknown_key(match.group(1), RunConfig) if match else str(error)
