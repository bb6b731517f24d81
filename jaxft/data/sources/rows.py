"""What a source of rows is, and the sources that are made of others."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxft.errors import DataError, counted


class Rows(Protocol):
    """Random access to the rows of one set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`, from 0. Raises DataError if it is not an object with fields."""

    def where(self, index: int) -> str:
        """The row's name in errors, such as `train.jsonl line 7`."""

    def describe(self) -> str:
        """A short description of the set, with its number of rows."""

    def digest(self) -> str:
        """A digest of what the set is read from and of which rows it has, in hexadecimal, whatever the paths.

        Files that are read in other ways, such as parts of one file, may have the same one.
        """


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

    def digest(self) -> str:
        indices = np.asarray(self._indices, np.int64).tobytes()
        return hashlib.sha256(self._rows.digest().encode() + indices).hexdigest()


class Listed:
    """Rows that were read before, with their names; a row that could not be read is the error that it raised."""

    def __init__(self, rows: Sequence[dict[str, Any] | DataError], names: Sequence[str]) -> None:
        self._rows, self._names = rows, names

    @classmethod
    def of(cls, rows: Rows, start: int, stop: int) -> "Listed":
        """The rows from start to stop - 1 of another set."""
        read: list[dict[str, Any] | DataError] = []
        for index in range(start, stop):
            try:
                read.append(rows[index])
            except DataError as error:
                read.append(error)
        return cls(read, [rows.where(index) for index in range(start, stop)])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if isinstance(row, DataError):
            raise row
        return row

    def where(self, index: int) -> str:
        return self._names[index]

    def describe(self) -> str:
        return counted(len(self), "row")

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._rows, default=str).encode()).hexdigest()


class Concatenation:
    """The rows of several sets, one set after another. name: for all of them together, such as a list of paths."""

    def __init__(self, parts: Sequence[Rows], name: str) -> None:
        self._parts, self.name = parts, name
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, own = self._locate(index)
        return part[own]

    def where(self, index: int) -> str:
        part, own = self._locate(index)
        return part.where(own)

    def describe(self) -> str:
        return f"{self.name} ({counted(len(self._parts), 'file')}, {counted(len(self), 'row')})"

    def digest(self) -> str:
        return hashlib.sha256("\n".join(part.digest() for part in self._parts).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[Rows, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number == len(self._parts):
            raise IndexError(index)
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)
