"""The batch of a job on the devices of its worker: in how many parts it goes through them, planned and written down."""

import dataclasses
import math
from typing import Any

import jax

from jaxft.config import RunConfig
from jaxft.config.reading.overrides import parse_assignment
from jaxft.doctor.machine import examine_memory
from jaxft.files.run_folder import write_json
from jaxft.hardware.attached import memory_limit
from jaxft.runs.memory.parts import fewest_parts
from jaxft.serving.jobs.folder import JobFolder, JobSpec, read_object
from jaxft.serving.worker.telling import Telling

PARTS = "train.accumulation_steps"
GIB = 2**30


def planned(config: RunConfig, spec: JobSpec, folder: JobFolder, telling: Telling, *, steps: int) -> RunConfig:
    """The config with as few parts of its batch as fit into the memory of a device, by the arithmetic of `jaxft plan`.

    The plan is kept in the folder of the job, since a run goes on with the settings that it began with, and so computes
    the same bits. A job or an operator that names the number of parts has it so, and devices that do not tell their
    memory take the batch whole. steps: of the run.
    """
    if PARTS in spec.config or any(parse_assignment(one)[0] == PARTS for one in spec.overrides):
        return config
    device = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    plan = read_object(folder.batch)
    if plan is None or plan["sequences"] != config.train.batch_size:
        limit = device_bytes()
        if limit is None:
            return config
        parts = fewest_parts(config, jax.devices(), limit, steps=steps)
        plan = {
            "device": device, "sequences": config.train.batch_size, "parts": parts.number, "peak_bytes": parts.peak,
            "limit_bytes": parts.limit, "fits": parts.fits,
        }  # fmt: skip
        write_json(folder.batch, plan)
    _tell(telling, plan)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=plan["parts"]))


def device_bytes() -> int | None:
    """Bytes that a step may use on a device: of its own memory, or of this machine's that is free, on a CPU."""
    if jax.default_backend() != "cpu":
        return memory_limit(jax.local_devices())
    try:
        memory: Any = examine_memory().value
    except (OSError, ValueError, KeyError):  # a system that tells it otherwise
        return None
    return min(memory["free_bytes"], memory["limit_bytes"] or math.inf) // jax.local_device_count()


def _tell(telling: Telling, plan: dict[str, Any]) -> None:
    whole = "whole" if plan["parts"] == 1 else f"in {plan['parts']} parts"
    sizes = f"{plan['peak_bytes'] / GIB:.2f} of {plan['limit_bytes'] / GIB:.2f} GiB a device by arithmetic"
    message = f"A batch of {plan['sequences']} sequences goes through the devices {whole}: {sizes}"
    telling.event("batch", message, level="info" if plan["fits"] else "warn", **plan)
