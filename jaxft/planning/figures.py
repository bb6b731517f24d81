"""The figures of a plan, as `jaxft plan --json` prints and `jaxft.plan` returns them; docs/plan.md explains each."""

import importlib.metadata
from dataclasses import asdict
from typing import Any

from jaxft.hardware.prices import price_of
from jaxft.hardware.roofline import StepTime, efficiency_of
from jaxft.planning.job import PlacedStep, StepCosts
from jaxft.planning.shapes import Length

# Never in a plan, whatever the run.
ALWAYS_UNKNOWN = (
    "the input pipeline, held-out evaluation, checkpoints, exports, loading and compiling: none is in the hours",
    "preemptions, and chips that are slower than their peers",
    "packed rows let attention skip blocks; every causal block is counted",
)


def result_of(
    job: PlacedStep, measured: StepCosts, time: StepTime, *, level: str, length: Length, shapes: str, prices: str | None
) -> dict[str, Any]:
    """All figures of a plan. length: of the run; shapes: where config.json came from; prices: a file, or ours."""
    chip, config = job.slices.chip, job.config
    figures = {
        "compiled": measured.compiled,
        "optimization_level": level if chip.maker == "tpu" else None,
        "topology": job.slices.name,
        "slices": job.slices.count,
        "chips": job.slices.chips,
        "devices_per_chip": chip.devices,
        "mesh": job.mesh.axes,
        "parameters": job.sizes.parameters,
        "adapter_parameters": job.sizes.adapter,
        "batch_size": config.train.batch_size,
        "max_length": config.data.max_length,
        "shapes_from": shapes,
        "refused": measured.refused,
        "compile_seconds": measured.seconds,
        "compile_cpu_seconds": measured.cpu_seconds,
        "unknown": [*sorted(measured.costs.unknown), *ALWAYS_UNKNOWN],
        "versions": versions(),
    }
    if measured.costs.host_bytes:
        figures["unknown"].insert(0, "time of what travels to the host's memory and back: none is in the hours")
    if not measured.compiled:
        figures["unknown"].insert(0, "what a compiler makes of the step: memory, work and traffic are by arithmetic")
    return {
        **_memory(job, measured),
        **figures,
        **_work(job, measured),
        **_time(job, time, length),
        **_money(job, time, length, prices),
    }


def _memory(job: PlacedStep, measured: StepCosts) -> dict[str, Any]:
    memory, chip = measured.memory, job.slices.chip
    limit = measured.limit or chip.hbm_bytes // chip.devices
    return {
        "fits": measured.refused is None and memory.peak <= limit,
        "hbm_peak_bytes": memory.peak,
        "hbm_limit_bytes": limit,
        "argument_bytes": memory.arguments,
        "argument_parts": asdict(job.parts()),
        "temp_bytes": memory.temporaries,
        "output_bytes": memory.outputs,
        "aliased_bytes": memory.aliased,
        "code_bytes": memory.code,
        "host_bytes": memory.host,
    }


def _work(job: PlacedStep, measured: StepCosts) -> dict[str, Any]:
    costs = measured.costs
    return {
        "model_flops_per_step": job.model_flops,
        "attention_flops_per_step": job.attention_flops,
        "hardware_flops_per_step": costs.flops,
        "hbm_traffic_bytes_per_step": costs.hbm_bytes,
        "host_traffic_bytes_per_step": costs.host_bytes,
        "collective_bytes_per_step": costs.collective_bytes,
        "collective_bytes_by_kind": costs.bytes_by("kind"),
        "collective_bytes_by_axis": costs.bytes_by("axes"),
    }


def _time(job: PlacedStep, time: StepTime, length: Length) -> dict[str, Any]:
    chip, seconds = job.slices.chip, time.total
    tokens = job.config.train.batch_size * job.config.data.max_length
    return {
        "step_seconds": seconds,
        "step_parts": {
            "products": time.products,
            "memory": time.memory,
            "busy": time.busy,
            "network": dict(time.network),
            "network_exposed": time.exposed,
            "bound_by": time.bound,
        },
        "efficiency": asdict(efficiency_of(chip)),
        "tokens_per_second_per_chip": tokens / seconds / job.slices.chips,
        "mfu": job.model_flops * chip.devices / seconds / chip.flops,
        "steps": length.steps,
        "steps_from": length.source,
        "steps_known": length.known,
    }


def _money(job: PlacedStep, time: StepTime, length: Length, prices: str | None) -> dict[str, Any]:
    price = price_of(job.slices.chip.name, prices)
    hours = length.steps * time.total / 3600
    return {
        "hours": hours,
        "usd": hours * job.slices.chips * price.on_demand,
        "usd_spot": None if price.spot is None else hours * job.slices.chips * price.spot,
        "usd_per_chip_hour": price.on_demand,
        "prices_from": f"{price.source} of {price.date}" if prices else f"jaxft's own table of {price.date}",
    }


def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    out: dict[str, str | None] = {}
    for name in ("jaxft", "jax", "jaxlib", "libtpu", "flax"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out
