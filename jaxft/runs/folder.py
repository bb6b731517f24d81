"""Opens the folder of a run, or refuses one that holds another run."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxft import config as config_module
from jaxft.checkpoint.plain_path import check_path
from jaxft.checkpoint.steps.access import steps_in
from jaxft.config import RunConfig
from jaxft.data import Tokenizer, tokenizer_of
from jaxft.errors import CheckpointError, ConfigError, listed
from jaxft.files.atomic import make_folder, write_text
from jaxft.files.buckets.store import is_bucket
from jaxft.files.buckets.working_copy import checkpoints_of, folder_of, forget, refuse_other_store, shown, written
from jaxft.files.locks.lock import lock
from jaxft.files.run_folder import (
    CHAT_TEMPLATE,
    CHECKPOINTS,
    COMMAND,
    CONFIG,
    DATA,
    LOCK,
    MARK,
    SUMMARY,
    is_run_config,
    is_run_folder,
    write_json,
)
from jaxft.files.targets import refused_target
from jaxft.runs.cards.command import command_of
from jaxft.runs.identity.changes import Start, go_on, other_values, refuse_other_run
from jaxft.runs.identity.contents import Reads, other_reads
from jaxft.runs.identity.exports import clear
from jaxft.runs.identity.record import EXPORTS, Record, read_record, record_of, write_record
from jaxft.sharding.processes import is_primary, on_primary
from jaxft.system import described

log = logging.getLogger(__name__)


def open_run(
    config: RunConfig,
    *,
    reads: Reads,
    steps: int | None = None,
    data: Mapping[str, Any] | None = None,
    template: str | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Makes the run's folder, with its mark, config.json, data.json (`data`) and chat_template.jinja (`template`).

    reads: what the run reads, from `reads_of`. steps: its length; None for a `Session`. folder: in place of
    the config's output_dir. Returns, in sentences, what is otherwise than before if the run is resumed.

    Raises ConfigError for a folder that is not that of a run and not empty; for one that holds a run with other
    settings, listing them, or that read other contents, naming them, since resuming it would mix two runs; for a run
    that has trained more steps than these, or whose checkpoints are gone; and for a folder that cannot be written.
    """
    folder = folder_of(config.output_dir) if folder is None else folder
    now = Start(config=config, reads=reads, steps=steps, template=template)
    try:
        record, notes = _occupy(folder, now)
        make_folder(folder)
        write_record(folder, record)
        write_json(folder / CONFIG, config.to_dict())
        if steps is not None:
            write_text(folder / COMMAND, command_of(config) + "\n")
        if data is not None:
            write_json(folder / DATA, data)
        if template is not None:
            write_text(folder / CHAT_TEMPLATE, template)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return notes


@contextlib.contextmanager
def locked_run(folder: str | os.PathLike[str], what: str, *, exclusive: bool = True) -> Iterator[None]:
    """Keeps other writers from the folder of a run until the block ends. Every process of the run calls it.

    what, exclusive: as for `files.locks.lock.lock`. Raises FolderInUseError, naming who writes there; ConfigError for a
    folder that is not that of a run and not empty, and for one that cannot be written.
    """
    with contextlib.ExitStack() as stack:

        def take() -> None:
            refuse_other_store(folder)
            if is_bucket(folder):
                steps_in(f"{os.fspath(folder)}/{CHECKPOINTS}")  # refuses names that the writers of steps do not take
                stack.enter_context(written(os.fspath(folder), what, exclusive=exclusive))
                return
            if not is_run_folder(folder):
                refuse_occupied(Path(folder))
            try:
                stack.enter_context(lock(folder, what, inside=True, exclusive=exclusive))
            except OSError as error:
                raise _unwritable(Path(folder), error) from error

        on_primary(take)
        if not is_primary():
            stack.callback(forget, folder)
        yield


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"output_dir {folder} cannot be written. {described(error)} Set it to a new folder in a place where you may "
        "write."
    )


def _occupy(folder: Path, now: Start) -> tuple[Record, list[str]]:
    """(the record of the run in a folder, or a new one; what has changed). Raises ConfigError as `open_run` does."""
    new = Record(steps=now.steps, reads=now.reads)
    check_path(folder)
    if not is_run_folder(folder):
        refuse_occupied(folder)
        return new, []
    record = record_of(folder)
    checkpoints = steps_in(checkpoints_of(folder))
    checkpoints.check_names()
    checkpoints.refuse_without_whole()
    before, newest = _config_in(folder), newest_step(folder)
    if newest is not None:
        if before is None:
            raise ConfigError(
                f"{folder / CONFIG} is missing or not that of a run, and step {newest} of the checkpoints does not say "
                "which settings it was trained with. Restore the file to resume that run, or set output_dir to a new "
                "folder."
            )
        refuse_other_run(folder, record, before, now, chat_template(folder))
        record, notes = go_on(record, before, now, newest)
        if now.steps is not None and now.steps > newest:  # it is written last
            (folder / SUMMARY).unlink(missing_ok=True)
        return record, notes
    if (folder / SUMMARY).is_file() or any((folder / name).exists() for name in EXPORTS):
        raise ConfigError(
            f"{folder} holds a run that has ended, and its checkpoints are gone: training would begin anew and replace "
            "its results. Set output_dir to a new folder, or delete this one if you do not need it."
        )
    # Stopped before its first checkpoint, or refused: nothing is lost.
    if before is None or other_values(before, now.config, spelling=False) or other_reads(record.reads, now.reads):
        clear(folder)
        return new, []
    return replace(record, steps=now.steps, reads=now.reads), []


def refuse_occupied(folder: Path) -> None:
    """Raises ConfigError unless a path is free for the folder of a run: absent, or an empty folder."""
    if (problem := refused_target(folder)) is not None:
        raise ConfigError(f"output_dir {folder} cannot be written: {problem}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file. Set it to a new folder.")
    there = sorted({path.name for path in folder.iterdir()} - {LOCK}) if folder.is_dir() else []
    if there:
        model = " It seems to be a model." if CONFIG in there else ""
        raise ConfigError(
            f"output_dir {folder} is not empty and holds no run: {MARK} is not there, but {listed(there)}.{model} "
            "Nothing of it is overwritten. Set output_dir to a new folder."
        )


def refuse_other_base(folder: Path, reads: Reads) -> None:
    """Raises ConfigError if the run in a folder was trained on another base than that of `reads`, as recorded there."""
    record = read_record(folder)
    before = record.reads.get("model.path") if record else None
    if before and before["digest"] != reads["model.path"]["digest"]:
        raise ConfigError(
            f"{folder} was trained on {before['path']}, and the weights of {reads['model.path']['path']} are others: "
            "what was trained would not fit to them. Give the base that it was trained on."
        )


def newest_step(folder: Path) -> int | None:
    """The newest whole checkpoint of a run folder."""
    return max(steps_in(checkpoints_of(folder)).whole(), default=None)


def _config_in(folder: Path) -> RunConfig | None:
    """The config in a run folder; if its file is missing or damaged, that of the newest checkpoint, with a warning.

    None if there is neither.
    """
    path = folder / CONFIG
    if is_run_config(path):
        return config_module.from_json(str(path))
    newest = newest_step(folder)
    values = None if newest is None else _config_saved(folder, newest)
    if values is None:
        return None
    log.warning("%s is missing or damaged; the settings are those that step %d was saved with", shown(path), newest)
    return config_module.resolve(values)


def _config_saved(folder: Path, step: int) -> dict[str, Any] | None:
    """The settings that a step was saved with; None if it does not say."""
    try:
        values = steps_in(checkpoints_of(folder)).read_meta(step)["extra"].get("config")
    except CheckpointError:  # it is refused when it is restored
        return None
    return values if isinstance(values, dict) else None


def chat_template(folder: str | os.PathLike[str]) -> str | None:
    """The chat template that a run was trained with, or None."""
    path = folder_of(folder) / CHAT_TEMPLATE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is damaged, and not text in UTF-8: {error}. Write the chat template of the run into it again, or "
            "delete it if the run has the template of its model."
        ) from error


def dated(config: RunConfig, tokenizer: Tokenizer) -> tuple[RunConfig, Tokenizer]:
    """A run's config and tokenizer, with the date that a chat template which reads the clock shows from now on.

    It is `data.template_date`, or that of the run in the folder, or today's; the same in all processes.
    """
    if config.data.template_date is not None or tokenizer.template_date is None:
        return config, tokenizer

    def date() -> str | None:
        before = _config_in(folder_of(config.output_dir))
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
                f"process {jax.process_index()} does not see {shown(folder.absolute() / CONFIG)}, which process 0 has "
                "written. All processes write and read checkpoints and exports. Set output_dir to a folder "
                "on storage that every host mounts, under the same path."
            )
        time.sleep(0.1)


def run_config(folder: str | os.PathLike[str]) -> RunConfig:
    """The config of a run folder. Raises ConfigError if it is not one."""
    folder = folder_of(folder)
    config = _config_in(folder) if is_run_folder(folder) else None
    if config is None:
        raise ConfigError(f"{folder} is not a run folder: it lacks {MARK}, or the {CONFIG} of a run")
    return config
