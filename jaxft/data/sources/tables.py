"""Rows of the Hugging Face hub, of folders that `datasets` saved, and of TensorFlow Datasets."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from jaxft.data.sources.columns import to_plain
from jaxft.errors import DataError, counted, did_you_mean
from jaxft.files.digest import content_digest

HUB = "hf://"
TFDS = "tfds:"


class TableRows:
    """Rows of a `datasets.Dataset`, or of a TFDS data source."""

    def __init__(self, table: Any, name: str, split: str, files: Sequence[str]) -> None:
        """files: those that hold the rows, of which the digest is made."""
        self._table, self.name, self.split, self._files = table, name, split, files

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return to_plain(self._table[int(index)])
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)} holds bytes that are not UTF-8 text: {error}") from error
        except ImportError as error:  # for a column of images or sounds
            raise DataError(
                f"{self.where(index)} has a column that is no text: {error}. Save the set without it, by "
                "remove_columns of datasets, and give that folder."
            ) from error

    def where(self, index: int) -> str:
        return f"row {index} of {self.name} [{self.split}]"

    def describe(self) -> str:
        return f"{self.name} [{self.split}] ({counted(len(self), 'row')})"

    def digest(self) -> str:
        if self._files:
            return content_digest(self._files)
        rows = (json.dumps(self[index], default=str).encode() for index in range(len(self)))
        return hashlib.sha256(b"\n".join(rows)).hexdigest()


def open_hub(path: str, split: str) -> TableRows:
    """The rows of `hf://owner/name[:config]`, from the Hugging Face hub or its cache. Raises DataError without them."""
    name, _, config = path.removeprefix(HUB).strip("/").partition(":")
    return open_repository(name, split, path, config=config or None)


def open_repository(name: str, split: str, path: str, *, config: str | None = None) -> TableRows:
    """The rows that `datasets` loads by a name, or from a folder whose README says what its files are.

    path: as the user gave it. config: one of the sets in the repository. Raises DataError, with every cause that
    `datasets` tells, if it cannot load them.
    """
    datasets = _datasets(path)
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # of whatever library fetches or reads the files
        raise DataError(
            f"datasets cannot load {path!r}: {_causes(error)}. Check the name, which may have one of its sets behind "
            "it, as in hf://owner/name:set; without a network the set must be in the cache already, or give a local "
            "folder of .parquet or .jsonl files."
        ) from error
    return _table(loaded, split, path)


def is_saved(path: str) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def open_saved(path: str, split: str) -> TableRows:
    """The rows of a folder that `save_to_disk` wrote. Raises DataError if it is damaged or has no such split."""
    datasets = _datasets(path)
    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:
        raise DataError(f"datasets cannot load the folder {path!r}: {_causes(error)}. Write it again.") from error
    if isinstance(loaded, datasets.DatasetDict):
        return _table(loaded, split, path)
    # A folder saved from one Dataset has no parts to choose from.
    return TableRows(loaded, path, str(loaded.split or "all"), _files_of(loaded))


def _table(loaded: Any, split: str, path: str) -> TableRows:
    if split not in loaded:
        raise DataError(no_split(path, split, list(loaded)))
    return TableRows(loaded[split], path, split, _files_of(loaded[split]))


def _files_of(table: Any) -> list[str]:
    return [entry["filename"] for entry in table.cache_files]


def _causes(error: BaseException) -> str:
    """What an error and the errors behind it say: that of `datasets` itself often does not tell the reason."""
    messages: list[str] = []
    link: BaseException | None = error
    while link is not None:
        message = " ".join(str(link).split()).rstrip(".") or type(link).__name__
        if not any(message in other for other in messages):
            messages.append(message)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; because: ".join(messages)


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path!r} needs Hugging Face datasets: pip install 'jaxft[datasets]'. {error}") from error
    return datasets


def open_tfds(path: str, split: str, data_dir: str | None) -> TableRows:
    """The rows of `tfds:name[/config][:version]`, read without TensorFlow. data_dir: the folder of such sets.

    Raises DataError for a set or split that is not there, and for one that only TensorFlow can read.
    """
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
                raise DataError(no_split(path, split, known))
            raise DataError(
                f"{path!r} is not prepared in {builder.data_dir}; build it once with file_format='array_record' "
                "(tfds build), or set data.tfds_data_dir to the folder it is in."
            )
        files = [str(file) for file in builder.info.splits[split].filepaths]
        return TableRows(builder.as_data_source(split=split), path, split, files)
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


def no_split(path: str, split: str, known: Sequence[str]) -> str:
    """The error message for a part that a set does not have."""
    hint = did_you_mean(split, known)
    return (
        f"{path!r} has no split {split!r}; it has {', '.join(known)}.{hint} Set data.train_split or data.eval_split, "
        "or hold rows out of train with data.eval_fraction."
    )
