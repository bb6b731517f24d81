"""The rows in the embedding table of the model that a tokenizer comes with, and rows for tokens that are added."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError
from jaxft.files.hub import fetch_hub, hub_path
from jaxft.files.paths import HUB, MAX_JSON_BYTES, is_file, is_remote, json_object, read_json
from jaxft.files.run_folder import ADAPTER, MERGED, MODEL

MULTIPLE = 64  # to which a table grows, so that meshes split it evenly and its products fill whole tiles
CONFIG, ADAPTER_CONFIG, GGUF_TABLE = "config.json", "adapter_config.json", "token_embd.weight"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_TABLES = ("embed_tokens.", "lm_head.")  # of a tied base either may be there


@dataclass(frozen=True, kw_only=True)
class AddedRows:
    """The rows of a model's tables for tokens that were added to its tokenizer.

    fresh: the ids of the rows that are drawn instead of read, in increasing order; some may stand for no token yet.
    tokens: the ids of the added tokens. rows: of the tables, which have `before` rows on disk. known: the number of
    tokens, from the first, that the model was trained with.
    """

    fresh: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: int
    before: int
    known: int

    @property
    def grows(self) -> bool:
        """Whether the tables get longer; otherwise the tokens take rows that stand empty in padded tables."""
        return self.rows > self.before


def added_rows(*, tokens: Sequence[int], size: int, before: int) -> AddedRows:
    """The rows for added tokens. size: of the tokenizer, with them. before: rows of the tables on disk.

    If the tables grow, they do so to a multiple of 64.
    """
    rows = before if size <= before else -(-size // MULTIPLE) * MULTIPLE
    return AddedRows(
        fresh=tuple(sorted({*tokens, *range(before, rows)})),
        tokens=tuple(tokens),
        rows=rows,
        before=before,
        known=min(*tokens, before),
    )


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
    if (own := _rows_of_adapter(f"{folder}/{ADAPTER_WEIGHTS}")) is not None:
        return own
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or Path(base).resolve() == Path(folder).resolve():
        return None
    known = "://" in base or os.path.exists(base)
    return table_rows(base if known else HUB + base, adapter.get("revision"))


def _rows_of_adapter(file: str) -> int | None:
    """The rows of the table that an adapter's file has in the place of its base's; None if it has none."""
    if not os.path.isfile(file):
        return None
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json_object(opened.read(min(size, MAX_JSON_BYTES)) or b"{}", f"the header of {file}")
    tables = [
        entry["shape"]
        for name, entry in header.items()
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list)
        if any(table in name for table in ADAPTER_TABLES)
        and name.endswith(".weight")
        and ".lora_" not in name
        and "modules_to_save" not in name
    ]
    return max((shape[0] for shape in tables if len(shape) == 2), default=None)


def _rows_on_hub(path: str, revision: str | None) -> int | None:
    # Imported here: only users of the hub need it.
    from transformers.utils import cached_file

    try:
        location = hub_path(path, revision)
        if location.file is not None:
            return table_rows(fetch_hub(path, revision))
        file = cached_file(location.repo, CONFIG, revision=location.revision)
    except (OSError, ValueError, CheckpointError):
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
