"""The exports within a run folder: written under another name, and never in the place of what the run did not write.

An export is written in `<name>.jaxft.partial` and renamed once it is whole and was read back. An earlier one is
then deleted, if it holds just what the run wrote; otherwise it is set aside as `<name>.before-1`.
"""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from jaxft.checkpoint.folders.sums import check_sums, has_sums
from jaxft.checkpoint.hub.card import MARK as CARD_MARK
from jaxft.checkpoint.hub.card import README
from jaxft.checkpoint.steps.access import steps_in
from jaxft.checkpoint.steps.folders import LEFTOVER
from jaxft.errors import CheckpointError, ConfigError, listed
from jaxft.files.atomic import publish, unfinished_folder
from jaxft.files.buckets.working_copy import address_of, checkpoints_of, shown
from jaxft.files.run_folder import CHECKPOINTS, UNFINISHED
from jaxft.runs.identity.record import EXPORTS, OF_A_RUN, Record, record_of, write_record

# Larger files are not read to see whether somebody changed them: models are replaced by others, not edited.
MOST_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


def begin_export(folder: Path, name: str) -> str:
    """The path of an empty folder in which the export `name` is written. What a killed process left is deleted."""
    unfinished = unfinished_folder(folder / name)
    for leftover in (unfinished, _deleted(folder / name)):
        if (leftover / UNFINISHED).is_file():
            shutil.rmtree(leftover)
    if unfinished.exists():
        set_aside(unfinished)
    unfinished.mkdir()
    (unfinished / UNFINISHED).touch()
    return str(unfinished)


def end_export(folder: Path, name: str) -> None:
    """Gives an export that is whole its name, in the place of an earlier one, and records its files."""
    unfinished, target = unfinished_folder(folder / name), folder / name
    if _has_own_card(target):  # its reader wants to keep it
        shutil.copyfile(target / README, unfinished / README)
    remove_export(folder, name)
    (unfinished / UNFINISHED).unlink()
    publish(unfinished, target)
    record = record_of(folder)
    write_record(folder, replace(record, exports={**record.exports, name: _files(target)}))


def remove_export(folder: Path, name: str) -> None:
    """Deletes an export if it holds what the run wrote and nothing else, and sets it aside otherwise."""
    target = folder / name
    if not os.path.lexists(target):
        return
    if (why := _unexplained(target, record_of(folder))) is not None:
        log.warning("%s is kept as %s: %s", shown(target), shown(set_aside(target)), why)
        return
    (target / UNFINISHED).touch()
    deleted = target.rename(_deleted(target))
    shutil.rmtree(deleted)


def clear(folder: Path) -> None:
    """Deletes what a run has written, and nothing else; the mark stays. What has no explanation is set aside."""
    for name in EXPORTS:
        remove_export(folder, name)
    _clear_checkpoints(folder)
    for name in OF_A_RUN:
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    write_record(folder, Record())


def _clear_checkpoints(folder: Path) -> None:
    """Deletes what interrupted saves have left of a run without a whole step. What else is there is kept."""
    if (address := address_of(folder)) is not None:
        steps = steps_in(checkpoints_of(folder))
        steps.prepare()
        if others := [*map(str, steps.without_manifest()), *steps.others()]:
            raise ConfigError(
                f"{address}/{CHECKPOINTS} has {listed(others)}, and it is not known that a run wrote it: a run with "
                "other settings would begin anew beside it. Move it elsewhere, or set output_dir to a new folder."
            )
        return
    path = folder / CHECKPOINTS
    if path.is_symlink() or not path.is_dir():
        return
    if others := sorted(entry.name for entry in path.iterdir() if not LEFTOVER.fullmatch(entry.name)):
        log.warning("%s is kept as %s: it has %s", path, set_aside(path), listed(others))


def set_aside(path: Path) -> Path:
    """Renames a file or folder that a run would replace, and returns its new path: `adapter.before-1` and so on."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.before-{number}")):
        number += 1
    return path.rename(aside)


def _unexplained(target: Path, record: Record) -> str | None:
    """Why an export may not be deleted; None if the run wrote all of it."""
    if target.is_symlink() or not target.is_dir():
        return "it is no folder of the run"
    files = record.exports.get(target.name)
    if files is None:
        return "it is not known which of its files the run wrote"
    if added := sorted(set(_files(target)) - set(files)):
        return f"the run did not write {', '.join(added[:4])}"
    try:
        changed = check_sums(target, most_bytes=MOST_BYTES) if has_sums(target) else []
    except CheckpointError as error:
        return str(error)
    return next((problem for problem in changed if not problem.endswith("is missing")), None)


def _has_own_card(target: Path) -> bool:
    card = target / README
    return card.is_file() and CARD_MARK.encode() not in card.read_bytes()


def _deleted(target: Path) -> Path:
    return target.with_name(f"{target.name}.deleted")


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for path in paths if (name := os.path.relpath(path, folder)) != UNFINISHED)
