"""The file of answers that are not all drawn yet, from which the same call goes on."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import ConfigError, listed
from jaxft.files.atomic import write_text

BEGINNING = b'{"settings": {'  # of every such file


class Unfinished:
    """The file of a call that is not finished: its settings in the first line, then a record of each prompt done.

    settings: JSON. rows: the number of prompts done. Raises ConfigError if the file is of other settings, or is not
    one that this class wrote.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        content = path.read_bytes() if os.path.lexists(path) else b""
        if content and not BEGINNING.startswith(content[: len(BEGINNING)]):
            raise ConfigError(
                f"{path} is in the way: answers are written there until all are, and it holds none of an interrupted "
                "call. Move it elsewhere, or name another file for the answers."
            )
        # Not by str.splitlines, which cuts at separators within answers too.
        whole = [f"{line}\n" for line in content.decode(errors="replace").split("\n")[:-1]]
        first = as_line({"settings": settings})
        if whole and whole[0] != first:
            before = self._parsed(whole[0], 1)["settings"]
            raise ConfigError(
                f"{path} holds the answers of an interrupted call with other settings ("
                f"{_changes(before, json.loads(first)['settings'])}). Restore these to go on, or delete the file to "
                "begin again."
            )
        self.rows = max(0, len(whole) - 1)
        # Atomic, so that a kill in this moment loses nothing; an incomplete last line goes.
        write_text(path, "".join(whole or [first]))

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends the records of the next prompts."""
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write("".join(map(as_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(records)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, in the order of the prompts."""
        with open(self.path, encoding="utf-8") as file:
            next(file)
            for number, line in enumerate(file, 2):
                yield self._parsed(line, number)

    def _parsed(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("settings" if number == 1 else "rows"), dict | list):
            raise ConfigError(
                f"{self.path} line {number:,} is damaged, so the answers of the interrupted call cannot be read. "
                "Delete the file to begin again."
            )
        return row


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    flat = [
        {**settings.get("config", {}), **{k: v for k, v in settings.items() if k != "config"}}
        for settings in (before, now)
    ]
    names = [name for name in flat[0] | flat[1] if flat[0].get(name) != flat[1].get(name)]
    return listed([f"{name}: was {flat[0].get(name)!r}, now {flat[1].get(name)!r}" for name in names])


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of a JSONL file. Raises ValueError for a number that is not finite."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
