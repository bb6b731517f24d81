"""What would make a run fit that does not: the cheapest change first."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.planning.topology import Slices, shapes
from jaxft.runs.plan_job import Blueprint, estimate

SHOWN = 4
MARGIN = 0.97  # of the limit: arithmetic is not the compiler


def changes_of(
    blueprint: Blueprint, config: RunConfig, slices: Slices, figures: dict[str, Any], reckoned: int
) -> list[dict[str, Any]]:
    """Changes that fit, the cheapest first: `{what, paste, hbm_peak_bytes}`.

    Each is reckoned by arithmetic and scaled by what the compiler said of the config as it is over what arithmetic says
    of it. reckoned: the latter, bytes.
    """
    scale = figures["hbm_peak_bytes"] / reckoned
    found = []
    for what, paste, changed, place in _candidates(config, slices):
        try:
            peak = int(estimate(blueprint, changed, place).memory.peak * scale)
        except ConfigError:
            continue  # this mesh does not divide the batch or the arrays
        if peak <= MARGIN * figures["hbm_limit_bytes"]:
            found.append({"what": what, "paste": paste, "hbm_peak_bytes": peak})
    if config.adapter.kind == "none":
        found.append(
            {
                "what": "train adapters instead of all parameters",
                "paste": "--config.adapter.kind=lora --config.model.param_dtype=bfloat16",
                "hbm_peak_bytes": _adapters(config, figures),
            }
        )
    return found[:SHOWN]


def _candidates(config: RunConfig, slices: Slices) -> Iterator[tuple[str, str, RunConfig, Slices]]:
    """From what costs a little time to what costs more money."""
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    if config.model.remat != "full":
        yield "recompute every layer", "--config.model.remat=full", full, slices
    steps = config.train.accumulation_steps
    extra = "" if config.model.remat == "full" else " --config.model.remat=full"
    for times in (2, 4, 8, 16):
        train = dataclasses.replace(config.train, accumulation_steps=steps * times)
        if config.train.batch_size % train.accumulation_steps == 0:
            paste = f"--config.train.accumulation_steps={steps * times}{extra}"
            yield f"{times} times smaller micro-batches", paste, dataclasses.replace(full, train=train), slices
    if slices.chip.maker == "tpu":
        for tensor in (2, 4, 8):
            if slices.chips % tensor == 0:
                mesh = dataclasses.replace(config.mesh, auto=False, data=1, fsdp=-1, expert=1, context=1, tensor=tensor)
                paste = f"--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor={tensor}{extra}"
                yield f"heads and inner units over {tensor}", paste, dataclasses.replace(full, mesh=mesh), slices
    chips = slices.chips // slices.count
    for times in (2, 4, 8, 16):
        shape = shapes(slices.chip, chips * times)
        if shape is not None:
            larger = dataclasses.replace(slices, shape=shape)
            mesh = dataclasses.replace(config.mesh, auto=False, data=1, fsdp=-1)
            yield (
                f"a slice of {larger.name}",
                f"--topology={larger.name}{extra}",
                dataclasses.replace(full, mesh=mesh),
                larger,
            )


def _adapters(config: RunConfig, figures: dict[str, Any]) -> int:
    """About: weights at two bytes a number instead of four, no moments, no gradients of them."""
    parts = figures["argument_parts"]
    return max(0, figures["hbm_peak_bytes"] - parts["optimizer"] - parts["weights"] // 2 - parts["weights"])
