"""LoRA by row: each row of a batch has an adapter of its own, or none.

The halves of all adapters are stacked in the slots of the base's layers, and each row takes those with its number, as
Punica (arXiv:2310.18547) does. So rows of several tuned models share one pass of the base.
"""

# B rows, S positions, N adapters, I inputs, O outputs, r rank

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike

from jaxft.adapters.attach import ALL_LINEAR, adapters, find, virtual_modules
from jaxft.adapters.lora.low_rank import WHOLE, LoRA
from jaxft.adapters.named import AdapterModules
from jaxft.errors import ConfigError, ModelError, listed
from jaxft.nn.adapter import Adapter, LayerAdapter, RowNumbers
from jaxft.nn.decoder import Decoder
from jaxft.nn.linear import Linear, TPSide
from jaxft.nn.storage import StorageDims
from jaxft.sharding.arrays import to_host

BASE = 0  # the number of rows without an adapter
STACKED = "layers/"  # paths of layers that know the numbers of rows
# A [*stack, r, I] and scale * B [*stack, r, O] by the path of their layer.
Halves = Mapping[str, tuple[jax.Array, jax.Array]]


class RowParam(nnx.Param):
    """Halves of the adapters of all rows. They are frozen."""


class RowLoRA(Adapter):
    """`y + x A^T B` with the halves of each row's own adapter.

    a: [*stack, N, r, I], b: [*stack, N, r, O], in the type of computation. The scale of an adapter is a factor of its
    B, and ranks below r are filled with zeros. Those of number 0 are zeros, for rows of the base. shared: the number
    of each row's adapter, [B] int32, below N.
    """

    peft_type = "LORA"
    stacks = False

    def __init__(
        self, inputs: int, outputs: int, *, stack: tuple[int, ...], count: int, r: int, dtype: DTypeLike, side: TPSide
    ) -> None:
        """count: N."""
        super().__init__()
        self.a = RowParam(jnp.zeros((*stack, count, r, inputs), dtype))
        self.b = RowParam(jnp.zeros((*stack, count, r, outputs), dtype))
        self.tp_side = side

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, key: jax.Array | None) -> jax.Array:
        """x: [B, S, I], y: [B, S, O]. Raises ModelError if rows have no numbers, or x is of another form."""
        if self.shared is None:
            raise ModelError("adapters by row need the number of each row's adapter: generate with a resident engine")
        if x.ndim != 3 or x.shape[0] != self.shared.shape[0]:
            raise ModelError(
                f"a layer has inputs of shape {x.shape}, which are not {self.shared.shape[0]} rows: this family of "
                "models takes no adapters by row. Serve each adapter alone."
            )
        # The halves of eight rows may be more than the whole base: rows of the base alone read none.
        return jax.lax.cond(jnp.any(self.shared != BASE), self._added, lambda x, y, _: y, x, y, self.shared)

    def _added(self, x: jax.Array, y: jax.Array, numbers_B: jax.Array) -> jax.Array:
        a_BrI, b_BrO = (
            half.get_value().at[numbers_B].get(mode="clip", wrap_negative_indices=False) for half in (self.a, self.b)
        )
        low_BSr = jnp.einsum("BSI,BrI->BSr", x, a_BrI)
        return y + jnp.einsum("BSr,BrO->BSO", low_BSr, b_BrO)

    def storage_dims(self) -> dict[str, StorageDims]:
        """The side that the tensor axis splits is split as in the layer; the other is whole on every device."""
        return {
            "a": StorageDims((None, *WHOLE[self.tp_side == "inputs"]), may_be_whole=True),
            "b": StorageDims((None, *WHOLE[self.tp_side == "outputs"]), may_be_whole=True),
        }


def attach_rows(
    model: Decoder, *, count: int, max_rank: int, targets: Sequence[str] = (ALL_LINEAR,)
) -> tuple[str, ...]:
    """Makes room for `count` adapters beside the base, of ranks up to `max_rank`, and returns the layers' paths.

    targets: the layers that adapters may have, as for `find`; only layers of the stacks get room. Raises ConfigError
    for a count or a rank below 1; ModelError for a target that matches no layer, for a model that has an adapter
    already, and for a family whose layers have other inputs than rows.
    """
    if count < 1 or max_rank < 1:
        raise ConfigError(f"room for {count} adapters of rank {max_rank}: both must be at least 1")
    if adapters(model) or virtual_modules(model) or model.token_rows is not None:
        raise ModelError("the model has an adapter already: load the base alone to serve adapters by row")
    chosen = {path: layer for path, layer in find(model, targets).items() if path.startswith(STACKED)}
    for layer in chosen.values():
        if isinstance(layer, Linear):
            *stack, inputs, outputs = layer.kernel.get_value().shape
            layer.adapter = RowLoRA(
                inputs, outputs, stack=tuple(stack), count=count + 1, r=min(max_rank, inputs, outputs),
                dtype=layer.dtype, side=layer.tp_side,
            )  # fmt: skip
    _check_inputs(model)
    return tuple(chosen)


def row_bytes(model: Decoder) -> int:
    """Bytes of the halves of all adapters, over all devices. The model may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, RowParam)))


def halves_of(modules: AdapterModules) -> Halves:
    """The halves of an adapter, scaled.

    Raises ModelError for an adapter that is no plain LoRA on linear layers, and names its kind.
    """
    if modules.virtual_tokens or modules.virtual:
        raise not_by_row("virtual tokens")
    out = {}
    for path, adapter in modules.layers.items():
        if type(adapter) is not LoRA:
            raise not_by_row(f"{_kind(adapter)} on {path}")
        if adapter.adds_bias:
            raise not_by_row(f"LoRA with a bias (lora_bias) on {path}")
        out[path] = adapter.scaled_halves()
    return out


def not_by_row(what: str) -> ModelError:
    """The error for an adapter that is something else. what: its kind."""
    return ModelError(f"the adapter is {what}; by row, adapters are plain LoRA on linear layers. Serve it alone.")


def write_halves(model: Decoder, number: int, halves: Halves) -> None:
    """Gives the number to an adapter; whatever had it before is gone. The model's arrays are updated in place.

    Raises ModelError for halves that have no room: of a layer without, or of a higher rank.
    """
    layers = {path: adapter for path, adapter in adapters(model).items() if isinstance(adapter, RowLoRA)}
    missing = [path for path in halves if path not in layers]
    if missing or not halves:
        raise ModelError(
            f"the adapter is on {listed(missing, 3) or 'no layer'}; by row, adapters are on linear layers inside the "
            "model's layers. Serve it alone."
        )
    params = [param for adapter in layers.values() for param in (adapter.a, adapter.b)]
    values = []
    for path, adapter in layers.items():
        rank = adapter.a.get_value().shape[-2]
        for half, param in zip(halves.get(path, (None, None)), (adapter.a, adapter.b), strict=True):
            values.append(_padded(half, param.get_value(), path, rank))
    write = _writer(tuple(param.get_value().sharding for param in params))
    for param, value in zip(params, write([p.get_value() for p in params], values, number), strict=True):
        param.set_value(value)


def _padded(half: jax.Array | None, stack: jax.Array, path: str, rank: int) -> npt.NDArray[np.generic]:
    """A half with zeros up to the rank of the stack [*stack, N, r, ...], without N, in its type; zeros for None."""
    value = np.zeros((*stack.shape[:-3], *stack.shape[-2:]), stack.dtype)
    if half is None:
        return value
    r = half.shape[-2]
    if r > rank:
        raise ModelError(
            f"the adapter has rank {r} on {path}, and there is room for rank {rank}: start with a higher max_rank, or "
            "serve the adapter alone"
        )
    value[..., :r, :] = to_host(half.astype(stack.dtype))
    return value


@functools.cache
def _writer(shardings: tuple[Sharding, ...]) -> Callable[[list[jax.Array], list[Any], int], list[jax.Array]]:
    """Writes values under a number into stacks of these shardings, in place."""

    def write(stacks: list[jax.Array], values: list[Any], number: int) -> list[jax.Array]:
        return [
            jax.lax.dynamic_update_index_in_dim(stack, value, number, stack.ndim - 3)
            for stack, value in zip(stacks, values, strict=True)
        ]

    # Of an array on one device JAX also notes whether it was put there: named, it would compile all users anew.
    named = [sharding if isinstance(sharding, NamedSharding) else None for sharding in shardings]
    return jax.jit(write, donate_argnums=0, out_shardings=named)


def _check_inputs(model: Decoder) -> None:
    """Raises ModelError unless every layer with room for adapters gets one row of inputs for each row."""

    graphdef, params = nnx.split(model)

    def forward(params: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, params)
        model.shared = RowNumbers(jnp.zeros(2, jnp.int32))
        return model(jnp.zeros((2, 3), jnp.int32))[0]

    jax.eval_shape(forward, params)


def _kind(adapter: LayerAdapter) -> str:
    """The name of an adapter's kind: `DoRA`."""
    name = type(adapter).__name__
    return {"EmbeddingLoRA": "LoRA of the embeddings", "ExpertLoRA": "LoRA of experts"}.get(name, name)
