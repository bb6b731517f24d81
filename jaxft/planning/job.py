"""One training step of a config, put together for devices that are not there, and what is found out about it."""

# B batch, S sequence

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.hardware import analytic, hlo
from jaxft.hardware.compile import Memory, TooLarge, compile_step
from jaxft.hardware.costs import Costs, costs_of
from jaxft.hardware.roofline import StepTime, axis_bandwidths, step_time
from jaxft.hardware.sizes import ModelSizes, sizes_of
from jaxft.hardware.topology import Topology, devices
from jaxft.optim.make import make_schedule
from jaxft.runs.build import abstract_of, check_experts, make_mesh, make_step, make_tx
from jaxft.sharding.mesh import MeshPlan, auto_mesh, axis_sizes, fill_axes
from jaxft.training.state import TrainState, create, divide


@dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """What no mesh changes: the model, its sizes, its state and its step. state: ShapeDtypeStructs, unplaced."""

    model: Any
    sizes: ModelSizes
    state: TrainState
    step: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes of one device's arguments by what they are."""

    weights: int
    adapters: int
    optimizer: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapters + self.optimizer + self.batch


@dataclass(frozen=True, kw_only=True)
class PlacedStep:
    """One step on the devices of a slice. state, batch: ShapeDtypeStructs with shardings."""

    config: RunConfig
    slices: Topology
    mesh: MeshPlan
    sizes: ModelSizes
    state: TrainState
    batch: Any
    step: Callable[..., Any]

    @property
    def model_flops(self) -> int:
        """Of one step and device."""
        flops = self.sizes.model_flops(self.config.train.batch_size, self.config.data.max_length)
        return flops // self.slices.devices

    @property
    def attention_flops(self) -> int:
        """What of these is attention's, apart from its projections."""
        flops = self.sizes.attention_flops(self.config.train.batch_size, self.config.data.max_length)
        return flops // self.slices.devices

    def parts(self) -> Parts:
        """Of one device."""
        frozen, trained = _bytes(self.state.frozen), _bytes(self.state.trainable)
        whole = self.config.adapter.kind == "none"
        return Parts(
            weights=trained + frozen if whole else frozen,
            adapters=0 if whole else trained,
            optimizer=_bytes(self.state.opt_state),
            batch=_bytes(self.batch),
        )


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """What is known of a step. compiled: whether a compiler said it. refused: its message for a step too large.

    limit: bytes of main memory by that message.
    """

    memory: Memory
    costs: Costs
    compiled: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    refused: str | None = None
    limit: int | None = None


def abstract_step_of(config: RunConfig, hf_config: dict[str, Any], steps: int) -> AbstractStep:
    """Raises what a run would raise before it loads weights. steps: of the run, for its schedule."""
    model = abstract_of(hf_config, config)
    schedule = make_schedule(config.optim, steps)
    tx = make_tx(config, model, schedule)
    whole, parameters = nnx.split(model)

    def start(parameters: Any) -> TrainState:
        return create(nnx.merge(whole, parameters), tx, config.seed)[1]

    graphdef, _, _ = divide(model)
    step = make_step(config, model, graphdef, tx, schedule)
    return AbstractStep(model=model, sizes=sizes_of(model), state=jax.eval_shape(start, parameters), step=step)


def placed_step_of(
    abstract_step: AbstractStep, config: RunConfig, slices: Topology, *, real: bool = True
) -> PlacedStep:
    """A blueprint on the slices' devices. real=False: on devices that are only counted, which no compiler takes.

    Raises ConfigError where the mesh does not fit the devices, the batch or the arrays.
    """
    if config.mesh.slice == 1 and slices.count > 1 and not config.mesh.auto:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slice=slices.count))
    if real and slices.chip.maker == "tpu":
        mesh = make_mesh(config, abstract_step.model, devices(slices))
    else:
        mesh = _counted(config, abstract_step.model, slices)
    mesh.check_batch(config.train.batch_size // config.train.accumulation_steps)
    state = jax.tree.map(_placed, abstract_step.state, mesh.shardings(abstract_step.state))
    return PlacedStep(
        config=config,
        slices=slices,
        mesh=mesh,
        sizes=abstract_step.sizes,
        state=state,
        batch=_batch(config, mesh),
        step=abstract_step.step,
    )


def measure(job: PlacedStep, level: str) -> StepCosts:
    """A job's memory and costs: by the compiler for TPUs, by arithmetic for GPUs and for what the compiler refuses."""
    if job.slices.chip.maker == "gpu":
        return reckon(job)
    compiled = compile_step(job.step, job.state, job.batch, job.mesh, level)
    if not isinstance(compiled, TooLarge):
        ids = [device.id for device in job.mesh.mesh.devices.flat]
        filled = analytic.filled(job.sizes, job.mesh.axes["expert"])
        return StepCosts(
            memory=compiled.memory,
            costs=costs_of(hlo.parse(compiled.text), job.mesh.axes, ids, filled=filled),
            compiled=True,
            seconds=compiled.seconds,
            cpu_seconds=compiled.cpu_seconds,
        )
    by_hand = reckon(job)
    memory = by_hand.memory
    rest = compiled.temporaries
    if compiled.used is not None:
        rest = max(0, compiled.used - memory.arguments)
    if rest is not None:
        memory = dataclasses.replace(memory, temporaries=rest, code=0)
    return dataclasses.replace(
        by_hand, memory=memory, seconds=compiled.seconds, cpu_seconds=compiled.cpu_seconds,
        refused=compiled.message, limit=compiled.limit,
    )  # fmt: skip


def reckon(job: PlacedStep) -> StepCosts:
    """A job's memory and costs by arithmetic."""
    cut = analytic.cut_of(job.config, job.mesh.axes, kernel=job.slices.chip.maker == "tpu")
    arguments = job.parts().total
    return StepCosts(
        memory=analytic.memory_of(job.config, job.sizes, cut, arguments),
        costs=analytic.costs_of(job.config, job.sizes, cut, arguments, job.model_flops),
    )


def estimate(abstract_step: AbstractStep, config: RunConfig, slices: Topology) -> StepCosts:
    """`reckon` without devices."""
    return reckon(placed_step_of(abstract_step, config, slices, real=False))


def time_of(job: PlacedStep, costs: Costs) -> StepTime:
    """Seconds of the job's step."""
    grid = None
    if job.slices.chip.maker == "tpu":
        sides, sizes = job.slices.shape, tuple(job.mesh.axes.values())
        if isinstance(job.mesh.mesh, jax.sharding.AbstractMesh):
            one = np.repeat(np.indices(sides).reshape(len(sides), -1).T, job.slices.chip.devices, axis=0)
            grid = np.tile(one, (job.slices.count, 1)).reshape(*sizes, len(sides))
        else:
            found = [device.coords[: len(sides)] for device in job.mesh.mesh.devices.flat]
            grid = np.array(found).reshape(*sizes, len(sides))
    return step_time(costs, job.slices, axis_bandwidths(job.slices, job.mesh.axes, grid))


def _counted(config: RunConfig, model: Any, slices: Topology) -> MeshPlan:
    """`make_mesh` over devices that are only counted."""
    sizes, axes = model.config, config.mesh
    heads = {"heads": sizes.num_attention_heads, "kv_heads": sizes.num_key_value_heads}
    if axes.auto:
        rows = config.train.batch_size // config.train.accumulation_steps
        length = config.data.max_length
        axes = auto_mesh(slices.devices, rows=rows, slices=slices.count, max_length=length, **heads)
    filled = fill_axes(axis_sizes(axes), slices.devices)
    mesh = MeshPlan(mesh=jax.sharding.AbstractMesh(tuple(filled.values()), tuple(filled)))
    mesh.check_sizes(max_length=config.data.max_length, **heads)
    check_experts(model, mesh)
    return mesh


def _batch(config: RunConfig, mesh: MeshPlan) -> Batch:
    shape, sharding = (config.train.batch_size, config.data.max_length), mesh.batch_sharding()
    types = {"weights_BS": jnp.float32}
    arrays = {
        name: jax.ShapeDtypeStruct(shape, types.get(name, jnp.int32), sharding=sharding) for name in Batch._fields
    }
    return Batch(**arrays)


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (8 if _is_key(leaf) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
