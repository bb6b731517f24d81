"""The tokens that end an answer, as the files of a model name them.

transformers reads `eos_token_id` of generation_config.json, and of config.json if the first is absent. Many folders
have the whole list in one of the two only.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxft.data.tokenizers.files import hub_file, json_at, json_in
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.adapter_base import CONFIG as ADAPTER_CONFIG
from jaxft.files.adapter_base import known_base
from jaxft.files.hub import fetch_hub, hub_path
from jaxft.files.json_fields import LARGEST
from jaxft.files.paths import HUB, is_remote
from jaxft.files.run_folder import ADAPTER, MERGED
from jaxft.files.run_folder import MODEL as FULL

ReadJson = Callable[[str], Mapping[str, Any]]
GENERATION, MODEL = "generation_config.json", "config.json"


def end_tokens(config: Mapping[str, Any] | None) -> list[int]:
    """The ids under `eos_token_id` of a parsed generation_config.json or config.json.

    The field of a model that takes images too may be in its text_config. Negative ids stand for no token.
    Raises ModelError for anything but ids.
    """
    config = config or {}
    inner = config.get("text_config")
    given = config.get("eos_token_id")
    if given is None and isinstance(inner, Mapping):
        given = inner.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int and abs(i) <= LARGEST for i in ids):
        raise ModelError(f"eos_token_id={given!r} is neither a token id nor a list of ids: correct it in the folder")
    return [i for i in dict.fromkeys(ids) if i >= 0]


def end_tokens_at(
    path: str, revision: str | None, is_special: Callable[[int], bool], base: str | None = None
) -> list[int]:
    """The end tokens that a model's files name; for an adapter also those of its base.

    path, revision, base: as for `load_tokenizer`. is_special: whether an id is that of an added token of the tokenizer.
    Files that cannot be reached name none: whoever loads the model tells of them.
    """
    if path.startswith(HUB):
        try:
            location = hub_path(path, revision)
            if location.file is not None:
                return end_tokens_at(fetch_hub(path, revision), None, is_special)
            names = (GENERATION, MODEL, ADAPTER_CONFIG)
            files = {name: hub_file(location.repo, name, location.revision) for name in names}
        except (OSError, ValueError, CheckpointError):
            return []
        own = _end_tokens_of_folder(lambda name: json_in(files[name]), is_special)
        return own + _of_base(str(files[ADAPTER_CONFIG].parent), base, is_special)
    if is_remote(path):
        own = _end_tokens_of_folder(lambda name: json_at(f"{path.rstrip('/')}/{name}"), is_special)
        return own + _of_base(path, base, is_special)
    if path.endswith(".gguf"):
        # The package gguf imports much, which processes that tokenise rows do without.
        from jaxft.files.gguf.header import read_header

        return sorted(read_header(path).stop_ids()) if os.path.isfile(path) else []
    ends: list[int] = []
    for folder in (Path(path), *(Path(path) / name for name in (MERGED, FULL, ADAPTER))):
        ends += _end_tokens_of_folder(partial(_json_of, folder), is_special)
        ends += _of_base(str(folder), base, is_special)
    return list(dict.fromkeys(ends))


def _of_base(folder: str, base: str | None, is_special: Callable[[int], bool]) -> list[int]:
    """The end tokens of the base of a PEFT folder; none for other folders."""
    known = known_base(folder, base)
    return [] if known is None else end_tokens_at(*known, is_special)


def _json_of(folder: Path, name: str) -> dict[str, Any]:
    return json_in(folder / name)


def _end_tokens_of_folder(read: ReadJson, is_special: Callable[[int], bool]) -> list[int]:
    """The end tokens of one folder. read: the JSON object of a file by its name, empty if there is none.

    If generation_config.json names end tokens, config.json adds only those that are added tokens: some folders have a
    default of another vocabulary there, which is the id of a word.
    """
    generation, config = end_tokens(read(GENERATION)), end_tokens(read(MODEL))
    return generation + [i for i in config if i not in generation and (not generation or is_special(i))]


def with_end_tokens(generation: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json for a model of this config.json, which names every end token that either of them has.

    Readers take the end tokens of generation_config.json alone. generation: the one that the model came with.
    """
    generation = dict(generation or {})
    ends = list(dict.fromkeys([*end_tokens(generation), *end_tokens(config)]))
    tokens = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    return tokens | generation | eos_field(ends)


def eos_field(ends: list[int]) -> dict[str, Any]:
    """`eos_token_id` as readers expect it: one id, a list of several, or no field."""
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
