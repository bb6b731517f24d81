"""The training step of a config on hypothetical devices: built, compiled and costed."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from jaxft.config import RunConfig
from jaxft.hardware import analytic, gpu_compile, hlo
from jaxft.hardware.compile import Memory, TooLarge, compile_step
from jaxft.hardware.costs import Costs, Work, costs_of
from jaxft.hardware.recomputation import Recomputation, by_arithmetic
from jaxft.hardware.roofline import StepTime, axis_bandwidths, step_time
from jaxft.hardware.sizes import ModelSizes, sizes_of
from jaxft.hardware.topology import Topology, devices
from jaxft.methods import method_of
from jaxft.nn.decoder import Decoder
from jaxft.nn.quantized import use_matmul
from jaxft.nn.storage import StorageDims
from jaxft.optim.make import make_schedule
from jaxft.planning.shapes import frozen_shapes_of
from jaxft.runs.build import (
    abstract_of,
    check_context,
    check_experts,
    check_matmul_on,
    make_mesh,
    make_step,
    make_tx,
)
from jaxft.runs.going_on import going_on
from jaxft.runs.memory import estimate
from jaxft.runs.memory.shapes import StateShapes, batch_on_mesh, device_bytes, on_mesh, state_shapes
from jaxft.sharding.mesh import MeshPlan, auto_mesh, axis_sizes, fill_axes
from jaxft.training.spikes import MEASURED
from jaxft.training.state import TrainState, divide
from jaxft.training.step import Step


@dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """The parts of a training step that do not depend on the mesh.

    function: `(state, batch) -> (state, metrics)`. graphdef: of the model whose parameters the state holds in two
    parts.
    """

    model: Decoder
    graphdef: nnx.GraphDef[Decoder]
    sizes: ModelSizes
    shapes: StateShapes
    function: Step

    @property
    def dims(self) -> dict[str, StorageDims]:
        """Of stored parameters."""
        return self.shapes.dims


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes of one device's arguments, by their use."""

    weights: int
    adapters: int
    optimizer: int
    method: int
    batch: int

    @property
    def total(self) -> int:
        """Bytes of all arguments."""
        return self.weights + self.adapters + self.optimizer + self.method + self.batch


@dataclass(frozen=True, kw_only=True)
class ShardedStep:
    """A training step on the devices of a topology. state, batch: ShapeDtypeStructs with shardings.

    references: sizes of the frozen models that each step runs forward, beside the training pass.
    """

    config: RunConfig
    topology: Topology
    mesh: MeshPlan
    graphdef: nnx.GraphDef[Decoder]
    sizes: ModelSizes
    references: tuple[ModelSizes, ...]
    state: TrainState
    batch: Any
    function: Step

    @property
    def model_flops(self) -> int:
        """FLOPs of one device in one step, recomputation left out."""
        return estimate.model_flops_of(self.config, step_sizes(self))

    @property
    def attention_flops(self) -> int:
        """The part of `model_flops` that attention takes, its projections left out."""
        flops = self.sizes.attention_flops(self.config.train.batch_size, self.config.data.max_length)
        return flops // self.topology.devices

    def parts(self) -> Parts:
        """Bytes of one device's arguments."""
        frozen, trained = device_bytes(self.state.frozen), device_bytes(self.state.trainable)
        whole = self.config.adapter.kind == "none"
        return Parts(
            weights=trained + frozen if whole else frozen,
            adapters=0 if whole else trained,
            optimizer=device_bytes(self.state.opt_state),
            method=device_bytes(self.state.method),
            batch=device_bytes(self.batch),
        )


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Memory and work of one step on one device.

    compiled: whether they come from a compiled program, else they are estimated by arithmetic. seconds, cpu_seconds:
    spent on compiling. refused: the compiler's message if the step is too large; limit: bytes of main memory that the
    message names. level: XLA's optimisation level, None if no compiler was asked.
    """

    memory: Memory
    costs: Costs
    compiled: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    refused: str | None = None
    limit: int | None = None
    level: str | None = None


def abstract_step_of(config: RunConfig, hf_config: dict[str, Any], steps: int) -> AbstractStep:
    """The step of a config, from the content of config.json. steps: length of the run, which the schedule needs.

    Raises the errors that a run would raise before it loads weights.
    """
    config = going_on(config, hf_config)
    model = abstract_of(hf_config, config)
    use_matmul(model, config.train.matmul_dtype)
    method_of(config).check(config, model)
    schedule = make_schedule(config.optim, steps)
    tx = make_tx(config, model, schedule)
    graphdef, _, _ = divide(model)
    step, sizes = make_step(config, model, graphdef, tx, schedule), sizes_of(model)
    if config.train.on_spike != "off":
        step = partial(step, limits=np.full(len(MEASURED), np.inf, np.float32))
    shapes = state_shapes(config, model, tx, frozen_shapes_of)
    return AbstractStep(
        model=model,
        graphdef=graphdef,
        sizes=sizes,
        shapes=shapes,
        function=step,
    )


def sharded_step_of(
    abstract_step: AbstractStep, config: RunConfig, topology: Topology, *, real: bool = True
) -> ShardedStep:
    """The step on the topology's devices. real=False: on an abstract mesh, which is enough for estimates but cannot be
    compiled for.

    Raises ConfigError if the mesh does not fit the devices, the batch or the arrays.
    """
    if config.mesh.slice == 1 and topology.count > 1 and not config.mesh.auto:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slice=topology.count))
    topology.chip.check_matmul(config.train.matmul_dtype)
    if real and topology.chip.maker == "tpu":
        mesh = make_mesh(config, abstract_step.model, devices(topology))
    elif real and gpu_compile.can_compile(topology):
        mesh = make_mesh(config, abstract_step.model, gpu_compile.devices(topology))
    else:
        mesh = _abstract_mesh(config, abstract_step.model, topology)
    mesh.check_batch(config.train.batch_size // config.train.accumulation_steps)
    return ShardedStep(
        config=config,
        topology=topology,
        mesh=mesh,
        graphdef=abstract_step.graphdef,
        sizes=abstract_step.sizes,
        references=abstract_step.shapes.references,
        state=on_mesh(abstract_step.shapes, mesh),
        batch=batch_on_mesh(config, mesh),
        function=abstract_step.function,
    )


def measure(step: ShardedStep, level: str) -> StepCosts:
    """Memory and costs of a step: by the compiler, or by arithmetic for GPUs that it is not installed for and for steps
    that it refuses as too large. level: see `hardware.compile.LEVELS`; GPUs have their own.
    """
    is_gpu = step.topology.chip.maker == "gpu"
    if is_gpu and not gpu_compile.can_compile(step.topology):
        return estimate_step(step)
    level, options = (gpu_compile.LEVEL, gpu_compile.OPTIONS) if is_gpu else (level, None)
    compiled = compile_step(step.function, step.state, step.batch, step.mesh, level, options)
    if not isinstance(compiled, TooLarge):
        ids = [device.id for device in step.mesh.mesh.devices.flat]
        filled = analytic.filled_share(step.sizes, step.mesh.axes["expert"])
        module, memory = hlo.parse(compiled.text), compiled.memory
        if is_gpu:
            works_in = gpu_compile.kernel_workspace(module)
            memory = dataclasses.replace(memory, temporaries=memory.temporaries + works_in)
        costs = costs_of(module, step.mesh.axes, ids, filled=filled)
        if waiting := analytic.waiting_flops(step.config, step.sizes, cut_of_step(step)):
            costs.work[Work(waiting, 0)] += 1
        return StepCosts(
            memory=memory,
            costs=costs,
            compiled=True,
            seconds=compiled.seconds,
            cpu_seconds=compiled.cpu_seconds,
            level=level,
        )
    estimated = estimate_step(step)
    memory = estimated.memory
    temporaries = compiled.temporaries
    if compiled.used is not None:
        temporaries = max(0, compiled.used - memory.arguments)
    if temporaries is not None:
        memory = dataclasses.replace(memory, temporaries=temporaries, code=0)
    return dataclasses.replace(
        estimated, memory=memory, seconds=compiled.seconds, cpu_seconds=compiled.cpu_seconds,
        refused=compiled.message, limit=compiled.limit, level=level,
    )  # fmt: skip


def cut_of_step(step: ShardedStep) -> analytic.Cut:
    """One device's part of a step."""
    return analytic.cut_of(step.config, step.mesh.axes, kernel=step.topology.chip.maker == "tpu")


def estimate_step(step: ShardedStep) -> StepCosts:
    """Memory and costs of a step by arithmetic."""
    sizes = step_sizes(step)
    return StepCosts(memory=estimate.memory_of(step.config, sizes), costs=estimate.costs_of(step.config, sizes))


def step_sizes(step: ShardedStep) -> estimate.StepSizes:
    """What an estimate of a step reads."""
    return estimate.StepSizes(
        model=step.sizes, references=step.references, cut=cut_of_step(step), arguments=step.parts().total
    )


def recomputation_of(step: ShardedStep) -> Recomputation:
    """The policy that `model.remat='auto'` takes on the topology, by arithmetic."""
    sizes, chip = step_sizes(step), step.topology.chip
    return by_arithmetic(partial(estimate.with_recomputation, step.config, sizes), chip.hbm_bytes // chip.devices)


def time_of(step: ShardedStep, costs: Costs) -> StepTime:
    """Seconds of a step with these costs."""
    grid = None
    if step.topology.chip.maker == "tpu":
        sides, sizes = step.topology.shape, tuple(step.mesh.axes.values())
        if isinstance(step.mesh.mesh, jax.sharding.AbstractMesh):
            one_slice = np.repeat(np.indices(sides).reshape(len(sides), -1).T, step.topology.chip.devices, axis=0)
            grid = np.tile(one_slice, (step.topology.count, 1)).reshape(*sizes, len(sides))
        else:
            coordinates = [device.coords[: len(sides)] for device in step.mesh.mesh.devices.flat]
            grid = np.array(coordinates).reshape(*sizes, len(sides))
    bandwidths = axis_bandwidths(step.topology, step.mesh.axes, grid)
    return step_time(costs, step.topology, bandwidths, matmul_dtype=step.config.train.matmul_dtype)


def _abstract_mesh(config: RunConfig, model: Decoder, topology: Topology) -> MeshPlan:
    """`make_mesh` without devices."""
    sizes, axes = model.config, config.mesh
    heads = {"heads": sizes.num_attention_heads, "kv_heads": sizes.num_key_value_heads}
    if axes.auto:
        rows = config.train.batch_size // config.train.accumulation_steps
        length = config.data.max_length
        axes = auto_mesh(topology.devices, rows=rows, slices=topology.count, max_length=length, **heads)
    filled = fill_axes(axis_sizes(axes), topology.devices)
    # Shardings, which are all that an estimate needs, read only what both kinds of mesh have.
    mesh = MeshPlan(mesh=cast(jax.sharding.Mesh, jax.sharding.AbstractMesh(tuple(filled.values()), tuple(filled))))
    mesh.check_sizes(max_length=config.data.max_length, **heads)
    check_matmul_on(config, mesh)
    check_experts(model, mesh)
    check_context(model, mesh)
    return mesh
