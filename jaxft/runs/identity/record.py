"""The mark of a run folder, `jaxft_run.json`: what it records of its run, and which of the files there are the run's.

Nothing is deleted in a run folder but what its run has written.
"""

import datetime
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError, listed
from jaxft.files import run_folder
from jaxft.files.json_fields import is_finite
from jaxft.files.run_folder import ADAPTER, MARK, MERGED, MODEL, read_json, write_json

FORMAT = 1  # of the file
EXPORTS = (ADAPTER, MERGED, MODEL)
# What a run that begins anew in its folder must not find there.
OF_A_RUN = (
    run_folder.SCORES, run_folder.ANSWERS, run_folder.METRICS, run_folder.COMPLETIONS,
    run_folder.HELD_OUT_COMPLETIONS, run_folder.REFERENCE, run_folder.SUMMARY, run_folder.REPORT,
    run_folder.LOSS_PLOT, run_folder.CHECKPOINTS, run_folder.TENSORBOARD, run_folder.COMPILED, run_folder.BASE,
    run_folder.TEACHER,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run folder says of its run.

    id: of the run, for ever the same. created: when it began. version: of jaxft then. steps: its length; None if it is
    not known. reads: what it reads, see `contents.py`. exports: for each export in the folder, the files that were
    written; None while they are being written. ranked_after: the step after which held-out metrics can be compared
    with each other, because the held-out rows have stayed the same. exported: the step whose weights were scored and
    exported when training ended; None before. times: seconds of earlier starts, by part (`training/goodput.py`), when
    the run was last resumed. recomputation: what `model.remat='auto'` took, on which devices and at what cost; empty if
    the config chose. history: what was changed when the run was resumed,
    oldest first, as `time`, `step` and `change`.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: str = field(default_factory=lambda: now())
    version: str = field(default_factory=lambda: sys.modules["jaxft"].__version__)
    steps: int | None = None
    reads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exports: Mapping[str, list[str] | None] = field(default_factory=dict)
    ranked_after: int = 0
    exported: int | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    recomputation: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None without one. Raises CheckpointError if it cannot be read."""
    path = folder / MARK
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        if values["jaxft_run"] != FORMAT:
            raise ValueError(f"it has format {values['jaxft_run']!r}, and this version reads {FORMAT}")
        del values["jaxft_run"]
        record = replace(Record(**values), history=tuple(values["history"]))
        _check_types(record)
        return record
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is damaged, or of a newer version of jaxft. Delete it if the folder "
            "is a run of yours; the run is then recognised by its config.json."
        ) from error


def _check_types(record: Record) -> None:
    """Raises TypeError naming a field whose value is of another type than is written."""
    number, mapping = int | None, Mapping
    types: dict[str, Any] = {
        "id": str, "created": str, "version": str, "steps": number, "reads": mapping, "exports": mapping,
        "ranked_after": int, "exported": number, "times": mapping,
        "recomputation": mapping,
    }  # fmt: skip
    wrong = [name for name, kind in types.items() if not isinstance(getattr(record, name), kind)]
    wrong += [f"reads.{key}" for key, one in _items(record.reads) if not _is_read(one)]
    wrong += [f"exports.{key}" for key, one in _items(record.exports) if not _is_export(one)]
    wrong += [f"times.{key}" for key, one in _items(record.times) if not _is_time(one)]
    wrong += ["recomputation"] if not _is_choice(record.recomputation) else []
    wrong += ["history"] if not all(isinstance(one, Mapping) for one in record.history) else []
    if wrong:
        raise TypeError(f"wrong types in {listed(wrong)}")


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _is_read(one: Any) -> bool:
    return isinstance(one, Mapping) and isinstance(one.get("digest"), str) and "path" in one


def _is_export(one: Any) -> bool:
    return one is None or (isinstance(one, list) and all(isinstance(file, str) for file in one))


def _is_time(one: Any) -> bool:
    return isinstance(one, int | float) and is_finite(one) and one >= 0


def _is_choice(one: Any) -> bool:
    return not one or (isinstance(one, Mapping) and isinstance(one.get("policy"), str) and "device" in one)


def write_record(folder: Path, record: Record) -> None:
    """Writes the mark, in one piece."""
    write_json(folder / MARK, {"jaxft_run": FORMAT, **asdict(record)})


def resumed(record: Record, step: int, changes: Sequence[str]) -> Record:
    """The record with what was changed at a step."""
    entries = ({"time": now(), "step": step, "change": change} for change in changes)
    return replace(record, history=(*record.history, *entries))


def record_of(folder: Path) -> Record:
    """The record of a run folder. A run from before the mark gets one, with the exports that it has."""
    record = read_record(folder)
    return record or Record(exports={name: None for name in EXPORTS if (folder / name).is_dir()})
