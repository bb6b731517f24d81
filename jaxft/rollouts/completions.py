"""`completions.jsonl` in the run folder: every sampled answer, with what each reward function gave it.

`held_out_completions.jsonl` has the same of the answers to held-out prompts.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.errors import DataError
from jaxft.files.atomic import write_text
from jaxft.files.lines import LineFile
from jaxft.files.run_folder import COMPLETIONS
from jaxft.rollouts.rollout import Rollout


class CompletionsLog:
    """Appends rollouts to the file; those of the steps after `step` are removed first, since they are taken again.

    folder: the run folder. name: of the file. say: told of a disk that does not take the lines, which ends nothing.
    """

    def __init__(self, folder: Path, step: int, name: str = COMPLETIONS, *, say: Callable[[str], None]) -> None:
        kept = [row for row in read_completions(folder, name) if row["step"] <= step]
        # Atomic, so that a kill in this moment loses nothing.
        write_text(folder / name, "".join(_line(row) for row in kept))
        self._file = LineFile(folder / name, say)

    def add(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Mapping[str, np.ndarray],
        numbers: Mapping[str, Sequence[float] | np.ndarray],
    ) -> None:
        """Appends the answers of a rollout.

        step: the first step, from 1, that trains on them; of held-out answers, the steps before. rewards: by function,
        NaN for answers that were not scored.
        numbers: further numbers of the answers, such as their advantages.
        """
        rows = (
            {
                "step": step,
                "group": one.group,
                "row": one.prompt.row,
                "prompt": one.prompt.messages,
                "completion": one.text,
                "tokens": int(one.sampled.sum()),
                "finish_reason": one.finish_reason,
                **_conversation(one),
                "rewards": {name: _number(values[index]) for name, values in rewards.items()},
                **{name: _number(values[index]) for name, values in numbers.items()},
            }
            for index, one in enumerate(rollouts)
        )
        self._file.add([_line(row) for row in rows])

    def flush(self) -> None:
        """Tries to write lines that the disk has not taken."""
        self._file.flush()


def read_completions(folder: Path, name: str = COMPLETIONS) -> list[dict[str, Any]]:
    """The rows of such a file in a run folder, without an incomplete last line; none if there is no file.

    Raises DataError for a line that no run has written.
    """
    path = folder / name
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # str.splitlines would cut at separators within answers too
    return [_row(line, f"{path} line {number:,} of {len(lines):,}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(
            f"{where} is not a JSON object with a step: the file is damaged. Mend or delete that line, or move the "
            "file away; the weights do not depend on it."
        )
    return row


def _conversation(one: Rollout) -> dict[str, Any]:
    """The text of all turns with its special tokens, in parts that the model sampled or that it did not."""
    if one.episode is None:
        return {}
    return {
        "turns": one.episode.turns,
        "max_turns_reached": one.episode.cut,
        "conversation": [{"text": part.text, "sampled": part.sampled} for part in one.episode.parts],
    }


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
