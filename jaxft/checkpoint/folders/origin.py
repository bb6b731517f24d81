"""Where a model comes from: names on the hub, run folders, PEFT folders and the base that belongs to one."""

import os

from jaxft.checkpoint.peft.folder import CONFIG, SCORE_TASK
from jaxft.config import ModelConfig
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.adapter_base import base_of as base_of
from jaxft.files.adapter_base import base_revision
from jaxft.files.buckets.working_copy import run_in_bucket
from jaxft.files.hub import cached_hub_file, fetch_hub, hub_path
from jaxft.files.paths import HUB, is_file, read_json
from jaxft.files.run_folder import ADAPTER, MERGED, MODEL, is_run_folder
from jaxft.home import local_path


def is_adapter(path: str) -> bool:
    """Whether a path is a PEFT folder. A run folder and a name on the hub are none before they are resolved."""
    return is_file(os.path.join(path, CONFIG))


def is_score_adapter(folder: str) -> bool:
    """Whether a folder holds the PEFT adapter of a reward model."""
    return is_adapter(folder) and read_json(os.path.join(folder, CONFIG)).get("task_type") == SCORE_TASK


def resolve(path: str, revision: str | None = None) -> str:
    """The path to load from: hf:// names are fetched into the Hugging Face cache, run folders become their export."""
    if path.startswith(HUB):
        return fetch_hub(path, revision)
    path = run_in_bucket(local_path(path))
    if is_run_folder(path):
        for kind in (ADAPTER, MODEL, MERGED):
            if os.path.isdir(os.path.join(path, kind)):
                return os.path.join(path, kind)
        raise CheckpointError(
            f"run folder {path} has no adapter/ or model/ yet: `jaxft export --run={path} --to=FOLDER` writes one"
        )
    return path


def resolve_base(folder: str, base: str | None = None) -> str:
    """The path to load a PEFT folder's base from; see `base_of` and `resolve`."""
    origin = base_of(folder, base)
    return resolve(origin, base_revision(folder, origin, base))


def continued_adapter(model: ModelConfig) -> str | None:
    """The PEFT folder whose adapter a run trains on; None if the run begins with a fresh one. Nothing is fetched."""
    if model.random_init or model.adapter == "merge":
        return None
    if model.path.startswith(HUB):
        location = hub_path(model.path, model.revision)
        cached = None if location.file else cached_hub_file(location, CONFIG)
        return None if cached is None else os.path.dirname(cached)
    path = resolve(model.path)
    return path if is_adapter(path) else None


def refuse_base(path: str, base: str | None) -> None:
    """Raises ModelError if a base is given for a model that is no PEFT folder."""
    if base is not None:
        raise ModelError(f"{path} is not a PEFT folder, so it has no base: leave out --base={base} (model.base)")
