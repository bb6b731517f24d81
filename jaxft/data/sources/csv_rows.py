"""Rows of CSV and TSV files, whose values are text exactly as it is written."""

import csv
import json
import sys
from collections.abc import Iterator

import numpy as np

from jaxft.data.sources.json_rows import BOM, JsonRows, decode
from jaxft.data.sources.text import Spool, Text, line_spans
from jaxft.errors import DataError, listed
from jaxft.files.paths import file_name


def rows_of_csv(path: str, text: Text, delimiter: str) -> JsonRows:
    """The rows of a file with comma- or tab-separated columns, whose first row names them. Every value is text.

    delimiter: what stands between columns. If the first row has no comma but semicolons, as spreadsheets of many
    countries write it, these are read in place of commas. Raises DataError, naming the line, for a row that has not as
    many cells as there are names, and for quotes that do not close.
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
                if len(cells) != len(names):
                    raise DataError(_wrong_cells(path, line, cells, names))
                spans.append(spool.append(json.dumps(dict(zip(names, cells, strict=True))).encode()))
                numbers.append(line)
    except csv.Error as error:
        raise DataError(
            f"{file_name(path)} line {start + skipped} is not CSV: {error}. A quoted cell begins and ends with a "
            "quotation mark, and those within it are doubled."
        ) from error
    positions = np.array(spans, np.int64).reshape(-1, 2)
    return JsonRows(path, spool, positions[:, 0], positions[:, 1], np.array(numbers, np.int64))


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


def _wrong_cells(path: str, line: int, cells: list[str], names: list[str]) -> str:
    return (
        f"{file_name(path)} line {line} has {len(cells)} cells, but there are {len(names)} columns ({listed(names)}). "
        "A cell that holds a separator, a quotation mark or a line break must be in quotation marks."
    )
