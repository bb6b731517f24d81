"""What a worker tells the server: lines of events, and how it ended."""

import errno
import json
from collections.abc import Mapping
from typing import Any

from jaxft.errors import ConfigError, DataError, JaxftError, ModelError
from jaxft.files.lines import LineFile
from jaxft.files.run_folder import write_json
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.system import described

DIVERGED = ("DivergedError", "SpikeError")
MEMORY = ("JaxRuntimeError", "XlaRuntimeError")


class Telling:
    """Writes the events of a job."""

    def __init__(self, folder: JobFolder, spec: JobSpec) -> None:
        self._folder, self._spec = folder, spec
        torn = folder.events.is_file() and not folder.events.read_bytes().endswith(b"\n")
        self._file = LineFile(folder.events, print)
        if torn:  # a line that an earlier worker did not finish, or a power cut took the end of
            self._file.add(["\n"])

    def event(self, kind: str, message: str = "", *, step: int = 0, level: str = "info", **data: Any) -> None:
        """Adds an event: kind and step are its key."""
        line = {"kind": kind, "step": step, "level": level, "message": self.without_paths(message), "data": data}
        self._file.add([json.dumps(line) + "\n"])

    def phase(self, name: str) -> None:
        """Says what the worker does now."""
        self.event("phase", phase=name)

    def outcome(self, state: str, **values: Any) -> None:
        """Says how the worker ended, the last that it writes."""
        self._file.close()
        write_json(self._folder.outcome, {"state": state, **values})

    def failed(self, error: Mapping[str, Any]) -> None:
        """The outcome of a job that cannot be done."""
        message = self.without_paths(str(error["message"]))
        self.outcome("failed", error={**error, "message": message})

    def without_paths(self, text: str) -> str:
        """A message in the words of the protocol, since clients know no folders of the server."""
        folder = self._folder
        names = {
            str(folder.training): "training_file", str(folder.validation): "validation_file",
            str(folder.run): "the run", str(folder.path): "the job", str(folder.path.parent.parent): "the state",
            self._spec.base: "the model",
        }  # fmt: skip
        for path, name in names.items():
            text = text.replace(path, name)
        return text


def error_of(error: BaseException, folder: JobFolder) -> dict[str, Any] | None:
    """The error of a job that no further attempt would mend; None for one that may be the machine's."""
    chain = _chain(error)
    message, names = str(error), {kind.__name__ for one in chain for kind in type(one).__mro__}
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in chain):
        full = next(one for one in chain if isinstance(one, OSError))
        return {"code": "insufficient_storage", "message": described(full), "param": None}
    if isinstance(error, DataError):
        param = "validation_file" if str(folder.validation) in message else "training_file"
        return {"code": "invalid_file", "message": message, "param": param}
    if isinstance(error, MemoryError) or (names & set(MEMORY) and "RESOURCE_EXHAUSTED" in message):
        text = f"The memory does not suffice: {message.splitlines()[0] if message else 'the system has no more'}"
        return {"code": "out_of_memory", "message": f"{text}. Lower batch_size or data.max_length.", "param": None}
    if names & set(DIVERGED):
        return {"code": "diverged", "message": message, "param": None}
    if isinstance(error, ConfigError | ModelError):
        return {"code": "invalid_config", "message": message, "param": None}
    return {"code": "job_failed", "message": message, "param": None} if isinstance(error, JaxftError) else None


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from."""
    out: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in out:
        out.append(seen)
        seen = seen.__cause__ or seen.__context__
    return out
