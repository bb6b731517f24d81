"""Rows of parquet and Arrow files, read by pyarrow a group or a batch of rows at a time."""

import datetime
import decimal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow

from jaxft.data.sources.text import bytes_of, open_raw
from jaxft.errors import DataError, counted
from jaxft.files.digest import content_digest
from jaxft.files.paths import file_name, is_remote

CONVERTED = 256  # rows that become Python objects at once


class ColumnRows(ABC):
    """Rows of a file with columns. `groups` of rows are read one at a time, and only the last one is kept."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._group: tuple[int, Any] | None = None
        self._converted: tuple[int, list[dict[str, Any]]] = (-1, [])
        try:
            self._ends = np.cumsum(self._group_sizes())
        except DataError:
            raise
        except (OSError, ValueError) as error:  # what pyarrow raises for damaged files
            raise DataError(_damaged(path, error)) from error

    def __reduce__(self) -> tuple[type["ColumnRows"], tuple[str]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, converted = self._converted
        if not first <= index < first + len(converted):
            first, converted = self._convert(index)
            self._converted = (first, converted)
        try:
            return to_plain(converted[index - first])
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)} holds bytes that are not UTF-8 text: {error}") from error

    def where(self, index: int) -> str:
        return f"row {index} of {file_name(self.path)}"

    def describe(self) -> str:
        return f"{self.path} ({counted(len(self), 'row')})"

    def digest(self) -> str:
        return content_digest(self.path)

    def _convert(self, index: int) -> tuple[int, list[dict[str, Any]]]:
        """(number of the first, rows) of those around a row, as Python objects."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        try:
            if self._group is None or self._group[0] != number:
                self._group = None  # freed before the next one is read
                self._group = (number, self._read_group(number))
            own = (index - start) // CONVERTED * CONVERTED
            return start + own, self._group[1].slice(own, CONVERTED).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{self.where(index)}: {_damaged(self.path, error)}") from error

    @abstractmethod
    def _group_sizes(self) -> list[int]:
        """The number of rows of every group."""

    @abstractmethod
    def _read_group(self, number: int) -> Any:
        """The rows of one group, as a table of pyarrow."""


class ParquetRows(ColumnRows):
    """Rows of a parquet file, of which one row group is in memory. A remote one is read in place."""

    def _group_sizes(self) -> list[int]:
        with self._open() as file:
            self._metadata = file.metadata
            _refuse_doubles(file.schema_arrow.names, self.path)
        return [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]

    def _read_group(self, number: int) -> Any:
        with self._open(self._metadata) as file:
            return file.read_row_group(number)

    def _open(self, metadata: Any = None) -> Any:
        from pyarrow import parquet  # takes longer to import than all else of a set without such files

        return parquet.ParquetFile(open_raw(self.path) if is_remote(self.path) else self.path, metadata=metadata)


class ArrowRows(ColumnRows):
    """Rows of an Arrow file or stream, as `datasets` and pandas' Feather write them. A local file is mapped."""

    def _group_sizes(self) -> list[int]:
        source = pyarrow.py_buffer(bytes_of(self.path)) if is_remote(self.path) else pyarrow.memory_map(self.path)
        try:
            table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:  # a stream has no footer
            if not is_remote(self.path):
                source.seek(0)
            table = pyarrow.ipc.open_stream(source).read_all()
        _refuse_doubles(table.column_names, self.path)
        self._batches = table.to_batches()
        return [batch.num_rows for batch in self._batches]

    def _read_group(self, number: int) -> Any:
        batch = self._batches[number]
        batch.validate(full=True)  # else offsets of a damaged file would point anywhere in memory
        return batch


def to_plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with bytes as str, numbers of numpy as Python's, times as ISO text, and nested fields that are not None.

    Objects in a column of a table have the fields of all rows; absent ones are None. With these a tool call would be
    rendered with the arguments of all other calls. A column of the row itself stays, so that an error can name it.
    Raises UnicodeDecodeError for bytes that are not UTF-8.
    """
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return value


def _refuse_doubles(names: Sequence[str], path: str) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path!r} has several columns of the name {', '.join(doubled)}: rename all but one of each")


def _damaged(path: str, error: BaseException) -> str:
    return f"cannot read {path!r}: {str(error).rstrip('.')}. Fetch or write it again if it is damaged or cut short."
