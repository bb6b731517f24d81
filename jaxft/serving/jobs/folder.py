"""The folder of a job: the files by which the server and the worker of the job know of each other.

The server writes `job.json` and the links to the rows, before the worker starts. The worker writes everything else, and
`outcome.json` last. A flock on `lock`, which a worker has for as long as it lives, says whether there is one.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxft.files import run_folder

STEP = re.compile(r"\d+")
MANIFEST = "manifest.json"  # which a whole checkpoint has, and gets last


@dataclass(frozen=True)
class JobFolder:
    """The files of one job."""

    path: Path

    @property
    def spec(self) -> Path:
        """What the worker is to do, a JobSpec."""
        return self.path / "job.json"

    @property
    def training(self) -> Path:
        """The training rows."""
        return self.path / "training.jsonl"

    @property
    def validation(self) -> Path:
        """The held-out rows; absent if there are none."""
        return self.path / "validation.jsonl"

    @property
    def resolved(self) -> Path:
        """The examination of the rows, the plan, and the config of the run: the end of validation."""
        return self.path / "resolved.json"

    @property
    def batch(self) -> Path:
        """In how many parts a batch goes through the worker's devices, planned before the first step."""
        return self.path / "batch.json"

    @property
    def events(self) -> Path:
        """What the worker tells, a JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """What the worker prints."""
        return self.path / "worker.log"

    @property
    def outcome(self) -> Path:
        """How the worker ended; absent while it runs, and if it died."""
        return self.path / "outcome.json"

    @property
    def lock(self) -> Path:
        """Locked while there is a worker, whose process number is in it."""
        return self.path / "lock"

    @property
    def run(self) -> Path:
        """The run folder of the training."""
        return self.path / "run"

    @property
    def metrics(self) -> Path:
        """The metrics of the training."""
        return self.run / run_folder.METRICS

    @property
    def exports(self) -> Path:
        """Exported checkpoints that the server has not taken yet, each named `step-N`."""
        return self.path / "exports"

    def newest_checkpoint(self) -> int:
        """The newest whole checkpoint from which a worker would go on; 0 if there is none."""
        folder = self.run / run_folder.CHECKPOINTS
        if not folder.is_dir():
            return 0
        steps = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]
        return max((int(path.name) for path in steps), default=0)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a worker needs to know. name: of the model, for clients; base: its folder or file. overrides: the operator's
    settings of every run.

    hyperparameters: as requested, None for `auto`. config: the settings of the job, by dotted keys. context: tokens of
    a sequence if neither says.
    """

    id: str
    name: str
    base: str
    seed: int
    context: int
    hyperparameters: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: list[str] = field(default_factory=list)

    def write(self, folder: JobFolder) -> None:
        """Writes it into the folder of the job."""
        run_folder.write_json(folder.spec, asdict(self))

    @classmethod
    def read(cls, folder: JobFolder) -> "JobSpec":
        """The spec in the folder of a job."""
        return cls(**json.loads(folder.spec.read_bytes()))


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file that another process writes atomically; None if it is not there."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return value if isinstance(value, dict) else None
