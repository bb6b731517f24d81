"""Rows of a data set, by index, from files, folders, the Hugging Face hub and TensorFlow Datasets."""

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxft.config import DataConfig
from jaxft.errors import DataError, did_you_mean, listed

HUB = "hf://"
TFDS = "tfds:"
JSONL = (".jsonl", ".jsonl.gz", ".ndjson")


class Rows(Protocol):
    """Random access to the rows of one set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0. Raises DataError if it is not an object with fields."""

    def where(self, index: int) -> str:
        """The row's name in errors, such as `train.jsonl line 7`."""

    def describe(self) -> str:
        """A short description of the set, with its number of rows."""


class JsonlRows:
    """One JSON object a line; blank lines do not count. A line is parsed when its row is read."""

    def __init__(self, path: str) -> None:
        self.path = path
        opener = gzip.open if path.endswith(".gz") else open
        try:
            with opener(path, "rb") as file:
                kept = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            raise DataError(f"cannot read {path!r}: {error.strerror or error}") from error
        self._numbers = [number for number, _ in kept]
        self._lines = [line for _, line in kept]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[index])
        except ValueError as error:  # bad JSON and bad UTF-8 alike
            raise DataError(f"{self.where(index)} is not JSON: {error}. Each line must be one whole object.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(index)} is {type(row).__name__}, not an object with fields: {str(row)[:60]!r}"
            )
        return row

    def where(self, index: int) -> str:
        return f"{os.path.basename(self.path)} line {self._numbers[index]}"

    def describe(self) -> str:
        return f"{self.path} ({len(self):,} lines)"


class TableRows:
    """Rows of a `datasets.Dataset`, or of a TFDS data source."""

    def __init__(self, table: Any, name: str, split: str) -> None:
        self._table, self.name, self.split = table, name, split

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return _to_plain(self._table[int(index)])
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)} holds bytes that are not UTF-8 text: {error}") from error

    def where(self, index: int) -> str:
        return f"row {index} of {self.name} [{self.split}]"

    def describe(self) -> str:
        return f"{self.name} [{self.split}] ({len(self):,} rows)"


class Subset:
    """Some rows of another set, in the given order. In errors they have the names of the other set."""

    def __init__(self, rows: Rows, indices: Sequence[int] | np.ndarray, note: str) -> None:
        self._rows, self._indices, self._note = rows, indices, note

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(self._indices[index])]

    def where(self, index: int) -> str:
        return self._rows.where(int(self._indices[index]))

    def describe(self) -> str:
        return f"{self._note} of {self._rows.describe()}"


def open_rows(path: str, *, split: str = "train", tfds_data_dir: str | None = None) -> Rows:
    """The rows at path.

    path: a .jsonl or .jsonl.gz file; a folder written by `datasets`' save_to_disk, or one of
    parquet or JSONL files; `hf://owner/name[:config]`; `tfds:name[/config][:version]`.
    split: the part to read of a set that has parts; a file has none.
    Raises DataError if there is no such set or split.
    """
    if path.startswith(TFDS):
        return _open_tfds(path, split, tfds_data_dir)
    if path.startswith(HUB):
        name, _, config = path.removeprefix(HUB).strip("/").partition(":")
        return TableRows(_load_dataset(name, split, path, config=config or None), path, split)
    if path.endswith(JSONL):
        if not os.path.isfile(path):
            raise DataError(f"no data file {path!r}.{_neighbors(path)}")
        return JsonlRows(path)
    if os.path.isdir(path):
        return _open_folder(path, split)
    raise DataError(
        f"cannot read rows from {path!r}: give a .jsonl file, a folder written by datasets, hf://owner/name or "
        f"tfds:name.{_neighbors(path)}"
    )


def train_and_eval(config: DataConfig, seed: int) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows (None if the config holds none out).

    With `eval_fraction`, the held-out rows are drawn from all training rows by seed alone, so that they do not depend
    on `limit`. Raises DataError if no row would be left to train on.
    """
    train: Rows = open_rows(config.train, split=config.train_split, tfds_data_dir=config.tfds_data_dir)
    if config.eval is not None or config.eval_fraction is None:
        return _limit(train, config.limit), held_out_rows(config)
    train, held_out = _split_off(train, config.eval_fraction, seed)
    return _limit(train, config.limit), _limit(held_out, config.eval_limit)


def held_out_rows(config: DataConfig) -> Rows | None:
    """The rows of `data.eval`; None if it is None."""
    if config.eval is None:
        return None
    held_out = open_rows(config.eval, split=config.eval_split, tfds_data_dir=config.tfds_data_dir)
    return _limit(held_out, config.eval_limit)


def _split_off(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    total = len(rows)
    count = max(1, round(total * fraction))
    if count >= total:
        raise DataError(
            f"data.eval_fraction={fraction} of {total} rows leaves no row to train on; give more rows or set data.eval"
        )
    order = np.random.default_rng(seed).permutation(total)
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return Subset(rows, rest, f"{len(rest):,} rows"), Subset(rows, held_out, f"{count:,} rows held out by seed {seed}")


def _limit(rows: Rows, limit: int | None) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    return Subset(rows, range(limit), f"first {limit:,} rows")


def _open_folder(path: str, split: str) -> Rows:
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    if not saved:
        return TableRows(_load_dataset(path, split, path), path, split)
    datasets = _datasets(path)
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(_no_split(path, split, list(loaded)))
        return TableRows(loaded[split], path, split)
    # A folder saved from one Dataset has no parts to choose from.
    return TableRows(loaded, path, str(loaded.split or "all"))


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path!r} needs Hugging Face datasets: pip install 'jaxft[datasets]'. {error}") from error
    return datasets


def _load_dataset(name: str, split: str, path: str, *, config: str | None = None) -> Any:
    datasets = _datasets(path)
    try:
        loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"datasets cannot load {path!r}: {str(error).rstrip('.')}. Check the name; without a network "
            "the set must be in the cache already, or give a local folder of .parquet or .jsonl files."
        ) from error
    if split not in loaded:
        raise DataError(_no_split(path, split, list(loaded)))
    return loaded[split]


def _open_tfds(path: str, split: str, data_dir: str | None) -> Rows:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"{path!r} needs TensorFlow Datasets (not TensorFlow itself): pip install 'jaxft[tfds]'. {error}"
        ) from error
    name = path.removeprefix(TFDS)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        known = list(builder.info.splits)
        if split not in known:
            if known:
                raise DataError(_no_split(path, split, known))
            raise DataError(
                f"{path!r} is not prepared in {builder.data_dir}; build it once with file_format='array_record' "
                "(tfds build), or set data.tfds_data_dir to the folder it is in."
            )
        return TableRows(builder.as_data_source(split=split), path, split)
    except tfds.core.DatasetNotFoundError as error:
        dataset = name.partition("/")[0].partition(":")[0]
        hint = did_you_mean(dataset, tfds.list_builders(with_community_datasets=False))
        raise DataError(
            f"TFDS knows no set {dataset!r}, and there is none in {data_dir or 'its default data_dir'}.{hint} "
            "For a set of your own, set data.tfds_data_dir to the folder it is in."
        ) from error
    except (NotImplementedError, OSError) as error:
        raise DataError(
            f"TFDS cannot open {path!r}: {str(error).rstrip('.')}. Without TensorFlow, a set can only be "
            "read if it was prepared with file_format='array_record'."
        ) from error


def _to_plain(value: Any) -> Any:
    """The value with bytes as str, numpy as Python, and without fields that are None, at every level.

    Objects in a column of a table have the fields of all rows; absent ones are None. With these a tool call would be
    rendered with the arguments of all other calls.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, np.ndarray):
        return _to_plain(value.tolist())
    if isinstance(value, np.generic):
        return _to_plain(value.item())
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def _no_split(path: str, split: str, known: Sequence[str]) -> str:
    hint = did_you_mean(split, known)
    return (
        f"{path!r} has no split {split!r}; it has {', '.join(known)}.{hint} Set data.train_split or data.eval_split, "
        "or hold rows out of train with data.eval_fraction."
    )


def _neighbors(path: str) -> str:
    folder = Path(path).parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r}."
    hint = did_you_mean(Path(path).name, os.listdir(folder))
    return hint or f" Files there: {listed(sorted(os.listdir(folder))) or 'none'}."
