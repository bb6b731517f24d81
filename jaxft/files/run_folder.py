"""The names of the files in a run folder, the mark by which it is known, and how its JSON is read and written."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError
from jaxft.files.atomic import write_text
from jaxft.files.strict_json import parse_json

MARK = "jaxft_run.json"  # written first, by no other program: what makes a folder that of a run
LOCK = "jaxft_lock.json"  # who writes in the folder, while somebody does
CONFIG = "config.json"  # the resolved config; other programs give this name to files of theirs
COMMAND = "command.txt"  # the command that repeats the run
DATA = "data.json"  # the examination of the data
SCORES = "scores.json"  # scores before and after training, with sample answers
ANSWERS = "answers.jsonl"  # the answer to every held-out row, before and after training
METRICS = "metrics.jsonl"  # one JSON object for each logged step or held-out evaluation
COMPLETIONS = "completions.jsonl"  # the answers that the model sampled while it trained, with their rewards
HELD_OUT_COMPLETIONS = "held_out_completions.jsonl"  # the answers to held-out prompts at every evaluation
REFERENCE = "reference.npz"  # log-probabilities of a frozen reference, if they are cached
UNFINISHED = ".jaxft_unfinished"  # in a folder that the run may delete: it is being written, or about to go
SUMMARY = "summary.json"  # final metrics, written last
CHAT_TEMPLATE = "chat_template.jinja"  # transformers gives it this name in model folders too
REPORT, LOSS_PLOT = "report.html", "loss.png"

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
COMPILED = "compiled"  # programs that JAX compiled, if the run has several processes or is in a bucket
BASE = "base"  # the drawn weights of a run with model.random_init
TEACHER = "teacher"  # the teacher's log-probabilities of a run with method.distill.cache_top_k
ADAPTER, MERGED, MODEL = "adapter", "merged", "model"  # exports


log = logging.getLogger(__name__)

# Sections that the config.json of every run has, and no model's config.json.
SECTIONS = ("model", "data", "optim", "train", "checkpoint")


def is_run_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a local folder is that of a run: it has the mark, or the config.json of a run from before the mark."""
    return os.path.isfile(os.path.join(path, MARK)) or is_run_config(os.path.join(path, CONFIG))


def is_run_config(path: str | os.PathLike[str]) -> bool:
    """Whether a file is the config of a run: JSON with its sections, and with the folder that it was written to."""
    try:
        values = read_json(path)
    except (OSError, CheckpointError):  # damaged, or a file of another program, which is not read further
        return False
    return (
        isinstance(values, dict)
        and isinstance(values.get("output_dir"), str)
        and all(isinstance(values.get(section), dict) for section in SECTIONS)
    )


def read_json(path: str | os.PathLike[str], default: Any = None) -> Any:
    """The JSON in a file, or `default` if there is no file. Raises CheckpointError if it is damaged."""
    if not os.path.isfile(path):
        return default
    try:
        return parse_json(Path(path).read_bytes(), whole_characters=False)
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged, and not valid JSON: {error}") from error


def read_if_whole(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file that only informs: empty if there is none, and, with a warning, if it is damaged."""
    try:
        value = read_json(path, {})
    except (OSError, CheckpointError) as error:
        log.warning("%s, so it is left out", error)
        return {}
    if not isinstance(value, dict):
        log.warning("%s is damaged, and holds no JSON object, so it is left out", os.fspath(path))
        return {}
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON atomically: a kill leaves the old file or the new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
