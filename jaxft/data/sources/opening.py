"""Opens the rows that a config names, and holds some of them out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.sources.columns import ArrowRows, ParquetRows
from jaxft.data.sources.csv_rows import rows_of_csv
from jaxft.data.sources.file_kinds import HEAD, compression_of, kind_by_name, kind_of
from jaxft.data.sources.json_array import rows_of_array
from jaxft.data.sources.json_rows import JsonlRows
from jaxft.data.sources.listing import (
    check_names,
    described_by_readme,
    files_of_folder,
    is_pattern,
    matching,
    names_in,
    no_source,
    refuse_doubles,
)
from jaxft.data.sources.rows import Concatenation, Rows, Subset
from jaxft.data.sources.tables import HUB, TFDS, is_saved, open_hub, open_repository, open_saved, open_tfds
from jaxft.data.sources.text import in_store, open_raw, text_of
from jaxft.data.sources.text_rows import TextRows
from jaxft.errors import DataError, counted
from jaxft.files.paths import is_remote
from jaxft.home import local_path

DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How sources are read, by the fields of these names in `open_rows`."""

    split: str
    tfds_data_dir: str | None
    rows_field: str | None
    sample_by: str


def open_rows(
    path: str | Sequence[str],
    *,
    split: str = "train",
    tfds_data_dir: str | None = None,
    rows_field: str | None = None,
    sample_by: str = "document",
) -> Rows:
    """The rows at path.

    path: a file, a folder written by `datasets`' save_to_disk or with files in it, `hf://owner/name[:config]`, or
    `tfds:name[/config][:version]`; a pattern with `*`; a list of these, also as JSON or with commas between them. Files
    are .json (an array), .jsonl, .csv, .tsv, .txt (each also .gz, .zst, .bz2 or .xz), .parquet and .arrow, here or at
    an address that fsspec reads.
    split: the part to read of a set that has parts; a file has none. rows_field: the field of a .json file's object
    that holds its rows. sample_by: what a row of a .txt file is: the `document`, a `paragraph` or a `line`.
    Raises DataError if there is no such set or split, and for a file that is damaged or not what its name says.
    """
    given = names_in(path) if isinstance(path, str) else list(path)
    check_names(given)
    names = [name for one in given for name in (matching(one) if is_pattern(one) else [one])]
    shown = path if isinstance(path, str) else ", ".join(given)
    if not names:
        raise DataError("data names no files: the list is empty")
    refuse_doubles(names, shown)
    how = Reading(split=split, tfds_data_dir=tfds_data_dir, rows_field=rows_field, sample_by=sample_by)
    parts = [part for name in names for part in _open_one(name, how)]
    return parts[0] if len(parts) == 1 else Concatenation(parts, shown)


def train_and_eval(config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows (None if the config holds none out).

    With `eval_fraction`, the held-out rows are drawn from all training rows by seed alone, so that they do not depend
    on `limit`. Raises DataError if no row would be left to train on.
    """
    train = _open(config, config.train, config.train_split)
    if config.eval is not None or config.eval_fraction is None:
        return _limit(train, config.limit), held_out_rows(config)
    train, held_out = _split_off(train, config.eval_fraction, seed)
    return _limit(train, config.limit), _limit(held_out, config.eval_limit)


def held_out_rows(config: DataConfig) -> Rows | None:
    """The rows of `data.eval`; None if it is None."""
    if config.eval is None:
        return None
    return _limit(_open(config, config.eval, config.eval_split), config.eval_limit)


def _open(config: DataConfig, path: str, split: str) -> Rows:
    return open_rows(
        path,
        split=split,
        tfds_data_dir=config.tfds_data_dir,
        rows_field=config.rows_field,
        sample_by=config.sample_by,
    )


def _open_one(path: str, how: Reading) -> list[Rows]:
    """The rows of one source, as one set for each of its files."""
    if path.startswith(TFDS):
        folder = None if how.tfds_data_dir is None else local_path(how.tfds_data_dir)
        return [open_tfds(path, how.split, folder)]
    if path.startswith(HUB):
        return [open_hub(path, how.split)]
    path = local_path(path)
    if not _is_folder(path):
        return [_open_file(path, how)]
    if is_saved(path):
        return [open_saved(path, how.split)]
    if described_by_readme(path):
        return [open_repository(path, how.split, path)]
    return [_open_file(name, how) for name in files_of_folder(path, how.split)]


def _is_folder(path: str) -> bool:
    """Whether a path or address is a folder rather than a file. Raises DataError if it is neither."""
    if not is_remote(path):
        if not os.path.exists(path):
            raise DataError(no_source(path))
        return os.path.isdir(path)
    if in_store(path, lambda files, name: files.isdir(name)):
        return True
    if in_store(path, lambda files, name: files.exists(name)):
        return False
    raise DataError(no_source(path))


def _open_file(path: str, how: Reading) -> Rows:
    if not is_remote(path) and not os.path.isfile(path):
        raise DataError(
            f"{path!r} is a pipe or a device, which can be read only once, and rows are read several times: write them "
            "to a file first"
        )
    by_name = kind_by_name(path)
    with open_raw(path) as file:
        head = file.read(HEAD)
    if compression_of(path, head) is None:
        kind = kind_of(path, head)
        if kind == "parquet":
            return ParquetRows(path)
        if kind == "arrow":
            return ArrowRows(path)
    elif by_name is not None and by_name.name in ("parquet", "arrow"):
        raise DataError(f"cannot read {path!r}: decompress it first, since a {by_name.name} file is read in parts")
    text = text_of(path)
    kind = kind_of(path, text.read(0, HEAD))
    if kind == "jsonl":
        return JsonlRows(path, text)
    if kind in DELIMITERS:
        return rows_of_csv(path, text, DELIMITERS[kind])
    if kind == "text":
        return TextRows(path, text, how.sample_by)
    return rows_of_array(path, text, how.rows_field)


def _split_off(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    total = len(rows)
    count = max(1, round(total * fraction))
    if count >= total:
        raise DataError(
            f"data.eval_fraction={fraction} of {counted(total, 'row')} leaves no row to train on; give more rows "
            "or set data.eval"
        )
    order = np.random.default_rng(seed).permutation(total)
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return Subset(rows, rest, counted(len(rest), "row")), Subset(
        rows, held_out, f"{counted(count, 'row')} held out by seed {seed}"
    )


def _limit(rows: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    return Subset(rows, range(limit), f"first {counted(limit, 'row')}")
