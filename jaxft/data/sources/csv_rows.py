"""Rows of CSV and TSV files, whose values are text exactly as it is written."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.data.sources.json_rows import BOM, JsonRows, decode
from jaxft.data.sources.text import Spool, Text, line_spans
from jaxft.errors import DataError, listed
from jaxft.files.paths import file_name


class CsvRows(JsonRows):
    """Rows of cells, each of which is a JSON list in a text. names: of the columns."""

    def __init__(
        self, path: str, text: Text, starts: np.ndarray, ends: np.ndarray, lines: np.ndarray, names: Sequence[str]
    ) -> None:
        super().__init__(path, text, starts, ends, lines)
        self._names = names

    def __getitem__(self, index: int) -> dict[str, Any]:
        cells = json.loads(self._bytes_at(index))
        if len(cells) != len(self._names):
            raise DataError(
                f"{self.where(index)} has {len(cells)} cells, but there are {len(self._names)} columns "
                f"({listed(self._names)}). A cell that holds a separator, a quotation mark or a line break must be in "
                "quotation marks."
            )
        return dict(zip(self._names, cells, strict=True))


def rows_of_csv(path: str, text: Text, delimiter: str) -> CsvRows:
    """The rows of a file with comma- or tab-separated columns, whose first row names them. Every value is text.

    delimiter: what stands between columns. If the first row has no comma but semicolons, as spreadsheets of many
    countries write it, these are read in place of commas. A row that has not as many cells as there are names raises
    DataError when it is read. Raises DataError, naming the line, for quotes that do not close.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _lines(path, text)
    first = next(lines, "")
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # as Excel writes it
        delimiter, first = first[4], next(lines, "")
    elif delimiter not in first:
        delimiter = next((other for other in ";\t" if other in first), delimiter)
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    spool, names, start = Spool(), list[str](), 1
    spans, numbers = list[tuple[int, int]](), list[int]()
    skipped = int(text.read(0, 16).removeprefix(BOM)[:4].lower() == b"sep=")
    try:
        for cells in reader:
            line, start = start + skipped, reader.line_num + 1
            if not names:
                names = _column_names(cells, path)
            elif cells:
                spans.append(spool.append(json.dumps(cells).encode()))
                numbers.append(line)
    except csv.Error as error:
        raise DataError(
            f"{file_name(path)} line {start + skipped} is not CSV: {error}. A quoted cell begins and ends with a "
            "quotation mark, and those within it are doubled."
        ) from error
    positions = np.array(spans, np.int64).reshape(-1, 2)
    return CsvRows(path, spool, positions[:, 0], positions[:, 1], np.array(numbers, np.int64), names)


def _lines(path: str, text: Text) -> Iterator[str]:
    """Every line with a line feed at its end; blank ones too, which may be within a quoted cell."""
    starts, ends, numbers = line_spans(text)
    line = 0
    for start, end, number in zip(starts.tolist(), ends.tolist(), numbers.tolist(), strict=True):
        yield from ["\n"] * (number - line - 1)
        line = number
        raw = text.read(start, end - start)
        yield decode(raw.removeprefix(BOM) if start == 0 else raw, path, f"{file_name(path)} line {number}") + "\n"


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _column_names(cells: list[str], path: str) -> list[str]:
    # pandas writes its index into a column without a name, and calls it so when it reads one.
    names = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(cells)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path!r} has several columns of the name {listed(doubled)}: rename all but one of each")
    return names
