"""The steps of a run on this machine, or in a folder that is mounted on it."""

import os
from pathlib import Path
from typing import Any

from jaxft.checkpoint import manifest
from jaxft.checkpoint.plain_path import PlainFolder
from jaxft.checkpoint.steps import folders
from jaxft.errors import CheckpointError
from jaxft.files.atomic import flush, make_folder


class LocalSteps:
    """See `access.Steps`. A step becomes whole when its folder gets its name."""

    mend = "Check that the disk has room and is writable"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self._plain: PlainFolder | None = None

    def whole(self) -> tuple[int, ...]:
        return folders.whole_steps(self.folder)

    def without_manifest(self) -> tuple[int, ...]:
        return tuple(sorted(int(entry.name) for entry in self._steps() if not manifest.exists(entry)))

    def others(self) -> tuple[str, ...]:
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return tuple(sorted({entry.name for entry in entries} - {entry.name for entry in self._steps()}))

    def exists(self, step: int) -> bool:
        return self.path(step).exists()

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def check_names(self) -> None:
        folders.check_names(self.folder)

    def refuse_without_whole(self) -> None:
        folders.refuse_without_whole(self.folder)

    def prepare(self) -> None:
        self.check_names()
        make_folder(self.folder)
        folders.tidy(self.folder)

    def check_access(self) -> None:
        """Nothing: `prepare` has made the folder."""

    def begin(self, step: int, number: int) -> Path:
        if self._plain is None:
            self._plain = PlainFolder(self.folder)
        return self._plain.path / folders.saving_name(step, number)

    def flush(self, step: int, number: int) -> None:
        # Imported here: runs are listed without JAX.
        from jaxft.checkpoint.steps.flushing import flush_in_all

        flush_in_all(self._written(step, number), number)

    def publish(self, step: int, number: int, summing: manifest.Summing) -> None:
        written = self._written(step, number)
        manifest.write(written, summing)
        written.rename(self.path(step))
        flush(self.folder)

    def remove(self, step: int) -> None:
        folders.remove_step(self.path(step))

    def read_meta(self, step: int) -> dict[str, Any]:
        return folders.read_meta(self.path(step))

    def check_number(self, step: int, meta: dict[str, Any]) -> None:
        folders.check_number(self.path(step), meta)

    def verify(self, step: int, summing: manifest.Summing | None = None) -> None:
        manifest.verify(self.path(step), summing)

    def why(self, error: Exception) -> str:
        first = f"{type(error).__name__}: {error}".strip().split("\n", 1)[0]
        if isinstance(error, OSError) and error.strerror:
            first = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        elif isinstance(error, CheckpointError):
            first = str(error)
        if len(first) > 500:  # the cause is at the end of TensorStore's nested messages
            first = f"{first[:100]} ... {first[-300:]}"
        return first if self._plain is None else self._plain.own_names(first)

    def _steps(self) -> list[Path]:
        return folders.step_folders(self.folder)

    def _written(self, step: int, number: int) -> Path:
        return self.folder / folders.saving_name(step, number)
