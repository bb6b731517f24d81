"""How configs are read: files, command-line overrides and JSON. The only reader of `ml_collections`."""

import dataclasses
import json
import os
import re
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from jaxft.config.data import MixtureSet
from jaxft.config.fields import Field, Section, all_fields, as_mapping, build, check_fields, own_fields, unknown_key
from jaxft.config.run import RunConfig
from jaxft.errors import ConfigError, did_you_mean

# Fields whose values stand under names that users choose.
FREE_NAMES = tuple(field.key for field in all_fields(RunConfig).values() if field.base is dict)


def default_config() -> ConfigDict:
    """A locked ConfigDict with every field of `RunConfig` at its default, for config files to fill."""
    config = ConfigDict(_defaults(RunConfig)).lock()
    for key in FREE_NAMES:
        _node(config, key).unlock()
    return config


def mixture_set(**fields: Any) -> ConfigDict:
    """A set for `config.data.mixture.NAME`, with every field of MixtureSet. Raises ConfigError for an unknown one."""
    out = ConfigDict(_defaults(MixtureSet)).lock()
    known = {field.key.rpartition(".")[2]: field for field in own_fields(MixtureSet, "data.mixture.NAME.")}
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"a mixture set has no field {name!r}.{did_you_mean(name, known)}")
        out[name] = known[name].convert(value)
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


def with_overrides(overrides: Mapping[str, Any]) -> RunConfig:
    """The run with every field at its default but these, such as `{"model.path": "model"}`. Raises ConfigError."""
    values = default_config()
    for key, value in overrides.items():
        _set_value(values, key, value)
    return resolve(values)


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
    named = [a.split("=", 1) for a in assignments if _free_names(a.split("=", 1)[0])]
    kept = [a for a in assignments if not a.endswith("=None") and a.split("=", 1) not in named]
    values = flags.FlagValues()
    argv = ["jaxft", f"--config={path_with_arg}", *(f"--config.{a}" for a in kept)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _error_of_file(path, error) from error
    for key, text in named:
        _set_named(values.config, key, text)
    for key in set(emptied) - {key for key, _ in named}:
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
        elif field.base is dict:
            out[field.key] = ConfigDict()
        elif field.optional:
            # A placeholder keeps the type of a field whose default is None.
            out[field.key] = config_dict.placeholder(field.base)
            out[field.key].set(field.default)
        else:
            out[field.key] = field.default
    return out


def _field(key: str) -> Field | None:
    """The field of a key, which may have the name of a mixture's set in it; None for an unknown key.

    Raises ConfigError for the key of a section.
    """
    known, parts = all_fields(RunConfig), key.split(".")
    within = [name for name in known if name.startswith(f"{key}.")]
    if within:
        raise ConfigError(f"config key {key!r} is a section: set its fields one by one, such as {within[0]!r}")
    field = known.get(key) or known.get(".".join([*parts[:-2], "NAME", *parts[-1:]]))
    return None if field is None else dataclasses.replace(field, key=key)


def _check_assignment(key: str, text: str) -> None:
    if _free_names(key):
        return
    field = _field(key)
    if field is None:
        raise ConfigError(unknown_key(key, RunConfig))
    if text == "None":
        field.convert(None)
        return
    try:
        if field.base in (int, float):
            field.base(text)
    except ValueError:
        raise ConfigError(f"{key}={text} must be {field.type_words}") from None
    if field.base is bool and text.lower() not in ("true", "false", "t", "f", "1", "0"):
        raise ConfigError(f"{key}={text} must be {field.type_words}")


def _free_names(key: str) -> str | None:
    """The field of plain values under free names that a key is, or that it names a value of; None for other keys."""
    plain = (name for name in FREE_NAMES if all_fields(RunConfig)[name].sections is None)
    return next((name for name in plain if key == name or key.startswith(f"{name}.")), None)


def _set_named(values: ConfigDict, key: str, text: str) -> None:
    """Sets all values under free names, from a JSON object, or one of them, from JSON or else from its text."""
    field = typing.cast(str, _free_names(key))
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        value = text
    if key == field:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={text} must be a JSON object, such as {key}='{{\"enable_thinking\": false}}'")
        _set_value(values, key, value)
    else:
        _node(values, field)[key.removeprefix(f"{field}.")] = value


def _node(values: ConfigDict, key: str) -> ConfigDict:
    for name in key.split("."):
        values = values[name]
    return values


def _set_value(values: ConfigDict, key: str, value: Any) -> None:
    """Sets one field, or all fields of a section that a mapping names. Raises ConfigError as `resolve` does."""
    *sections, name = key.split(".")
    node = values
    for section in sections:
        if not isinstance(node, ConfigDict) or section not in node:
            raise ConfigError(unknown_key(key, RunConfig))
        node = node[section]
    if not isinstance(node, ConfigDict) or name not in node:
        raise ConfigError(unknown_key(key, RunConfig))
    if key == "data.mixture":
        sets = {n: mixture_set(**as_mapping(fields, f"{key}.{n}")) for n, fields in as_mapping(value, key).items()}
        node[name] = ConfigDict(sets)
    elif key in FREE_NAMES:
        node[name] = ConfigDict(dict(as_mapping(value, key))).unlock()
    elif isinstance(node[name], ConfigDict):
        for inner, own in as_mapping(value, key).items():
            _set_value(values, f"{key}.{inner}", own)
    else:
        field = _field(key)
        node[name] = value if field is None else field.convert(value)


def _error_of_file(path: str, error: BaseException) -> ConfigError:
    """What a config file raised, as an error that names its line and the field.

    ml_collections wraps the exception of the file into others, and tells only the last part of a field's name.
    """
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    first = chain[-1]
    if isinstance(first, ConfigError):
        return first
    frames = [frame for link in chain for frame in traceback.extract_tb(link.__traceback__)]
    line = next(
        (frame for frame in reversed(frames) if os.path.realpath(frame.filename) == os.path.realpath(path)), None
    )
    where = f"{path}: " if line is None else f"{path}, line {line.lineno}: "
    keys = re.findall(r"\bconfig\.([A-Za-z_][\w.]*)", "" if line is None else line.line or "")
    if isinstance(first, (AttributeError, KeyError)):
        name = re.search(r"[\"']([\w.]+)[\"']", str(first))
        if name is None:
            return ConfigError(f"{where}{first}")
        parts = next((key.split(".") for key in keys if name[1] in key.split(".")), [name[1]])
        return ConfigError(where + unknown_key(".".join(parts[: parts.index(name[1]) + 1]), RunConfig))
    mismatch = re.fullmatch(r"(.*) is of original type <class '(\w+)'> and cannot be casted.*", str(first), re.DOTALL)
    try:
        field = _field(keys[0]) if mismatch and keys else None
    except ConfigError as section:
        return ConfigError(f"{where}{section}")
    if mismatch and field is not None:
        return ConfigError(f"{where}{field.key} must be {field.type_words}, not {mismatch[1]} ({mismatch[2]})")
    return ConfigError(f"{where}{first}")
