"""The names in a checkpoint folder of this machine: whole steps, the rest of something, and what is neither.

A step is written under the name `<step>.saving-<number>`, gets its manifest there and is then renamed to `<step>`; an
old step is renamed to `<step>.deleted` before its files go. Only these names are ever deleted. A folder that is named
like a step and has no manifest was not left by an interrupted save: it is set aside.
"""

import logging
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxft.checkpoint import manifest
from jaxft.errors import CheckpointError, listed
from jaxft.files.atomic import flush
from jaxft.files.paths import json_object

LEFTOVER = re.compile(r"\d+\.(saving-\d+(\.orbax-checkpoint-tmp.*)?|orbax-checkpoint-tmp.*|deleted)")
ORBAX_MARK = "_CHECKPOINT_METADATA"  # a folder named like a step but without this file is not one
META = ("meta", "metadata")  # the JSON that is saved with the arrays

log = logging.getLogger(__name__)


def whole_steps(folder: Path) -> tuple[int, ...]:
    """The whole steps in a checkpoint folder, ascending; none if there is no folder."""
    return tuple(sorted(int(entry.name) for entry in step_folders(folder) if manifest.exists(entry)))


def step_folders(folder: Path) -> list[Path]:
    """The folders in a checkpoint folder that are named like steps, whole or not; none if there is no folder."""
    return [entry for entry in folder.iterdir() if _is_step_name(entry)] if folder.is_dir() else []


def newest_step(folder: Path) -> int | None:
    """The newest whole step in a checkpoint folder."""
    return max(whole_steps(folder), default=None)


def unexplained_steps(folder: Path) -> tuple[Path, ...]:
    """Folders that are named like steps and hold what Orbax wrote, but have no manifest; ascending."""
    steps = sorted(step_folders(folder), key=lambda entry: int(entry.name))
    return tuple(step for step in steps if not manifest.exists(step) and (step / ORBAX_MARK).exists())


def saving_name(step: int, number: int) -> str:
    """The name of a step's folder while it is written. number: of the save in this process, equal in all processes.

    The number keeps two saves of one step apart: of one that failed, threads of TensorStore may still be writing.
    """
    return f"{step}.saving-{number}"


def read_meta(step_folder: Path) -> dict[str, Any]:
    """What was saved with the arrays of a step: `layout`, `averages`, `metrics`, `extra` and `step`.

    Raises CheckpointError if it cannot be read, or is not what a run saves.
    """
    path = step_folder.joinpath(*META)
    return checked_meta(str(step_folder), path.read_bytes, str(path))


def checked_meta(step_folder: str, read: Callable[[], bytes], where: str) -> dict[str, Any]:
    """As `read_meta`, of the bytes that `read` returns. where: their path or address, for messages."""
    try:
        meta = json_object(read(), where)
        wrong = [key for key in ("layout", "metrics", "extra") if not isinstance(meta.get(key), dict)]
        if wrong:
            raise CheckpointError(f"{where} has no object {listed(wrong)}")
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"checkpoint {step_folder} is damaged: meta: {error}\nDelete the folder {step_folder}."
        ) from error
    return meta


def number_in(meta: Mapping[str, Any]) -> int | None:
    """The step that was saved; None in what the first versions saved. meta: from `read_meta`."""
    number: int | None = meta.get("step", meta["extra"].get("step"))
    return number


def check_names(folder: Path) -> None:
    """Raises CheckpointError for a step that is a link, and for one whose folder was renamed to another number.

    Neither can be gone on from: the next save would follow the link, or count from the wrong step. A step that cannot
    be read is passed over: it is refused if it is to be restored.
    """
    for step in whole_steps(folder):
        path = folder / str(step)
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {os.path.realpath(path)}. Old steps are deleted, and its target may be wanted "
                f"elsewhere, so a step is a folder of its own. Remove the link and copy the folder to {path}."
            )
        try:
            meta = read_meta(path)
        except CheckpointError:
            continue
        check_number(path, meta)


def check_number(step_folder: Path, meta: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the folder of a step has another number than the step in it. meta: of the step."""
    true = number_in(meta)
    if true is None or str(true) == step_folder.name:
        return
    back = step_folder.with_name(str(true))
    mend = f"{back} is there too: move {step_folder} elsewhere" if back.exists() else f"Rename it back to {back}"
    raise CheckpointError(f"{step_folder} holds step {true}, so its folder was renamed. {mend}.")


def tidy(folder: Path) -> None:
    """Deletes what interrupted saves and deletions have left; sets aside what has no explanation, with a warning."""
    for entry in sorted(folder.iterdir()):
        if LEFTOVER.fullmatch(entry.name):
            log.warning("removing %s: writing or deleting it was interrupted", entry)
            remove_step(entry)
    for entry in unexplained_steps(folder):
        aside = _free_name(entry)
        entry.rename(aside)
        log.warning("%s", how_to_use(aside, entry))


def refuse_without_whole(folder: Path) -> None:
    """Raises CheckpointError if a folder has steps without a manifest and no whole one: a run would begin anew."""
    steps = unexplained_steps(folder)
    if steps and newest_step(folder) is None:
        raise CheckpointError(
            f"{folder} has no whole step, but {listed([step.name for step in steps])} without {manifest.NAME}. A run "
            f"would begin anew beside what may be good work. {_mend(steps[-1], steps[-1])}\nTo begin anew, move "
            f"{folder} elsewhere."
        )


def how_to_use(aside: Path, step_folder: Path) -> str:
    """What a step without a manifest may be, and how it is made usable again. aside: the name that it has now."""
    return (
        f"{step_folder} has no {manifest.NAME}, which jaxft writes before a step gets its name. It is set aside as "
        f"{aside} and not used. {_mend(aside, step_folder)}\nIf you do not need it, delete it."
    )


def remove_step(folder: Path) -> None:
    """Deletes the folder of a step. It is renamed first: a crash leaves nothing under the name of a step."""
    if folder.is_symlink():
        folder.unlink()
        return
    if folder.suffix != ".deleted":
        folder = folder.rename(folder.parent / f"{folder.name}.deleted")
        flush(folder.parent)
    shutil.rmtree(folder)


def _mend(present: Path, step_folder: Path) -> str:
    program = "import sys; from jaxft.checkpoint import manifest; manifest.write(sys.argv[1])"
    lines = [
        f"If it was copied without this file, copy {manifest.NAME} from the original into it. If there is no original, "
        "and you know that all other files are there, write a new one, after which damage that is there already cannot "
        "be noticed:",
        f"    python -c {shlex.quote(program)} {shlex.quote(str(present))}",
    ]
    lines += [] if present == step_folder else [f"Then rename the folder to {step_folder}."]
    return "\n".join(lines)


def _free_name(entry: Path) -> Path:
    aside = entry.with_name(f"{entry.name}.unexplained-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
    count = 1
    while aside.exists():
        count += 1
        aside = aside.with_name(f"{aside.name.split('_')[0]}_{count}")
    return aside


def _is_step_name(entry: Path) -> bool:
    return entry.name.isdecimal() and entry.name.isascii()
