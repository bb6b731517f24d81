"""Nested values of a config, and how single fields of them are set: by text, which the field's type reads, or typed."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from jaxft.config.data import MixtureSet
from jaxft.config.fields import Field, all_fields, as_mapping, own_fields, unknown_key
from jaxft.config.run import RunConfig
from jaxft.errors import ConfigError, did_you_mean

ASSIGNMENT = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)


def default_values() -> dict[str, Any]:
    """Every field of `RunConfig` at its default, as nested values."""
    return RunConfig().to_dict()


def field_of(key: str) -> Field | None:
    """The field of a key, which may have the name of a mixture's set in it; None for an unknown key.

    Raises ConfigError for the key of a section.
    """
    known, parts = all_fields(RunConfig), key.split(".")
    within = [name for name in known if name.startswith(f"{key}.")]
    if within:
        raise ConfigError(f"config key {key!r} is a section: set its fields one by one, such as {within[0]!r}")
    field = known.get(key) or known.get(".".join([*parts[:-2], "NAME", *parts[-1:]]))
    return None if field is None else dataclasses.replace(field, key=key)


def free_names(key: str) -> str | None:
    """The field of values under names of the user's own that a key is, or that it names a value of; else None."""
    known = all_fields(RunConfig)
    whole = next((name for name in known if f"{key}.".startswith(f"{name}.") and known[name].base is dict), None)
    return None if whole is None or known[whole].sections is not None else whole


def parse_assignment(text: str) -> tuple[str, Any]:
    """(key, value) of `section.field=value`, the value read by the type of the field. Raises ConfigError."""
    match = ASSIGNMENT.fullmatch(text)
    if match is None:
        raise ConfigError(f"override {text!r} is not of the form section.field=value")
    key, value = match.groups()
    if (whole := free_names(key)) is not None:
        typed = _untyped(value)
        if key == whole and not isinstance(typed, dict):
            raise ConfigError(f"{text} must be a JSON object, such as {key}='{{\"name\": false}}', or give {key}.NAME")
        return key, typed
    field = field_of(key)
    if field is None:
        raise ConfigError(unknown_key(key, RunConfig))
    return key, field.parse(value)


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one field, or all fields of a section that a mapping names. Raises ConfigError as `resolve` does."""
    if (whole := free_names(key)) is not None:
        key, value = (
            whole,
            value if key == whole else {**_value_of(values, whole), key.removeprefix(f"{whole}."): value},
        )
    *sections, name = key.split(".")
    node: Any = values
    if sections[:2] == ["data", "mixture"] and len(sections) == 3:
        _require_set(values["data"]["mixture"], sections[2], name)
    for section in sections:
        if not isinstance(node, Mapping) or section not in node:
            raise ConfigError(unknown_key(key, RunConfig))
        node = node[section]
    if not isinstance(node, dict) or name not in node:
        raise ConfigError(unknown_key(key, RunConfig))
    if key == "data.mixture":
        sets = as_mapping(value, key).items()
        node[name] = {one: set_values(as_mapping(fields, f"{key}.{one}")) for one, fields in sets}
    elif whole is not None:
        node[name] = dict(as_mapping(value, key))
    elif isinstance(node[name], Mapping):
        for inner, own in as_mapping(value, key).items():
            set_value(values, f"{key}.{inner}", own)
    else:
        field = field_of(key)
        node[name] = value if field is None else field.convert(value)


def _value_of(values: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def _untyped(text: str) -> Any:
    """The value of a text that no field gives a type: JSON, a word of Python or YAML for true, false and none, text."""
    words = {"True": True, "False": False, "None": None, "yes": True, "no": False, "~": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return str(text)


def _require_set(sets: dict[str, Any], name: str, field: str) -> None:
    """Adds a set to a mixture if its path is set. Raises ConfigError if another field of an unknown set is."""
    if field == "path":
        sets.setdefault(name, set_values({}))
    elif name not in sets:
        raise ConfigError(
            f"data.mixture has no set {name!r}.{did_you_mean(name, sets)} To add it, set data.mixture.{name}.path first"
        )


def set_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of one set of a mixture, from some of them. Raises ConfigError for an unknown one."""
    known = {field.key.rpartition(".")[2]: field for field in own_fields(MixtureSet, "data.mixture.NAME.")}
    out = dataclasses.asdict(MixtureSet())
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"a mixture set has no field {name!r}.{did_you_mean(name, known)}")
        out[name] = known[name].convert(value)
    return out


def merge(values: dict[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Sets the fields that the file at `path` gives, nested or with dotted keys. Raises ConfigError with the path."""
    try:
        for key, value in given.items():
            set_value(values, key, _typed(key, value))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _typed(key: str, value: Any) -> Any:
    """The value with the texts of a YAML file read by the types of the fields."""
    if isinstance(value, PlainText) and free_names(key) is not None:
        return _untyped(value)
    if isinstance(value, PlainText):
        field = field_of(key)
        return value if field is None else field.parse(value)
    if isinstance(value, Mapping):
        field = None if free_names(key) is not None else all_fields(RunConfig).get(key)
        if field is None or not field.comma_separated:
            return {inner: _typed(f"{key}.{inner}", own) for inner, own in value.items()}
    return value


class PlainText(str):
    """A scalar of a YAML file, whose type is that of the field that it is for."""
