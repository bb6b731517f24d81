"""What a source of rows is, and the sources that are made of others."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


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
        """A digest of what the set is read from, in hexadecimal; it does not depend on paths.

        Equal contents have the same one; it may be that of a whole file from which some rows are taken.
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
        return self._rows.digest()


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
        return f"{self.name} ({len(self._parts):,} files, {len(self):,} rows)"

    def digest(self) -> str:
        return hashlib.sha256("\n".join(part.digest() for part in self._parts).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[Rows, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number == len(self._parts):
            raise IndexError(index)
        return self._parts[number], index - (int(self._ends[number - 1]) if number else 0)
