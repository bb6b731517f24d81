"""The base model that a PEFT folder belongs to, by its adapter_config.json."""

import os
import re
from collections.abc import Mapping
from typing import Any

from jaxft.errors import CheckpointError, ModelError
from jaxft.files.paths import HUB, is_file, is_remote, read_json
from jaxft.home import local_path

CONFIG = "adapter_config.json"
MLX = ("fine_tune_type", "lora_parameters", "lora_layers")  # fields that only MLX's adapter_config.json has
NAMES = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # of repositories on the hub
MEND = (
    "Give the folder that holds it, or owner/name on the Hugging Face hub, with --base (in a config: model.base), "
    "or set base_model_name_or_path in adapter_config.json."
)


def refuse_mlx(config: Mapping[str, Any], folder: str) -> None:
    """Raises ModelError if an adapter_config.json is that of MLX."""
    if "peft_type" not in config and any(name in config for name in MLX):
        raise ModelError(
            f"{folder} holds an adapter of MLX, not of PEFT: its adapter_config.json has fine_tune_type="
            f"{config.get('fine_tune_type', 'lora')!r}, and its tensors have MLX's own names. "
            f"Fuse it into its model and load that: mlx_lm.fuse --model BASE --adapter-path {folder} --save-path FOLDER"
        )


def base_of(folder: str, base: str | None = None) -> str:
    """The base model of a PEFT folder: a path that exists, or an address.

    base: where it is, in place of what the folder names. Raises CheckpointError if neither names one, or a local path
    that does not exist; ModelError if the folder is not in PEFT's form.
    """
    config = read_json(os.path.join(folder, CONFIG))
    refuse_mlx(config, folder)
    named = local_path(base) if base else config.get("base_model_name_or_path")
    if not named:
        raise CheckpointError(f"{folder}: adapter_config.json does not say which base model it belongs to. {MEND}")
    if not isinstance(named, str):
        raise CheckpointError(f"{folder}: base_model_name_or_path={named!r} in adapter_config.json is no text. {MEND}")
    for candidate in (named, os.path.join(folder, named)):
        if os.path.exists(candidate):
            _refuse_circle(folder, candidate)
            return os.path.normpath(candidate)
    if named.startswith(HUB) or is_remote(named):
        return named
    if not NAMES.fullmatch(named):
        raise CheckpointError(f"{folder} belongs to the base model {named!r}, which is not there. {MEND}")
    return HUB + named


def base_revision(folder: str, origin: str, base: str | None = None) -> str | None:
    """The revision of a base on the hub that adapter_config.json names. origin: what `base_of` says."""
    if base is not None or not origin.startswith(HUB) or "@" in origin:
        return None
    revision = read_json(os.path.join(folder, CONFIG)).get("revision")
    return None if revision is None else str(revision)


def known_base(folder: str, base: str | None = None) -> tuple[str, str | None] | None:
    """(base, revision) of a folder as `base_of` finds it; None if it is no PEFT folder, or its base is not known.

    For readers of small things, such as end tokens, who leave it to the loading of the model to say what is wrong.
    """
    if not is_file(os.path.join(folder, CONFIG)):
        return None
    try:
        origin = base_of(folder, base)
        return origin, base_revision(folder, origin, base)
    except (CheckpointError, ModelError):
        return None


def _refuse_circle(folder: str, base: str) -> None:
    """Raises CheckpointError if a folder is its own base, by whatever number of adapters on adapters."""
    chain = [os.path.realpath(folder)]
    while os.path.isfile(os.path.join(base, CONFIG)):
        chain.append(os.path.realpath(base))
        if chain[-1] in chain[:-1]:
            raise CheckpointError(f"{folder} has no base: adapters name each other, {' -> '.join(chain)}. {MEND}")
        named = read_json(os.path.join(base, CONFIG)).get("base_model_name_or_path")
        candidates = (named, os.path.join(base, named)) if isinstance(named, str) and named else ()
        base = next(filter(os.path.exists, candidates), "")
