"""The rows in the embedding table of the model that a tokenizer comes with, and rows for tokens that are added."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.tokenizers.files import hub_file
from jaxft.errors import CheckpointError
from jaxft.files.adapter_base import CONFIG as ADAPTER_CONFIG
from jaxft.files.adapter_base import known_base
from jaxft.files.hub import fetch_hub, hub_path
from jaxft.files.paths import HUB, MAX_JSON_BYTES, check_link, is_file, is_remote, json_object, read_json
from jaxft.files.run_folder import ADAPTER, MERGED, MODEL

MULTIPLE = 64  # to which a table grows, so that meshes split it evenly and its products fill whole tiles
CONFIG, GGUF_TABLE = "config.json", "token_embd.weight"
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


def table_rows(path: str, revision: str | None = None, base: str | None = None) -> int | None:
    """The rows of the table of a model, by its config.json or its GGUF header alone.

    path, revision, base: as for `load_tokenizer`; an adapter has the table of its base. None if no file names a number,
    or the files cannot be reached, which is told where the model is loaded.
    """
    if path.startswith(HUB):
        return _rows_on_hub(path, revision, base)
    if is_remote(path):
        return _rows_in(path, base)
    if path.endswith(".gguf"):
        # The package gguf imports much, which processes that tokenise rows do without.
        from jaxft.files.gguf.header import read_header

        table = read_header(path).tensors.get(GGUF_TABLE) if os.path.isfile(path) else None
        return None if table is None else table.shape[0]
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    each = (_rows_in(os.path.join(folder, name), base) for name in ("", MERGED, MODEL, ADAPTER))
    return next((rows for rows in each if rows is not None), None)


def _rows_in(folder: str, base: str | None) -> int | None:
    """The rows by the files of a local folder or an address."""
    folder = folder.rstrip("/")
    try:
        if is_file(f"{folder}/{CONFIG}"):
            return rows_by_config(read_json(f"{folder}/{CONFIG}"))
        if not is_file(f"{folder}/{ADAPTER_CONFIG}"):
            return None
    except CheckpointError:
        return None
    if (own := _rows_of_adapter(f"{folder}/{ADAPTER_WEIGHTS}")) is not None:
        return own
    known = known_base(folder, base)
    return None if known is None else table_rows(*known)


def _rows_of_adapter(file: str) -> int | None:
    """The rows of the table that an adapter's file has in the place of its base's; None if it has none."""
    if not os.path.isfile(file):
        return None
    with open(check_link(file, os.path.dirname(file)), "rb") as opened:
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


def _rows_on_hub(path: str, revision: str | None, base: str | None) -> int | None:
    try:
        location = hub_path(path, revision)
        if location.file is not None:
            return table_rows(fetch_hub(path, revision))
        files = [hub_file(location.repo, name, location.revision) for name in (CONFIG, ADAPTER_CONFIG)]
    except (OSError, ValueError, CheckpointError):
        return None
    there = next((file for file in files if file.is_file()), None)
    return None if there is None else _rows_in(str(there.parent), base)


def rows_by_config(hf_config: Mapping[str, Any]) -> int | None:
    """`vocab_size` of a config.json, or that of the language model inside it; None if it names none."""
    text = hf_config.get("text_config")
    for fields in (text if isinstance(text, Mapping) else {}, hf_config):
        rows = fields.get("vocab_size")
        if isinstance(rows, int) and rows > 0:
            return rows
    return None
