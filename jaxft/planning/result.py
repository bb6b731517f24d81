"""A plan as a dict: what `jaxft plan --json` prints and `jaxft.plan` returns. docs/plan.md explains each key."""

import importlib.metadata
from dataclasses import asdict
from typing import Any

from jaxft.hardware.compile import pairing
from jaxft.hardware.costs import Costs
from jaxft.hardware.prices import price_of
from jaxft.hardware.recomputation import Recomputation
from jaxft.hardware.roofline import DEQUANTIZED_PER_SECOND, ROUNDED_PER_SECOND, efficiency_of
from jaxft.planning.job import ShardedStep, StepCosts
from jaxft.planning.rollout import RunCosts, rollout_result
from jaxft.planning.shapes import Length

# Costs that no plan includes.
ALWAYS_UNKNOWN = (
    "the input pipeline, held-out evaluation, checkpoints, exports, loading and compiling: none is in the hours",
    "preemptions, and chips that are slower than their peers",
    "packed rows let attention skip blocks; every causal block is counted",
)


def plan_result(
    step: ShardedStep,
    costs: RunCosts,
    *,
    length: Length,
    shapes_from: str,
    prices: str | None,
    recomputation: Recomputation | None = None,
) -> dict[str, Any]:
    """The plan of a run with this step. length: of the run. shapes_from: where config.json came from, in words. prices:
    a file, or None for jaxft's table. recomputation: the choice of `model.remat='auto'`; None if the config chose.
    """
    chip, config, step_costs = step.topology.chip, step.config, costs.update
    limit = step_costs.limit or chip.hbm_bytes // chip.devices
    sampling = None if costs.rollout is None else costs.rollout.sampling
    return {
        "fits": costs.refused is None and costs.peak <= limit,
        "hbm_peak_bytes": costs.peak,
        "hbm_limit_bytes": limit,
        **_memory(step, step_costs),
        "compiled": step_costs.compiled,
        "optimization_level": step_costs.level,
        "topology": step.topology.name,
        "slices": step.topology.count,
        "chips": step.topology.chips,
        "devices_per_chip": chip.devices,
        "mesh": step.mesh.axes,
        "remat": config.model.remat,
        "remat_choice": None if recomputation is None else recomputation.describe(),
        "parameters": step.sizes.parameters,
        "adapter_parameters": step.sizes.adapter,
        "batch_size": config.train.batch_size,
        "max_length": config.data.max_length,
        "shapes_from": shapes_from,
        "refused": costs.refused,
        "compile_seconds": step_costs.seconds + (sampling.seconds if sampling else 0.0),
        "compile_cpu_seconds": step_costs.cpu_seconds + (sampling.cpu_seconds if sampling else 0.0),
        "rollout": rollout_result(costs, limit),
        "unknown": _unknown(step, costs),
        "versions": versions(),
        **_work(step, step_costs.costs),
        **_time(step, costs, length),
        **_money(step, costs.seconds, length, prices),
    }


def _unknown(step: ShardedStep, costs: RunCosts) -> list[str]:
    """What the plan does not include, in words; the most important first."""
    step_costs, rollout = costs.update, costs.rollout
    counted = set(step_costs.costs.unknown)
    if rollout is not None:
        counted |= rollout.sampling.prefill.unknown | rollout.sampling.decode.unknown
    unknown = [*sorted(counted), *ALWAYS_UNKNOWN]
    chip = step.topology.chip.name
    if (step.config.model.quantization or "").startswith("nf4") and (
        not step_costs.compiled or chip not in DEQUANTIZED_PER_SECOND
    ):
        unknown.insert(0, f"the time in which {chip} dequantises NF4: none is in the hours")
    narrow, tpu = step.config.train.matmul_dtype is not None, step.topology.chip.maker == "tpu"
    if narrow and tpu and chip not in ROUNDED_PER_SECOND:
        unknown.insert(0, f"the time in which {chip} rounds operands to 8 bits: none is in the hours")
    if rollout is not None and step.config.method.chosen.ROWS == "prompts":
        unknown.insert(0, "the time of reward functions: none is in the hours")
        if step.config.rollout.environment is not None:
            unknown.insert(0, "the replies of the environment, and computing earlier turns again: none is in the hours")
    elif rollout is not None and step.config.data.packing:
        unknown.insert(0, "the prompts in packed rows: one a row is answered")
    if step_costs.costs.host_bytes:
        unknown.insert(0, "time of transfers between the chip and the host's memory: none is in the hours")
    words, tested = pairing()
    if step_costs.compiled and tpu and not tested:
        unknown.insert(0, f"whether the compiler is right, which was not tested: {words}")
    if step_costs.compiled and not tpu:
        unknown.insert(0, "the kernels that the GPU would choose by measuring")
    if not step_costs.compiled:
        unknown.insert(0, "what a compiler makes of the step: memory, work and traffic are estimated by arithmetic")
    return unknown


def _memory(step: ShardedStep, step_costs: StepCosts) -> dict[str, Any]:
    memory = step_costs.memory
    return {
        "update_peak_bytes": memory.peak,
        "argument_bytes": memory.arguments,
        "argument_parts": asdict(step.parts()),
        "temp_bytes": memory.temporaries,
        "output_bytes": memory.outputs,
        "aliased_bytes": memory.aliased,
        "code_bytes": memory.code,
        "host_bytes": memory.host,
    }


def _work(step: ShardedStep, costs: Costs) -> dict[str, Any]:
    return {
        "model_flops_per_step": step.model_flops,
        "attention_flops_per_step": step.attention_flops,
        "hardware_flops_per_step": costs.flops,
        "hbm_traffic_bytes_per_step": costs.hbm_bytes,
        "host_traffic_bytes_per_step": costs.host_bytes,
        "collective_bytes_per_step": costs.collective_bytes,
        "collective_bytes_by_kind": costs.bytes_by("kind"),
        "collective_bytes_by_axis": costs.bytes_by("axes"),
    }


def _time(step: ShardedStep, costs: RunCosts, length: Length) -> dict[str, Any]:
    chip, seconds, time = step.topology.chip, costs.seconds, costs.time
    tokens = step.config.train.batch_size * step.config.data.max_length
    return {
        "step_seconds": seconds,
        "update_seconds": time.total,
        "step_parts": {
            "products": time.products,
            "memory": time.memory,
            "dequantizing": time.dequantizing,
            "rounding": time.rounding,
            "busy": time.busy,
            "network": dict(time.network),
            "network_exposed": time.exposed,
            "bound_by": time.bound,
        },
        "efficiency": asdict(efficiency_of(chip)),
        "tokens_per_second_per_chip": tokens / seconds / step.topology.chips,
        "mfu": step.model_flops * chip.devices / seconds / chip.flops,
        "steps": length.steps,
        "steps_from": length.source,
        "steps_known": length.known,
    }


def _money(step: ShardedStep, seconds: float, length: Length, prices: str | None) -> dict[str, Any]:
    price = price_of(step.topology.chip.name, prices)
    hours = length.steps * seconds / 3600
    return {
        "hours": hours,
        "usd": hours * step.topology.chips * price.on_demand,
        "usd_spot": None if price.spot is None else hours * step.topology.chips * price.spot,
        "usd_per_chip_hour": price.on_demand,
        "prices_from": f"{price.source} of {price.date}" if prices else f"jaxft's own table of {price.date}",
    }


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that a plan depends on; None for one that is not installed."""
    out: dict[str, str | None] = {}
    for name in ("jaxft", "jax", "jaxlib", "libtpu", "flax"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out
