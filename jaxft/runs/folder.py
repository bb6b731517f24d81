"""Opens the folder of a run, or refuses one that holds another run."""

import dataclasses
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxft import config as config_module
from jaxft.checkpoint import manifest
from jaxft.config import RunConfig
from jaxft.config.fields import field_values
from jaxft.data import Tokenizer, tokenizer_of
from jaxft.errors import ConfigError, listed
from jaxft.files.atomic import write_text
from jaxft.files.run_folder import (
    CHAT_TEMPLATE,
    CHECKPOINTS,
    CONFIG,
    DATA,
    MARK,
    SCORES,
    SUMMARY,
    is_run_config,
    is_run_folder,
    write_json,
)
from jaxft.runs.record import EXPORTS, Record, check_export, clear, record_of, write_record
from jaxft.sharding.processes import on_primary


def open_run(
    config: RunConfig, data: Mapping[str, Any] | None, template: str | None = None, folder: Path | None = None
) -> None:
    """Makes the run's folder, with its mark, config.json, data.json (`data`) and chat_template.jinja (`template`).

    folder: in place of the config's output_dir. Raises ConfigError for a folder that is not that of a run and not
    empty; for one that holds a run with other settings, listing them, or with another chat template, since resuming it
    would mix two runs; for a run whose checkpoints are gone, which would be lost; and for a folder that cannot be
    written.
    """
    folder = Path(config.output_dir) if folder is None else folder
    try:
        record = _occupy(folder, config, template)
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, record)
        write_json(folder / CONFIG, config.to_dict())
        if data is not None:
            write_json(folder / DATA, data)
        if template is not None:
            write_text(folder / CHAT_TEMPLATE, template)
    except OSError as error:
        raise ConfigError(
            f"output_dir {folder} cannot be written: {error.strerror or error}. Set output_dir to a new folder in a "
            "place where you may write."
        ) from error


def _occupy(folder: Path, config: RunConfig, template: str | None) -> Record:
    """The record of the run in a folder, or a new one. Raises ConfigError as `open_run` does."""
    if not is_run_folder(folder):
        refuse_occupied(folder)
        return Record()
    record = record_of(folder)
    for name in EXPORTS:
        check_export(folder, record, name)
    before = _config_in(folder)
    if newest_step(folder) is not None:
        if before is None:
            raise ConfigError(
                f"{folder / CONFIG} is missing or not that of a run, but the folder has checkpoints of one. Restore "
                "the file to resume that run, or set output_dir to a new folder."
            )
        refuse_other_run(before, config, folder)
        _refuse_other_template(folder, template)
        return record
    if (folder / SUMMARY).is_file() or any((folder / name).exists() for name in EXPORTS):
        raise ConfigError(
            f"{folder} holds a run that has ended, and its checkpoints are gone: training would begin anew and replace "
            "its results. Set output_dir to a new folder, or delete this one if you do not need it."
        )
    # Stopped before its first checkpoint, or refused: nothing is lost.
    if before is None or other_values(before, config):
        clear(folder)
        return Record()
    (folder / SCORES).unlink(missing_ok=True)
    return record


def refuse_occupied(folder: Path) -> None:
    """Raises ConfigError unless a path is free for the folder of a run: absent, or an empty folder."""
    if re.match(r"[a-z]\w+:/", str(folder)):  # as a path, it has lost a slash
        raise ConfigError(
            f"output_dir {folder} is an address. Runs write to a local or mounted folder: mount the bucket, and give "
            "the path of the mount."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file. Set it to a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        there = sorted(path.name for path in folder.iterdir())
        model = " It seems to be a model." if CONFIG in there else ""
        raise ConfigError(
            f"output_dir {folder} is not empty and holds no run: {MARK} is not there, but {listed(there)}.{model} "
            "Nothing of it is overwritten. Set output_dir to a new folder."
        )


def newest_step(folder: Path) -> int | None:
    """The newest whole checkpoint of a run folder."""
    steps = (step for step in (folder / CHECKPOINTS).glob("*") if step.name.isdecimal() and manifest.exists(step))
    return max((int(step.name) for step in steps), default=None)


def _config_in(folder: Path) -> RunConfig | None:
    """The config in a run folder; None if there is none, or a file of another program has taken its name."""
    path = str(folder / CONFIG)
    return config_module.from_json(path) if is_run_config(path) else None


def _refuse_other_template(folder: Path, template: str | None) -> None:
    if template != chat_template(folder):
        raise ConfigError(
            f"{folder} holds a run that was trained with another chat template, {folder / CHAT_TEMPLATE}. Set "
            "output_dir to a new folder, or data.chat_template to that file's text to resume that run."
        )


def chat_template(folder: str | os.PathLike[str]) -> str | None:
    """The chat template that a run was trained with, or None."""
    path = Path(folder) / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def dated(config: RunConfig, tokenizer: Tokenizer) -> tuple[RunConfig, Tokenizer]:
    """A run's config and tokenizer, with the date that a chat template which reads the clock shows from now on.

    It is `data.template_date`, or that of the run in the folder, or today's; the same in all processes.
    """
    if config.data.template_date is not None or tokenizer.template_date is None:
        return config, tokenizer

    def date() -> str | None:
        before = _config_in(Path(config.output_dir))
        return (before and before.data.template_date) or tokenizer.template_date

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=on_primary(date)))
    return config, tokenizer_of(config)


def check_shared(folder: Path, seconds: float = 30.0) -> None:
    """Raises ConfigError in a process that does not see the run folder that process 0 has just written.

    seconds: how long to wait, since network file systems may show a new file late.
    """
    until = time.monotonic() + seconds
    while not (folder / CONFIG).is_file():
        if time.monotonic() > until:
            raise ConfigError(
                f"process {jax.process_index()} does not see {folder.absolute() / CONFIG}, which process 0 has "
                "written. All processes write and read checkpoints and exports. Set output_dir to a folder "
                "on storage that every host mounts, under the same path."
            )
        time.sleep(0.1)


def run_config(folder: str | os.PathLike[str]) -> RunConfig:
    """The config of a run folder. Raises ConfigError if it is not one."""
    path = Path(folder) / CONFIG
    if not is_run_folder(folder) or not is_run_config(path):
        raise ConfigError(f"{folder} is not a run folder: it lacks {MARK}, or the {CONFIG} of a run")
    return config_module.from_json(str(path))


def refuse_other_run(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Raises ConfigError, listing the settings that differ, if the run in a folder is another one."""
    changed = other_values(old, new)
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet output_dir to a new folder, or restore the old settings to resume that run."
        )


def other_values(old: RunConfig, new: RunConfig) -> list[str]:
    """The settings that differ among those that may not change when a run is resumed, with both values."""
    before, after = _fixed_values(old), _fixed_values(new)
    return [
        f"{key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def _fixed_values(config: RunConfig) -> dict[str, Any]:
    """The fields that may not change when a run is resumed, by key."""
    return {
        field.key: value for field, value in field_values(config) if not field.free_to_change and not field.sections
    }
