"""Configs as Python files, which fill a ConfigDict. The only reader of `ml_collections`."""

import ast
import inspect
import os
import re
import runpy
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxft.config.data import MixtureSet
from jaxft.config.fields import Section, all_fields, own_fields, unknown_key
from jaxft.config.reading.overrides import default_values, field_of, merge, set_values
from jaxft.config.run import RunConfig
from jaxft.errors import ConfigError

ENTRY = "get_config"


def default_config() -> ConfigDict:
    """A locked ConfigDict with every field of `RunConfig` at its default, for config files to fill."""
    config = ConfigDict(_defaults(RunConfig)).lock()
    for key, field in all_fields(RunConfig).items():
        if field.base is dict:
            _node(config, key).unlock()  # users choose the names in it
    return config


def mixture_set(**fields: Any) -> ConfigDict:
    """A set for `config.data.mixture.NAME`, with every field of MixtureSet. Raises ConfigError for an unknown one."""
    out = ConfigDict(_defaults(MixtureSet)).lock()
    for name, value in set_values(fields).items():
        out[name] = value
    return out


def read_python(path: str, arg: str | None) -> dict[str, Any]:
    """The nested values of the config that `get_config(arg)` of a Python file returns.

    The file is run anew each time and enters no table of modules. Raises ConfigError, naming file and line, for a file
    that is no config, that raises, or that returns something else.
    """
    if not _defines(_source(path), {ENTRY, "*"}):
        # Refused before it is run: it may be a script that trains.
        raise ConfigError(
            f"{path} defines no {ENTRY}: a config is a Python file with a function {ENTRY}(arg=None) that fills "
            "jaxft.config.default_config() and returns it. A shipped one can be copied: configs/quickstart.py"
        )
    try:
        make = runpy.run_path(path).get(ENTRY)
        if not callable(make):
            raise ConfigError(f"{path}: {ENTRY} is not a function that returns the config")
        if arg is not None and not inspect.signature(make).parameters:
            raise ConfigError(f"{path}: {ENTRY} takes no argument, but {arg!r} is given: leave out ':{arg}'")
        return _nested(make() if arg is None else make(arg), path)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise _error_of_file(path, error) from error


def _source(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: {error}") from error


def _defines(source: str, names: set[str]) -> bool:
    """Whether a module defines or imports one of the names. True if it is not Python, which running it will tell."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return True
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return bool(names & own.union(node.asname or node.name for node in nodes if isinstance(node, ast.alias)))


def _nested(config: Any, path: str) -> dict[str, Any]:
    if isinstance(config, RunConfig | ConfigDict):
        return config.to_dict()
    if isinstance(config, Mapping):
        values = default_values()
        merge(values, config, path)
        return values
    raise ConfigError(
        f"{path}: {ENTRY} returns {config!r}: it must return the config that it fills (is `return config` missing?)"
    )


def _node(config: ConfigDict, key: str) -> ConfigDict:
    for name in key.split("."):
        config = config[name]
    return config


def _defaults(cls: type[Section]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in own_fields(cls):
        if issubclass(field.base, Section):
            out[field.key] = _defaults(field.base)
        elif field.base is dict:
            out[field.key] = ConfigDict()
        elif field.comma_separated or field.json_list:
            # Lists are taken too, and become text when the fields are built, where other types are refused.
            out[field.key] = config_dict.FieldReference(field.default, field_type=object)
        elif field.optional:
            # A placeholder keeps the type of a field whose default is None.
            out[field.key] = config_dict.placeholder(field.base)
            out[field.key].set(field.default)
        else:
            out[field.key] = field.default
    return out


def _error_of_file(path: str, error: BaseException) -> ConfigError:
    """What a config file raised, as an error that names its line and the field."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    frames = [frame for link in chain for frame in traceback.extract_tb(link.__traceback__)]
    own = [frame for frame in frames if os.path.realpath(frame.filename) == os.path.realpath(path)]
    number = own[-1].lineno if own else getattr(error, "lineno", None)
    where = f"{path}: " if number is None else f"{path}, line {number}: "
    if any("ml_collections" in frame.filename for frame in frames):
        return _error_of_field(where, chain[-1], (own[-1].line if own else None) or "")
    if isinstance(error, SyntaxError):
        return ConfigError(f"{where}{error.msg}: it is not Python")
    kind = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
    return ConfigError(f"{where}{kind}{error}")


def _error_of_field(where: str, error: BaseException, line: str) -> ConfigError:
    """What setting a field raised; ml_collections tells only the last part of its name. line: the file's."""
    keys = re.findall(r"\bconfig\.([A-Za-z_][\w.]*)", line)
    if isinstance(error, AttributeError | KeyError):
        name = re.search(r"[\"']([\w.]+)[\"']", str(error))
        if name is None:
            return ConfigError(f"{where}{error}")
        parts = next((key.split(".") for key in keys if name[1] in key.split(".")), [name[1]])
        return ConfigError(where + unknown_key(".".join(parts[: parts.index(name[1]) + 1]), RunConfig))
    mismatch = re.fullmatch(r"(.*) is of original type <class '(\w+)'> and cannot be casted.*", str(error), re.DOTALL)
    try:
        field = field_of(keys[0]) if mismatch and keys else None
    except ConfigError as section:
        return ConfigError(f"{where}{section}")
    if mismatch and field is not None:
        return ConfigError(f"{where}{field.key} must be {field.type_words}, not {mismatch[1]} ({mismatch[2]})")
    return ConfigError(f"{where}{error}")
