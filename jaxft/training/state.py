"""The state of a run and how a model divides into what moves and what does not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft.adapters.attach import AdapterParam, StartParam


class TrainState(NamedTuple):
    """All that a step reads and writes.

    step: int32, optimizer steps taken. trainable, frozen: nnx.State, the model's parameters.
    opt_state: optax's. key: the run's root PRNG key; steps fold their number into it.
    """

    step: jax.Array
    trainable: Any
    frozen: Any
    opt_state: Any
    key: jax.Array


def saved_part(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state: all but the frozen base, which is on disk already.

    `start`: what adapters began with and are counted from, where there is any.
    """
    start = nnx.filter_state(state.frozen, StartParam)
    kept = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state, "key": state.key}
    return kept | ({"start": start} if jax.tree.leaves(start) else {})


def with_saved(state: TrainState, saved: Mapping[str, Any]) -> TrainState:
    """The state with what a checkpoint held of it."""
    kept = {name: part for name, part in saved.items() if name != "start"}
    frozen = nnx.merge_state(state.frozen, saved["start"]) if "start" in saved else state.frozen
    return state._replace(**kept, frozen=frozen)


def divide(model: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, trainable, frozen): adapters move where there are any, else what `model.trainable_paths` names."""
    graphdef, moving, still = nnx.split(model, AdapterParam, ...)
    if jax.tree.leaves(moving):
        return graphdef, moving, still
    if model.trainable_paths is None:
        return graphdef, still, moving
    return nnx.split(model, lambda path, _: "/".join(map(str, path)) in model.trainable_paths, ...)


def create(model: nnx.Module, tx: optax.GradientTransformation, seed: int) -> tuple[Any, TrainState]:
    """(graphdef, state at step 0). Trainable parameters become float32."""
    graphdef, trainable, frozen = divide(model)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return graphdef, TrainState(jnp.int32(0), trainable, frozen, tx.init(trainable), jax.random.key(seed))
