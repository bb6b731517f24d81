"""What a report reads: the files of a run folder, some of which may be absent or damaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError, DataError
from jaxft.files import run_folder
from jaxft.files.json_fields import is_finite
from jaxft.files.run_folder import CONFIG, DATA, HELD_OUT_COMPLETIONS, METRICS, SCORES
from jaxft.rollouts.completions import read_completions
from jaxft.training.log import read_metrics

Row = dict[str, Any]

ABSENT = {
    CONFIG: f"{CONFIG} is missing: the settings of the run are not known.",
    METRICS: f"{METRICS} is missing: no training step has been logged.",
    DATA: f"{DATA} is missing: the training data have not been examined.",
    SCORES: f"{SCORES} is missing: the model has not been scored. Set eval.metric to score it.",
}


def read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a file, or an empty one and the reason."""
    if not path.is_file():
        return {}, ABSENT[path.name]
    try:
        value = run_folder.read_json(path)
    except CheckpointError as error:
        return {}, f"{path.name} could not be read: {error}"
    if not isinstance(value, dict):
        return {}, f"{path.name} could not be read: it holds a {type(value).__name__}, not an object"
    return value, None


def read_rows(folder: Path) -> tuple[list[Row], str | None]:
    """The rows of metrics.jsonl, and the reason if there are none."""
    if not (folder / METRICS).is_file():
        return [], ABSENT[METRICS]
    try:
        rows = read_metrics(folder)
    except DataError as error:
        return [], str(error)
    return rows, None if rows else f"{METRICS} is empty: no training step has been logged."


def read_held_out_completions(folder: Path) -> tuple[list[Row], str | None]:
    """The rows of held_out_completions.jsonl, none if there is no such file; and what is wrong with it."""
    try:
        rows = read_completions(folder, HELD_OUT_COMPLETIONS)
    except ValueError as error:
        return [], f"{HELD_OUT_COMPLETIONS} could not be read: {error}"
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        return [], f"{HELD_OUT_COMPLETIONS} could not be read: it has a line without a step"
    return rows, None


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """The steps at which a metric was logged, and its values."""
    with_key = [row for row in rows if is_number(row.get(key))]
    return [row["step"] for row in with_key], [row[key] for row in with_key]


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []
