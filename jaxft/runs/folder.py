"""Opens the folder of a run, or refuses one that holds another run."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxft import config as config_module
from jaxft.config import RunConfig
from jaxft.config.fields import field_values
from jaxft.errors import ConfigError
from jaxft.files.atomic import write_text
from jaxft.files.run_folder import CHAT_TEMPLATE, CHECKPOINTS, CONFIG, DATA, SCORES, is_run_folder, write_json


def open_run(config: RunConfig, data: Mapping[str, Any], template: str | None = None) -> None:
    """Makes the run's folder, with its config.json, data.json (`data`) and chat_template.jinja (`template`) in it.

    Raises ConfigError if the folder holds a run with other settings, listing them, or with another chat template:
    resuming it would mix two runs.
    """
    folder = Path(config.output_dir)
    if (folder / CONFIG).is_file() and not _has_checkpoint(folder):
        # Stopped before its first checkpoint, or refused. Nothing is lost, and its scores may be of other settings.
        (folder / SCORES).unlink(missing_ok=True)
    elif (folder / CONFIG).is_file():
        refuse_other_run(config_module.from_json(str(folder / CONFIG)), config, folder)
        if template != chat_template(folder):
            raise ConfigError(
                f"{folder} holds a run that was trained with another chat template, {folder / CHAT_TEMPLATE}. Set "
                "output_dir to a new folder, or data.chat_template to that file's text to resume that run."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir {folder} is not empty and holds no run. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.to_dict())
    write_json(folder / DATA, data)
    if template is not None:
        write_text(folder / CHAT_TEMPLATE, template)


def chat_template(folder: str | os.PathLike[str]) -> str | None:
    """The chat template that a run was trained with, or None."""
    path = Path(folder) / CHAT_TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


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
    if not path.is_file() or not is_run_folder(folder):
        raise ConfigError(f"{folder} is not a run folder: it lacks {CONFIG} or {CHECKPOINTS}/")
    return config_module.from_json(str(path))


def fresh_subfolder(folder: Path, name: str) -> Path:
    """An empty folder `name` for an export. An earlier one is deleted."""
    target = folder / name
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    return target


def _has_checkpoint(folder: Path) -> bool:
    return any(step.name.isdigit() for step in (folder / CHECKPOINTS).glob("*"))


def refuse_other_run(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Raises ConfigError, listing the settings that differ, if the run in a folder is another one."""
    before, after = _fixed_values(old), _fixed_values(new)
    changed = [
        f"{key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet output_dir to a new folder, or restore the old settings to resume that run."
        )


def _fixed_values(config: RunConfig) -> dict[str, Any]:
    """The fields that may not change when a run is resumed, by key."""
    return {
        field.key: value for field, value in field_values(config) if not field.free_to_change and not field.sections
    }
