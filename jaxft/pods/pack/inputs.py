"""The files of this machine that a config names, and the config that names their copies in the archive."""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig
from jaxft.config.fields import Field, field_values
from jaxft.data.sources.listing import is_pattern, matching, names_in
from jaxft.data.sources.tables import TFDS
from jaxft.errors import ConfigError
from jaxft.files.paths import HUB, is_remote
from jaxft.home import local_path

LARGEST = 2**30  # bytes of all files together; each host gets a copy through this machine's connection
PEFT_CONFIG, PEFT_BASE = "adapter_config.json", "base_model_name_or_path"
CODE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)(?P<weight>\s*=.*)?")


class Inputs:
    """What a run reads on this machine.

    values: the config as nested plain values, with paths relative to the root of the archive, on which the hosts run.
    files: the path here of each file, by its name in the archive. described: a line for each source, for the plan.
    Raises ConfigError for what is not there, too large, or in a form that only works on this machine.
    """

    def __init__(self, config: RunConfig) -> None:
        self.values = config.to_dict()
        self.files: dict[str, Path] = {}
        self.described: list[str] = []
        self._names: dict[str, str] = {}
        for field, value in field_values(config):
            if isinstance(value, str) and value and _is_read(field):
                self._set(field.key, self._rewritten(field, value))
        if config.data.cache != "none":
            self._set("data.cache", "auto")  # a folder of this machine
        self._add_base(config)
        self._check_size()

    def _rewritten(self, field: Field, value: str) -> str:
        if field.key == "rewards.functions":
            return ",".join(self._code(field.key, entry.strip()) for entry in value.split(",") if entry.strip())
        if field.key == "rollout.environment":
            return self._code(field.key, value.strip())
        if field.json_list:
            sources = [self._source(field.key, name) for given in names_in(value) for name in _expanded(given)]
            return sources[0] if len(sources) == 1 else json.dumps(sources, ensure_ascii=False)
        return self._source(field.key, value)

    def _source(self, key: str, name: str) -> str:
        """The name in the archive of a file or a folder; a source that hosts can reach stays as it is."""
        if name.startswith((HUB, TFDS)) or is_remote(name):
            return name
        path = Path(local_path(name))
        if not path.exists():
            raise ConfigError(f"{key}: there is no {name!r} on this machine. Correct the path, or name a bucket.")
        return self._add(key, path)

    def _code(self, key: str, entry: str) -> str:
        match = CODE.fullmatch(entry)
        if match is None:
            if ":" in entry:
                raise ConfigError(
                    f"{key}: {entry!r} is in a module of this machine's Python, which the hosts do not have. Name its "
                    "file: FILE.py:NAME"
                )
            return entry  # a built-in one
        path = Path(local_path(match["file"]))
        if not path.is_file():
            raise ConfigError(f"{key}: there is no file {match['file']!r} on this machine. Correct the path.")
        name = self._add(key, path)
        for imported in imported_files(path):
            self.files[f"{Path(name).parent.as_posix()}/{imported.relative_to(path.parent).as_posix()}"] = imported
        return f"{name}:{match['name']}{match['weight'] or ''}"

    def _add(self, key: str, path: Path) -> str:
        real = os.path.realpath(path)
        if real in self._names:
            return self._names[real]
        name = f"inputs/{len(self._names)}/{path.name or 'root'}"
        self._names[real] = name
        added = {name: path} if path.is_file() else {f"{name}/{inner}": path / inner for inner in _below(path)}
        if not added:
            raise ConfigError(f"{key}: the folder {str(path)!r} is empty. Correct the path.")
        size = sum(file.stat().st_size for file in added.values())
        if size > LARGEST:
            raise ConfigError(self._too_large(key, path, size))
        self.files |= added
        self.described.append(f"{key}: {path}, {size / 1e6:,.1f} MB")
        return name

    def _add_base(self, config: RunConfig) -> None:
        """A PEFT folder names its base by a path, which may be one of this machine."""
        description = Path(local_path(config.model.path)) / PEFT_CONFIG
        if is_remote(config.model.path) or config.model.base is not None or not description.is_file():
            return
        try:
            base = json.loads(description.read_text(encoding="utf-8"))[PEFT_BASE]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"model.path: {description} does not name its base. Set model.base.") from error
        if isinstance(base, str) and os.path.isabs(base):
            self._set("model.base", self._source("model.base", base))

    def _check_size(self) -> None:
        size = sum(path.stat().st_size for path in self.files.values())
        if size > LARGEST:
            raise ConfigError(
                f"the files that the config names have {size / 1e9:.1f} GB, and an archive for the hosts at most "
                f"{LARGEST / 1e9:.1f} GB. Copy the largest to a bucket and name them as gs://BUCKET/...:\n"
                + "\n".join(self.described)
            )

    @staticmethod
    def _too_large(key: str, path: Path, size: int) -> str:
        return (
            f"{key}: {str(path)!r} has {size / 1e9:.1f} GB, and an archive for the hosts at most {LARGEST / 1e9:.1f} "
            f"GB. Copy it to a bucket: gcloud storage cp --recursive {path} gs://BUCKET/, and give --config.{key}="
            f"gs://BUCKET/{path.name}, or name it as hf://OWNER/NAME if it is on the Hugging Face hub."
        )

    def _set(self, key: str, value: Any) -> None:
        *sections, name = key.split(".")
        values = self.values
        for section in sections:
            values = values[section]
        values[name] = value


def imported_files(path: Path) -> list[Path]:
    """The files in the folder of a Python file that it imports, and those that these import, sorted.

    A reward function or an environment can import what is in its folder. Raises ConfigError for a file that is no
    Python.
    """
    folder, seen, waiting = path.parent, {path}, [path]
    while waiting:
        for parts in _imported_modules(waiting.pop(), folder):
            modules = [folder.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
            files = {file for one in modules for file in (one.with_suffix(".py"), one / "__init__.py")}
            new = {file for file in files if file.is_file()} - seen
            seen |= new
            waiting += new
    return sorted(seen - {path})


def _imported_modules(path: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """The parts of the names of all modules that a file may import, as seen from `folder`."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is no Python that can be read: {error}. Correct it.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.relative_to(folder).parts
            around = package[: len(package) - node.level + 1] if node.level else ()
            module = (*around, *(node.module or "").split(".")) if node.module else around
            yield from ((*module, alias.name) for alias in node.names)


def _is_read(field: Field) -> bool:
    """Whether a field names what a run reads."""
    names_content = (field.by_content or field.is_path) and not field.key.endswith("revision")
    return (names_content or field.json_list) and field.key not in ("output_dir", "data.cache")


def _expanded(name: str) -> list[str]:
    return matching(name) if is_pattern(name) and not is_remote(name) else [name]


def _below(folder: Path) -> list[str]:
    """The files below a folder without hidden ones, sorted."""
    inner = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in inner if not any(part.startswith(".") for part in path.parts))
