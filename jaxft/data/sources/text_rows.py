"""Rows of plain text files: each is a whole file, a paragraph or a line, under the key `text`."""

from typing import Any

import numpy as np

from jaxft.data.sources.json_rows import BOM, decode
from jaxft.data.sources.text import Text, line_spans
from jaxft.errors import counted
from jaxft.files.digest import content_digest
from jaxft.files.paths import file_name

COLUMN = "text"


class TextRows:
    """Pieces of a text file, without the blank lines around them.

    sample_by: what a row is: the `document`, which is the whole file, a `paragraph`, which ends where a blank line
    begins, or a `line`.
    """

    def __init__(self, path: str, text: Text, sample_by: str) -> None:
        self.path, self._text, self._sample_by = path, text, sample_by
        starts, ends, lines = line_spans(text)
        # The first line of each row, by index.
        if sample_by == "line":
            first = np.arange(len(lines))
        elif sample_by == "paragraph":
            first = np.flatnonzero(np.diff(lines, prepend=-1) > 1)
        else:
            first = np.zeros(min(1, len(lines)), np.int64)
        self._starts, self._lines = starts[first], lines[first]
        self._ends = ends[np.append(first[1:], len(lines)) - 1] if len(first) else ends[:0]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(self._starts[index])
        raw = self._text.read(start, int(self._ends[index]) - start)
        text = decode(raw.removeprefix(BOM) if start == 0 else raw, self.path, self.where(index))
        return {COLUMN: text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")}

    def where(self, index: int) -> str:
        name = file_name(self.path)
        return name if self._sample_by == "document" else f"{name} line {self._lines[index]}"

    def describe(self) -> str:
        kind = {"document": "text", "paragraph": "paragraph", "line": "line"}[self._sample_by]
        return f"{self.path} ({counted(len(self), kind)})"

    def digest(self) -> str:
        return content_digest(self.path)
