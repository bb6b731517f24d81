"""The training of a job: `jaxft train`'s own run, whose checkpoints become models on the way."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxft.config import RunConfig
from jaxft.data.loader import steps_for
from jaxft.files import run_folder
from jaxft.files.atomic import new_folder
from jaxft.runs.train import train
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.worker.batch import planned
from jaxft.serving.worker.naming import name_base
from jaxft.serving.worker.telling import Telling
from jaxft.sharding import distributed
from jaxft.terminal.console import SafeConsole
from jaxft.training.log import read_metrics
from jaxft.training.watch import Watch

NICER = 5  # on a CPU, which the server and others need too


def train_job(config: RunConfig, spec: JobSpec, folder: JobFolder, telling: Telling, sequences: int) -> None:
    """Trains, from the newest checkpoint if there is one, and says that it has succeeded.

    sequences: of an epoch. Raises as `jaxft.runs.train.train` does.
    """
    distributed.start()
    if jax.default_backend() == "cpu":
        os.nice(NICER)
    config = for_devices(config)
    before = folder.newest_checkpoint()
    steps = steps_for(config.train.epochs, sequences, config.train.batch_size)
    telling.event("started", "Fine-tuning job started", devices=_devices(), steps=steps)
    if before:
        telling.event("going_on", f"Going on from step {before}", step=before)
    config = planned(config, spec, folder, telling, steps=steps)

    def export(step: int, write: Callable[[Path], None]) -> None:
        target = folder.exports / f"step-{step}"
        if not target.is_dir():
            with new_folder(target) as unfinished:
                write(unfinished)
                name_base(unfinished, spec)
        telling.event("checkpoint", step=step)

    summary = train(config, console=SafeConsole(), watch=Watch(phase=telling.phase, export=export))
    _link_export(folder, spec)
    telling.outcome("succeeded", step=summary["steps"], trained_tokens=_trained_tokens(folder))


def for_devices(config: RunConfig) -> RunConfig:
    """The config with a batch that divides over the devices, and its micro-batches too."""
    unit = jax.device_count() * config.train.accumulation_steps
    size = math.ceil(config.train.batch_size / unit) * unit
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def _devices() -> dict[str, Any]:
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def _link_export(folder: JobFolder, spec: JobSpec) -> None:
    """The run's own export, which was read back, as links in the place from which the server takes it."""
    names = (run_folder.ADAPTER, run_folder.MODEL)
    source = next(folder.run / name for name in names if (folder.run / name).is_dir())
    target = folder.exports / "final"
    shutil.rmtree(target, ignore_errors=True)
    with new_folder(target) as unfinished:
        shutil.copytree(source, unfinished, copy_function=os.link, dirs_exist_ok=True)
        name_base(unfinished, spec)


def _trained_tokens(folder: JobFolder) -> int:
    rows = [row for row in read_metrics(folder.run) if "num_tokens" in row]
    return int(rows[-1]["num_tokens"]) if rows else 0
