"""Generation on hypothetical devices: the layout of the weights, the KV cache, and the programs of prefill and decode.

The layout, the cache and their shardings are those of `jaxft.generation`, made by its functions without arrays.
"""

# B slots, P prompts of a group, A answers to a prompt, S tokens of a prompt

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxft.generation import engine, steps
from jaxft.generation.buckets import bucket
from jaxft.generation.layout import layout_of
from jaxft.generation.sampling import Knobs
from jaxft.nn.decoder import Decoder
from jaxft.planning.job import ShardedStep, device_bytes
from jaxft.rollouts.size import RolloutSize
from jaxft.sharding.mesh import MeshPlan

STOPS = 8  # stop tokens that the decoding program has room for, at least


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Generation of the rollouts of a run. params: ShapeDtypeStructs with the shardings that they are decoded in.

    copied: whether they are a copy, beside the parameters of the state. step: that of the run, with the mesh on which
    answers are decoded. known: memories that were asked for, by slots and length.
    """

    step: ShardedStep
    size: RolloutSize
    graphdef: nnx.GraphDef[Decoder]
    params: nnx.State
    copied: bool
    known: dict[tuple[int, int], steps.Memory] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> NamedSharding | None:
        """The sharding of rows; None on one device."""
        return engine.row_sharding(self.params)

    @property
    def multiple(self) -> int:
        """Slots are a multiple of this number: of the devices."""
        return engine.multiple_of(self.rows)

    @property
    def row_parts(self) -> int:
        """Number of parts that rows are split into."""
        return self.step.mesh.batch_shards

    @property
    def tensor(self) -> int:
        """Number of devices that share each row."""
        return self.step.mesh.axes.get("tensor", 1)

    @property
    def length(self) -> int:
        """Tokens for which the cache of a layer without a window has room, in each row."""
        return bucket(self.size.length)

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt, with the padding that it is computed with."""
        return bucket(self.size.prompt_length)

    @cached_property
    def param_bytes(self) -> int:
        """Bytes of the parameters on one device."""
        return device_bytes(self.params)

    @property
    def read_bytes(self) -> int:
        """Bytes of the parameters on one device that a pass reads: few of the table of the layers' inputs."""
        table = self.params.get("per_layer", {}).get("embed_tokens_per_layer", {})
        return self.param_bytes - device_bytes(table)

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy of the parameters on one device."""
        return self.param_bytes if self.copied else 0

    def slots_of(self, slots: int) -> int:
        """The slots that generation has if the config asks for this many."""
        return engine.slots_of(slots, slots if self.size.keep_slots else self.size.answers, self.multiple)

    def memory_of(self, slots: int) -> steps.Memory:
        """The cache and the history of `slots` rows, as ShapeDtypeStructs with shardings."""
        return self._sharded_memory(slots, self.length)

    def cache_bytes(self, slots: int) -> int:
        """Bytes of the cache and the history on one device."""
        return device_bytes(self.memory_of(slots))

    def group(self, slots: int) -> tuple[int, int]:
        """(prompts that are prefilled together, answers to each of them that get a slot at once)."""
        answers = min(self.size.group, slots)
        return engine.group_of(slots, self.multiple, answers), answers

    def prefill_cache_bytes(self, slots: int) -> int:
        """Bytes on one device of the cache in which a group of prompts is computed."""
        prompts, _ = self.group(slots)
        each = device_bytes(self._sharded_memory(self.row_parts, self.prompt_length).cache)
        return math.ceil(prompts / self.row_parts) * each

    def _sharded_memory(self, slots: int, length: int) -> steps.Memory:
        if (slots, length) not in self.known:
            memory = jax.eval_shape(partial(self._empty, slots, length))
            rows = self.rows or self.step.mesh.batch_sharding()
            self.known[slots, length] = jax.tree.map(_sharded, memory, steps.shardings_of(memory, rows))
        return self.known[slots, length]

    def _empty(self, slots: int, length: int) -> steps.Memory:
        model = nnx.merge(self.graphdef, self.params)
        return steps.Memory(model.init_cache(slots, length), jnp.zeros((slots, model.config.vocab_size), bool))

    def lower_decode(self, slots: int) -> jax.stages.Lowered:
        """The program of a run of decoding steps."""
        integers, scalar = jax.ShapeDtypeStruct((slots,), np.int32), jax.ShapeDtypeStruct((), np.int32)
        state = steps.Rows(integers, integers, integers, _knobs(slots))  # type: ignore[arg-type]  # abstract arrays
        stops = jax.ShapeDtypeStruct((STOPS,), np.int32)
        return self._lower(steps.decode.lower, self.memory_of(slots), state, stops, scalar, scalar)

    def lower_prefill(self, slots: int) -> jax.stages.Lowered:
        """The program that computes a group of the longest prompts."""
        count, answers = self.group(slots)
        prompts = steps.Prompts(
            tokens_PS=jax.ShapeDtypeStruct((count, self.prompt_length), np.int32),  # type: ignore[arg-type]
            start=jax.ShapeDtypeStruct((), np.int32),  # type: ignore[arg-type]
            slots_PA=jax.ShapeDtypeStruct((count, answers), np.int32),  # type: ignore[arg-type]
            knobs=_knobs(count * answers),
        )
        return self._lower(steps.prefill.lower, self.memory_of(slots), None, prompts, length=self.prompt_length)

    def _lower(self, lower: Callable[..., jax.stages.Lowered], *arguments: Any, **options: Any) -> jax.stages.Lowered:
        # Without it, layers would take their forms for this machine's platform if the program is for one device.
        with jax.sharding.use_abstract_mesh(self.step.mesh.mesh.abstract_mesh):
            return lower(self.graphdef, self.params, *arguments, rows=self.rows, **options)


def decoding_of(step: ShardedStep, size: RolloutSize) -> Decoding:
    """Generation with the weights of a run, as its rollouts lay them out. Raises ConfigError if no layout fits."""
    model = nnx.merge(step.graphdef, step.state.trainable, step.state.frozen).for_length(size.length)
    layout = layout_of(model)
    graphdef, params = nnx.split(model)
    if layout is not None:
        arrays, treedef = jax.tree.flatten(params)
        sharded = [
            jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)
            for x, dtype, sharding in zip(arrays, layout.dtypes, layout.shardings, strict=True)
        ]
        params = jax.tree.unflatten(treedef, sharded)
        mesh: Mesh = layout.shardings[0].mesh  # type: ignore[assignment]  # abstract, if the step's mesh is
        step = replace(step, mesh=MeshPlan(mesh=mesh))
    return Decoding(step=step, size=size, graphdef=graphdef, params=params, copied=layout is not None)


def _sharded(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _knobs(count: int) -> Knobs:
    """The settings of `count` answers, abstract."""
    types = {"top_k_B": np.int32, "seed_B": np.uint32, "stream_B": np.uint32}
    return Knobs(*(jax.ShapeDtypeStruct((count,), types.get(name, np.float32)) for name in Knobs._fields))  # type: ignore[arg-type]
