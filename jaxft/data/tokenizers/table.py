"""The number of rows in the embedding table of the model that a tokenizer comes with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError
from jaxft.files.paths import HUB, is_file, is_remote, read_json
from jaxft.files.run_folder import ADAPTER, MERGED, MODEL

CONFIG, ADAPTER_CONFIG, GGUF_TABLE = "config.json", "adapter_config.json", "token_embd.weight"


def table_rows(path: str, revision: str | None = None) -> int | None:
    """The rows of the table of a model, by its config.json or its GGUF header alone.

    path, revision: as for `load_tokenizer`; an adapter has the table of its base. None if no file names a number, or
    the files cannot be reached, which is told where the model is loaded.
    """
    if path.startswith(HUB):
        return _rows_on_hub(path, revision)
    if is_remote(path):
        return _rows_in(path)
    if path.endswith(".gguf"):
        # The package gguf imports much, which processes that tokenise rows do without.
        from jaxft.files.gguf_header import read_header

        table = read_header(path).tensors.get(GGUF_TABLE) if os.path.isfile(path) else None
        return None if table is None else table.shape[0]
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    each = (_rows_in(os.path.join(folder, name)) for name in ("", MERGED, MODEL, ADAPTER))
    return next((rows for rows in each if rows is not None), None)


def _rows_in(folder: str) -> int | None:
    """The rows by the files of a local folder or an address."""
    folder = folder.rstrip("/")
    try:
        if is_file(f"{folder}/{CONFIG}"):
            return rows_by_config(read_json(f"{folder}/{CONFIG}"))
        if not is_file(f"{folder}/{ADAPTER_CONFIG}"):
            return None
        adapter = read_json(f"{folder}/{ADAPTER_CONFIG}")
    except CheckpointError:
        return None
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or Path(base).resolve() == Path(folder).resolve():
        return None
    known = "://" in base or os.path.exists(base)
    return table_rows(base if known else HUB + base, adapter.get("revision"))


def _rows_on_hub(path: str, revision: str | None) -> int | None:
    # Imported here: only users of the hub need it.
    from transformers.utils import cached_file

    name, _, pinned = path.removeprefix(HUB).strip("/").partition("@")
    try:
        file = cached_file(name, CONFIG, revision=pinned or revision)
    except (OSError, ValueError):
        return None
    return rows_by_config(read_json(file)) if file else None


def rows_by_config(hf_config: Mapping[str, Any]) -> int | None:
    """`vocab_size` of a config.json, or that of the language model inside it; None if it names none."""
    text = hf_config.get("text_config")
    for fields in (text if isinstance(text, Mapping) else {}, hf_config):
        rows = fields.get("vocab_size")
        if isinstance(rows, int) and rows > 0:
            return rows
    return None
