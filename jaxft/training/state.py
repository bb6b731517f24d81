"""The state of a run, and how a model divides into trained and frozen parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft.adapters.attach import AdapterParam, StartParam
from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import Constant
from jaxft.objectives.loss import MethodState


class TrainState(NamedTuple):
    """All arrays that a training step reads and writes.

    step: int32, optimizer steps taken. trainable, frozen: the model's parameters. opt_state: the optimizer's state.
    key: the run's root PRNG key; steps fold their number into it. method: the method's own arrays; None if it has none.
    """

    step: jax.Array
    trainable: nnx.State
    frozen: nnx.State
    opt_state: optax.OptState
    key: jax.Array
    method: MethodState | None = None


def saved_part(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint holds, by name.

    The frozen base is left out, since it is on disk already. `start`: the frozen initial values from which the effect
    of adapters is measured, if there are any. `method`: the method's saved numbers, if there are any.
    """
    start = nnx.filter_state(state.frozen, StartParam)
    parts = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state, "key": state.key}
    if jax.tree.leaves(start):
        parts["start"] = start
    if state.method is not None and state.method.saved is not None:
        parts["method"] = state.method.saved
    return parts


def with_saved(state: TrainState, saved: Mapping[str, Any]) -> TrainState:
    """The state with the parts that a checkpoint held."""
    parts = {name: part for name, part in saved.items() if name not in ("start", "method")}
    frozen = nnx.merge_state(state.frozen, saved["start"]) if "start" in saved else state.frozen
    method = state.method
    if method is not None and "method" in saved:
        method = method._replace(saved=saved["method"])
    return state._replace(**parts, frozen=frozen, method=method)


def divide(model: Decoder) -> tuple[nnx.GraphDef[Decoder], nnx.State, nnx.State]:
    """(graphdef, trainable, frozen): the adapters' parameters are trainable if there are any, else those that
    `model.trainable_paths` names, else all but constants.
    """
    graphdef, state = nnx.split(model)
    adapters, base = nnx.split_state(state, AdapterParam, ...)
    if jax.tree.leaves(adapters):
        return graphdef, adapters, base
    paths = model.trainable_paths
    if paths is None:
        constants, trainable = nnx.split_state(state, Constant, ...)
        return graphdef, trainable, constants
    trainable, frozen = nnx.split_state(state, lambda path, _: "/".join(map(str, path)) in paths, ...)
    return graphdef, trainable, frozen


def create(model: Decoder, tx: optax.GradientTransformation, seed: int) -> tuple[nnx.GraphDef[Decoder], TrainState]:
    """(graphdef, state at step 0, without a method's state). Trainable parameters become float32."""
    graphdef, trainable, frozen = divide(model)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return graphdef, TrainState(jnp.int32(0), trainable, frozen, tx.init(trainable), jax.random.key(seed))
