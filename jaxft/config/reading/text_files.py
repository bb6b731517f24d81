"""Configs as YAML and JSON."""

import json
from typing import Any

from jaxft.config.reading.overrides import PlainText
from jaxft.errors import ConfigError

EMPTY = ("", "~", "null", "Null", "NULL", "None")
WORDS_OF_A_MODEL = ("model_type", "architectures", "hidden_size")


def read_json(path: str) -> dict[str, Any]:
    """The values in a JSON config, such as a run folder's. Raises ConfigError if it is damaged or something else."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    return _as_config(values, path)


def read_yaml(path: str) -> dict[str, Any]:
    """The values in a YAML config; scalars are `PlainText` unless they are quoted, and None if they are empty.

    YAML's own types would make text of 1e-4, False of `no` and 750 of 12:30, so the fields decide instead.
    Raises ConfigError for a file that is damaged, says a key twice, or is no mapping.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        """Leaves scalars as text."""

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            if isinstance(node, yaml.ScalarNode):
                if node.style is not None:
                    return str(node.value)
                return None if node.value in EMPTY else PlainText(node.value)
            # Deep: values are wanted at once, not when the whole document has been read.
            return super().construct_object(node, deep=True)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            pairs = [(self._key(key), self.construct_object(value, deep=True)) for key, value in node.value]
            return _unique(pairs, f"{path}, line {node.start_mark.line + 1}")

        def _key(self, node: yaml.Node) -> str:
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.ScalarNode):
                raise ConfigError(f"{path}, line {line}: the key of a field must be a name")
            if node.value == "<<":
                raise ConfigError(f"{path}, line {line}: merge keys (<<) are not read: write the fields out")
            return str(node.value)

    try:
        with open(path, "rb") as file:
            values = yaml.load(file, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return _as_config(values, path)


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{where}: {twice!r} is set twice: keep one of the two")
    return values


def _as_config(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        what = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path} holds {what}, and a config is a mapping of sections: model, data, train, ...")
    if any(word in values for word in WORDS_OF_A_MODEL):
        raise ConfigError(
            f"{path} describes a model, not a run: give its folder as --model, and rows as --data, or a config of a run"
        )
    return values
