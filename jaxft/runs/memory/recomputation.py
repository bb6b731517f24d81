"""The policy of a run with `model.remat='auto'`: by arithmetic before the weights are loaded, then by the compiler."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from jaxft.config import RunConfig
from jaxft.config.model import Policy
from jaxft.hardware import analytic
from jaxft.hardware.attached import memory_limit
from jaxft.hardware.compile import parse_too_large
from jaxft.hardware.recomputation import POLICIES, Recomputation, by_arithmetic
from jaxft.hardware.sizes import sizes_of
from jaxft.methods.teacher.frozen import FrozenModel
from jaxft.nn.decoder import Decoder
from jaxft.optim.make import make_schedule
from jaxft.runs.build import make_tx
from jaxft.runs.memory.estimate import StepSizes, with_recomputation
from jaxft.runs.memory.shapes import batch_on_mesh, device_bytes, on_mesh, state_shapes
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import gather

log = logging.getLogger(__name__)

# On CPUs keeping everything is slower than computing all but the products again: docs/performance.md has the figures.
ON_CPU: Policy = "dots"
UNLIMITED: Policy = "full"  # for accelerators that do not tell how much memory they have


def recomputation_of(
    config: RunConfig, model: Decoder, mesh: MeshPlan, *, steps: int, before: Mapping[str, Any] | None = None
) -> Recomputation | None:
    """The policy of a run; None if its config names one. Every process of the run calls it, and gets the same.

    model: abstract, from `abstract_model`. before: what `recorded` gave when the run was last started; the same devices
    take the same policy again, and so compute the same bits.
    """
    if config.model.remat != "auto":
        return None
    devices = list(mesh.mesh.devices.flat)
    limits = gather(memory_limit(devices))
    known = [limit for limit in limits if limit is not None]
    limit = min(known) if len(known) == len(limits) else None
    platform = devices[0].platform
    estimate = estimate_of(config, model, mesh, steps=steps)
    if limit is not None:
        chosen = by_arithmetic(estimate, limit)
    else:
        policy, why = _without_limit(platform)
        products = {name: estimate(name)[1] for name in POLICIES}
        chosen = Recomputation(policy=policy, peaks={}, limit=None, products=products, why=why)
    return _as_before(chosen, before or {}, devices_of(mesh))


def estimate_of(
    config: RunConfig, model: Decoder, mesh: MeshPlan, *, steps: int
) -> Callable[[Policy], tuple[int, float]]:
    """What a policy costs a run, as in `by_arithmetic`. model: abstract."""
    shapes = state_shapes(config, model, make_tx(config, model, make_schedule(config.optim, steps)), _hf_config)
    state = on_mesh(shapes, mesh)
    parts = (state.trainable, state.frozen, state.opt_state, state.method, batch_on_mesh(config, mesh))
    cut = analytic.cut_of(config, mesh.axes, kernel=mesh.mesh.devices.flat[0].platform == "tpu")
    sizes = StepSizes(model=sizes_of(model), references=shapes.references, cut=cut, arguments=device_bytes(parts))
    return partial(with_recomputation, config, sizes)


def take_policy(config: RunConfig, module: Decoder, model: Decoder, mesh: MeshPlan) -> None:
    """Gives a model its policy by arithmetic alone, if `model.remat` is `auto`. model: its abstract form."""
    choice = recomputation_of(config, model, mesh, steps=config.train.steps or 1)  # the length changes no size
    if choice is not None:
        module.remat = choice.policy
        log.info("%s", choice.describe())


def devices_of(mesh: MeshPlan) -> dict[str, Any]:
    """The devices of a run, as a record keeps them."""
    return {"device": mesh.mesh.devices.flat[0].device_kind, "axes": dict(mesh.axes)}


def recorded(recomputation: Recomputation, mesh: MeshPlan) -> dict[str, Any]:
    """What the record of a run keeps of a choice. Bytes of one device by arithmetic; None if they decided nothing."""
    policy = recomputation.policy
    return {
        "policy": policy,
        "peak_bytes": recomputation.peaks.get(policy),
        "limit_bytes": recomputation.limit,
        "products": round(recomputation.products[policy], 4),
        **devices_of(mesh),
    }


def changed(before: Mapping[str, Any], policy: str) -> str | None:
    """What it means that a run goes on with another policy than that of `before`; None if it does not."""
    if not before or before["policy"] == policy:
        return None
    return (
        f"model.remat is {policy!r} from here on and was {before['policy']!r} before, on {before['device']}: the run "
        "computes the same up to rounding, and does not end with the same bits"
    )


def refused(lowered: "jax.stages.Lowered", limit: int) -> bool:
    """Whether the compiler finds, in any process of the run, that a step does not fit into `limit` bytes of a device.

    A step that fits is not compiled a second time when it is called. Every process of the run calls it.
    """
    refusals = [one for one in gather(_refusal(lowered, limit)) if one is not None]
    if refusals:
        log.info("the step does not fit: %s", refusals[0])
    return bool(refusals)


def _refusal(lowered: "jax.stages.Lowered", limit: int) -> str | None:
    """Why a step does not fit, in words; None if it does."""
    try:
        analysis = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        too_large = parse_too_large(str(error))
        if too_large is None:
            raise
        return too_large.message
    # The compiler for TPUs refuses by itself, and what some of its versions report here is more than they allocate.
    if analysis is None or jax.default_backend() == "tpu":
        return None
    needed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    needed += analysis.temp_size_in_bytes
    return f"it needs {needed:,} of {limit:,} bytes" if needed > limit else None


def _without_limit(platform: str) -> tuple[Policy, str]:
    """(the policy where no limit of memory is known, why)."""
    if platform == "cpu":
        return ON_CPU, "CPUs have no limit of their own, and computing what is between the products again is quicker"
    return UNLIMITED, f"this {platform} does not tell how much memory it has. Set another policy if it has enough"


def _as_before(now: Recomputation, before: Mapping[str, Any], devices: Mapping[str, Any]) -> Recomputation:
    policy = next((one for one in POLICIES if one == before.get("policy")), None)
    same = all(before.get(name) == value for name, value in devices.items())
    if policy is None or policy == now.policy or not same:
        return now
    after = POLICIES[POLICIES.index(policy) + 1 :]
    return dataclasses.replace(now, policy=policy, after=after, why="these devices took it before")


def _hf_config(frozen: FrozenModel) -> dict[str, Any]:
    return frozen.hf_config()
