"""How the exported adapter of a job names its base: by a name that others know, not by a folder of the server."""

import json
from pathlib import Path

from jaxft.checkpoint.folders.sums import write_sums
from jaxft.checkpoint.hub.base import base_facts
from jaxft.files.adapter_base import CONFIG
from jaxft.files.run_folder import write_json
from jaxft.serving.jobs.folder import JobSpec

FIELD = "base_model_name_or_path"


def name_base(folder: Path, spec: JobSpec) -> None:
    """Puts the base's name into a PEFT folder: that on the hub, if its files tell one, else the server's name for it.

    Files are replaced, never written to, since they may be links to those of the run. Other folders stay as they are.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    write_json(path, json.loads(path.read_bytes()) | {FIELD: base_facts(spec.base).name or spec.name})
    write_sums(folder)
