"""The state and the batch of a run as shapes, with or without the shardings of its mesh, and their bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx

from jaxft.config import RunConfig
from jaxft.hardware.sizes import ModelSizes, sizes_of
from jaxft.methods import method_of
from jaxft.methods.teacher.frozen import FrozenModel
from jaxft.nn.decoder import Decoder
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.runs.build import start_state, with_frozen
from jaxft.sharding.mesh import MeshPlan
from jaxft.training.state import TrainState
from jaxft.trees import is_key


@dataclass(frozen=True, kw_only=True)
class StateShapes:
    """The state of training as ShapeDtypeStructs without shardings.

    dims: of stored parameters of the model, and of the method's frozen model. references: sizes of the frozen models
    that each step runs forward.
    """

    state: TrainState
    dims: dict[str, StorageDims]
    references: tuple[ModelSizes, ...]


def state_shapes(
    config: RunConfig,
    model: Decoder,
    tx: optax.GradientTransformation,
    hf_config_of: Callable[[FrozenModel], dict[str, Any]],
) -> StateShapes:
    """The state of a run. model: from `abstract_model`. hf_config_of: gives config.json of the method's frozen model.

    Raises the errors of `FrozenModel.abstract`.
    """
    whole, parameters = nnx.split(model)

    def start(parameters: nnx.State) -> TrainState:
        return start_state(config, nnx.merge(whole, parameters), tx)[1]

    method = method_of(config)
    dims, references = storage_dims_of(model), (sizes_of(model),) * method.reference_passes(config)
    frozen, fields = method.frozen(config), {}
    if frozen is not None:
        other = frozen.abstract(hf_config_of(frozen), student=model, max_length=config.data.max_length)
        if frozen.in_memory:
            # The longer path is taken, should the trained model have a parameter of the same name.
            dims |= {f"{frozen.part}/arrays/{path}": one for path, one in storage_dims_of(other).items()}
            fields[frozen.part] = frozen.abstract_arrays(other, student=model)
        references = (*references, sizes_of(other)) if frozen.in_step else references
    state = with_frozen(jax.eval_shape(start, parameters), fields)
    return StateShapes(state=state, dims=dims, references=references)


def on_mesh(shapes: StateShapes, mesh: MeshPlan) -> TrainState:
    """The state with the shardings of a mesh. Raises ConfigError if the mesh does not divide its arrays."""
    return jax.tree.map(with_sharding, shapes.state, mesh.shardings(shapes.state, shapes.dims))


def batch_on_mesh(config: RunConfig, mesh: MeshPlan) -> Any:
    """The batch of a step with the sharding of a mesh."""
    return jax.tree.map(lambda x: with_sharding(x, mesh.batch_sharding()), method_of(config).batch_shapes(config))


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    """A shape with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (8 if is_key(leaf) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )
