"""Checkpoints of runs and Orbax models that were changed at random, and what reads them.

Of every other input the manifest is written anew after the change, so that the checksums fit and the damage reaches
Orbax and TensorStore. Both are used once while this module is imported, since XLA starts its threads then and reserves
addresses for them, which would count as memory.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fuzz.model_inputs import CHANGE, LLAMA, Files, inputs, read_all

from jaxft import models
from jaxft.checkpoint import manifest
from jaxft.checkpoint.orbax_folder import OrbaxFolder, write_params
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.errors import CheckpointError

EXTRA = {"data": {"row": 3}}


def state() -> dict[str, Any]:
    draw = np.random.default_rng(0).standard_normal
    trainable = {"a": jax.numpy.asarray(draw((4, 8)), "float32"), "b": jax.numpy.asarray(draw(5), "bfloat16")}
    return {"step": jax.numpy.int32(1), "trainable": trainable, "key": jax.random.key(0)}


def write_run(folder: Path) -> Path:
    """The folder of the one step of a run."""
    with RunCheckpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state(), EXTRA)
    return folder / "1"


def read_run(folder: Path) -> None:
    """All of the newest step, and the weights alone."""
    with RunCheckpoints(folder, keep=2, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise CheckpointError("no step is whole")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state())
        checkpoints.restore(abstract)
        checkpoints.open().evaluated_weights(abstract["trainable"])


def write_orbax(folder: Path) -> Path:
    model = models.random_model(models.config_from_hf(LLAMA), seed=0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    write_params(model, folder)
    manifest.write(folder)
    return folder


def read_orbax(folder: Path) -> None:
    read_all(OrbaxFolder(folder))


class Checked(Files):
    """Files below a folder with a manifest, which is written anew if it is to fit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ("**/*",))
        self.folder = folder

    def try_one(self, which: int, how: int, json_ones: Any, byte_ones: Any, read: Callable[[], None]) -> None:
        fits = bool(how & 1)
        whole = (self.folder / manifest.NAME).read_bytes()

        def read_changed() -> None:
            if fits:
                manifest.write(self.folder)
            read()

        try:
            self.try_change(which, how >> 1, json_ones, byte_ones, read_changed)
        finally:
            (self.folder / manifest.NAME).write_bytes(whole)


@functools.cache
def step_files() -> Checked:
    return Checked(write_run(Path("run")))


@functools.cache
def orbax_files() -> Checked:
    return Checked(write_orbax(Path("orbax")))


@inputs(3000, **CHANGE)
def run_steps(which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    step_files().try_one(which, how, json_ones, byte_ones, lambda: read_run(Path("run")))


@inputs(6000, **CHANGE)
def orbax_folders(which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    orbax_files().try_one(which, how, json_ones, byte_ones, lambda: read_orbax(Path("orbax")))


for write, read in ((write_run, read_run), (write_orbax, read_orbax)):
    write(Path("first"))
    read(Path("first"))
    shutil.rmtree("first")
