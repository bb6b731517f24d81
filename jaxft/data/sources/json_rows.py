"""Rows that are JSON objects. Only their positions in a file are kept; a row is parsed when it is read."""

import json
from typing import Any

import numpy as np

from jaxft.data.sources.file_kinds import reencode
from jaxft.data.sources.text import Text, line_spans, text_of
from jaxft.errors import DataError, counted
from jaxft.files.digest import content_digest
from jaxft.files.paths import file_name
from jaxft.files.strict_json import parse_json

WHOLE = "Each line must be one whole object; a file whose objects span lines must end in .json."
MOST_BYTES = 2**27  # of a row, which takes several times its size in memory while it is parsed
BOM = b"\xef\xbb\xbf"  # of UTF-8, which Windows programs write


class JsonRows:
    """Rows that are JSON objects at known positions of a text.

    path: the file that they come from. starts, ends: bytes in `text`. lines: the line of the file on which each
    begins. items: whether rows are counted, as those of an array are, rather than lines.
    """

    def __init__(
        self, path: str, text: Text, starts: np.ndarray, ends: np.ndarray, lines: np.ndarray, *, items: bool = False
    ) -> None:
        self.path = path
        self._text, self._starts, self._ends, self._lines, self._items = text, starts, ends, lines, items

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = self._bytes_at(index)
        try:
            row = parse_json(raw, whole_characters=False)
        except ValueError as error:
            if isinstance(error.__cause__, UnicodeDecodeError):
                raise not_utf8(error.__cause__, raw, self.path, self.where(index)) from error
            if not isinstance(error, json.JSONDecodeError):
                raise DataError(f"{self.where(index)} is not JSON: {error}") from error
            # A row is one line to JSON, so that the line in its own message is always the first.
            reason = f"{error.msg} at column {error.colno}"
            raise DataError(f"{self.where(index)} is not JSON: {reason}. {WHOLE}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(index)} is {type(row).__name__}, not an object with fields: {str(row)[:60]!r}"
            )
        return row

    def _bytes_at(self, index: int) -> bytes:
        start = int(self._starts[index])
        size = int(self._ends[index]) - start
        if size > MOST_BYTES:
            raise DataError(
                f"{self.where(index)} has {size:,} bytes, and rows of at most {MOST_BYTES:,} are read: split it into "
                "several rows, or remove it"
            )
        raw = self._text.read(start, size)
        return raw.removeprefix(BOM) if start == 0 else raw

    def where(self, index: int) -> str:
        line = f"line {self._lines[index]}"
        return f"{file_name(self.path)} " + (f"item {index + 1} ({line})" if self._items else line)

    def describe(self) -> str:
        return f"{self.path} ({counted(len(self), 'row')})"

    def digest(self) -> str:
        return content_digest(self.path)


class JsonlRows(JsonRows):
    """One JSON object a line; blank lines do not count. text: of the file at path, which is opened if it is None."""

    def __init__(self, path: str, text: Text | None = None) -> None:
        text = text_of(path) if text is None else text
        super().__init__(path, text, *line_spans(text))

    def describe(self) -> str:
        return f"{self.path} ({counted(len(self), 'line')})"


def decode(raw: bytes, path: str, where: str) -> str:
    """The text of UTF-8 bytes. Raises DataError, naming the row and the likely encoding, for others."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, raw, path, where) from error


def not_utf8(error: UnicodeDecodeError, raw: bytes, path: str, where: str) -> DataError:
    """The error for bytes of a text file that are not UTF-8."""
    around = raw[max(0, error.start - 12) : error.end + 12].decode("cp1252", "replace")
    return DataError(
        f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x}, in {around!r} if it is Windows-1252 or Latin-1. "
        f"{reencode(path, 'WINDOWS-1252')}"
    )
