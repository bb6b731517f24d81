"""Answers that were made before: a file for each set of prompts and model, so that a second call generates nothing."""

import dataclasses
import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.files.atomic import make_folder, write_file, write_text
from jaxft.files.run_folder import read_if_whole, write_json
from jaxft.runs.scores.answers import FIELDS, AnsweredRow

log = logging.getLogger(__name__)


def digest_of(*parts: Any) -> str:
    """A short digest of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class AnswerCache:
    """Answers by a key, below a folder. Files are replaced as a whole, so a kill leaves the old one or the new one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_folder(folder)

    def kept(self, key: str) -> list[AnsweredRow]:
        """The first answers of a key: none if there are none and, with a warning, if their file is damaged."""
        path = self._folder / f"{key}.jsonl"
        if not path.is_file():
            return []
        try:
            rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
            return [AnsweredRow(**{name: row[name] for name in FIELDS}) for row in rows]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            log.warning("%s is damaged, so its answers are made anew: %s", path, error)
            return []

    def write(self, key: str, rows: Sequence[AnsweredRow]) -> None:
        """Replaces the answers of a key."""
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows]
        write_text(self._folder / f"{key}.jsonl", "".join(lines))

    def value(self, name: str) -> dict[str, Any]:
        """A JSON object that was kept under a name; empty if there is none."""
        return read_if_whole(self._folder / f"{name}.json")

    def keep_value(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a JSON object under a name."""
        write_json(self._folder / f"{name}.json", value)

    def vectors(self, name: str) -> dict[str, np.ndarray]:
        """Vectors that were kept under a name; none if there are none and, with a warning, if their file is damaged."""
        path = self._folder / f"{name}.npz"
        if not path.is_file():
            return {}
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(zip(file["keys"].tolist(), file["vectors"], strict=True))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged, so its vectors are made anew: %s", path, error)
            return {}

    def keep_vectors(self, name: str, vectors: dict[str, np.ndarray]) -> None:
        """Keeps vectors of one length under a name, in place of those that were there."""
        keys, values = np.array(list(vectors)), np.stack(list(vectors.values()))
        write_file(self._folder / f"{name}.npz", lambda file: np.savez(file, keys=keys, vectors=values))
