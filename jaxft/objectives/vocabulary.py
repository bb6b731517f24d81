"""The LM head's products in chunks of positions, on one device or with the vocabulary split over a mesh.

Logits of a whole batch, [B, S, V], would be the largest array of a step. Here only a chunk of positions has logits at a
time. Trained positions are moved to the front of their rows first; chunks without any are skipped, so that a prompt
costs no vocabulary products.

On a mesh there are two ways to bring hidden vectors and head together, and the one that moves fewer numbers is taken:
either the positions of a chunk are gathered on the devices that hold a part of the vocabulary, or the head is gathered
once and its gradient, added up over the chunks, is reduced once. If the vocabulary is split, only a few numbers a
position are exchanged besides.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition

# (head, hidden [B, C, D]) -> logits [B, C, V] float32; head: any pytree, or its leaves.
Unembed = Callable[[Any, jax.Array], jax.Array]
# A chunk's (hidden_BCD, what is given about its positions, weights_BC), or all chunks of them with a leading J. What is
# given is a pytree of [B, C, ...] arrays, such as targets_BC alone.
Arrays = tuple[jax.Array, Any, jax.Array]
Dimensions = tuple[partition.Dimension | None, ...]
Carry = TypeVar("Carry")

# Bytes of float32 logits that a chunk may hold on one device: CPUs like their caches, accelerators large products.
CHUNK_BYTES = {"cpu": 64 * 2**20, "accelerator": 256 * 2**20}
LANES = 128  # what accelerators take at once
AT_MOST = "turns_at_most_"  # how `jaxft.plan` finds the turns of a loop whose end depends on data
ROWS: tuple[partition.Dimension, ...] = ("batch", "sequence")


@dataclass(frozen=True)
class VocabLayout:
    """How the arrays of one call are split over the mesh.

    rows: of [B, S] arrays. head: of every leaf. vocab: axes that split V. shared: those of them whose devices have
    other rows, and gather each other's.
    """

    rows: P
    head: tuple[P, ...]
    vocab: tuple[str, ...]
    shared: tuple[str, ...]

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axes whose devices have different positions."""
        return tuple(axis for entry in self.rows for axis in partition.mesh_axes(entry))

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Axes whose devices have different positions or another part of the vocabulary."""
        return tuple(dict.fromkeys((*self.row_axes, *self.vocab)))


class SplitHead(NamedTuple):
    """A head as the functions here take it. unembed: (leaves, hidden [B, C, D]) -> logits [B, C, V] float32."""

    unembed: Unembed
    leaves: list[jax.Array]
    layout: VocabLayout | None


def split_head(
    unembed: Unembed, head: Any, hidden_BSD: jax.Array, dimensions: Sequence[Dimensions] | None
) -> tuple[SplitHead, jax.Array]:
    """(the head and its layout for these rows; the hidden vectors split by rows alone).

    unembed: takes `head`, any pytree. dimensions: of each stored leaf of the head, in the order of jax.tree.leaves;
    None: on one device.
    """
    # As a plain list: nnx.Variable answers for its value's attributes, which hides where a leaf begins.
    leaves, treedef = jax.tree.flatten(head)
    hidden_BSD = partition.gather(hidden_BSD, ("batch", "stream", None), ("batch", "sequence", None))

    def unembed_leaves(leaves: list[jax.Array], hidden_BCD: jax.Array) -> jax.Array:
        return unembed(jax.tree.unflatten(treedef, leaves), hidden_BCD)

    vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
    layout = vocab_layout(leaves, hidden_BSD.shape[:2], vocab, dimensions)
    return SplitHead(unembed_leaves, leaves, layout), hidden_BSD


def vocab_layout(
    leaves: Sequence[jax.Array], rows: tuple[int, ...], vocab: int, dimensions: Sequence[Dimensions] | None
) -> VocabLayout | None:
    """The layout for a head on the ambient mesh; None on one device, or if rows do not divide over the mesh.

    leaves: of the head, with the dimensions of each in storage. rows: (B, S). dimensions=None: on one device.
    """
    if dimensions is None or partition.is_unsharded():
        return None
    if any(length % partition.shards(name) for length, name in zip(rows, ROWS, strict=True)):
        return None
    positions = math.prod(rows) // math.prod(partition.shards(name) for name in ROWS)
    split: partition.Dimension | None
    names: dict[partition.Dimension | None, partition.Dimension | None]
    if vocab % partition.shards("both") == 0 and positions * partition.shards("weight") <= vocab:
        # Fewer numbers are moved, and no device holds more than its part, if positions come to the vocabulary.
        split, names = "both", {"tensor": "both", "weight": None, "all_axes": None}
    elif vocab % partition.shards("tensor") == 0:
        split, names = "tensor", {"all_axes": "weight"}
    else:
        split, names = None, {"tensor": None, "both": "weight", "all_axes": "weight"}
    resting = [tuple(names.get(name, name) for name in one) for one in dimensions]
    specs = [partition.spec(x.shape, one, uneven=None) for x, one in zip(leaves, resting, strict=True)]
    vocab_axes = () if split is None else partition.axes_of(split)
    shared = partition.axes_of("weight") if split == "both" else ()
    return VocabLayout(partition.spec(rows, ROWS), tuple(specs), vocab_axes, shared)


def chunked(
    unembed: Unembed,
    chunk: int | None,
    layout: VocabLayout | None,
    head: Any,
    arrays: Arrays,
) -> tuple[Arrays, jax.Array, jax.Array]:
    """((hidden, given, weights) in chunks, trained positions first; number of chunks that hold any; inverse).

    arrays: [B, S, ...] of one device; a position is trained if any of its weights is not 0. chunk: positions of each
    row in a chunk; None: as many as CHUNK_BYTES permits. inverse: of the permutation of positions, for `unchunked`.
    """
    hidden_BSD, _, weights_BS = arrays
    if chunk is None:
        vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
        shared = 1 if layout is None or not layout.shared else jax.lax.axis_size(layout.shared)
        limit = CHUNK_BYTES["cpu" if partition.platform() == "cpu" else "accelerator"]
        chunk = limit // (4 * vocab * shared * hidden_BSD.shape[0])
        chunk = chunk // LANES * LANES or chunk
    chunk = max(1, min(chunk, hidden_BSD.shape[1]))
    trained_BS = jnp.any(jnp.reshape(weights_BS != 0, (*weights_BS.shape[:2], -1)), axis=-1)
    order_BS, inverse_BS = _trained_first(trained_BS)
    chunks = jax.tree.map(lambda x: _in_chunks(take(x, order_BS), chunk), arrays)
    trained = jnp.max(jnp.sum(trained_BS, axis=1))
    if layout is not None:
        # The same on every device, so that all of them come to the same exchanges.
        trained = jax.lax.pmax(trained, layout.all_axes)
    return chunks, -(-trained // chunk), inverse_BS


def _trained_first(trained_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a permutation of each row's positions that brings trained ones to the front; its inverse), both int32 [B, S].

    TPUs count and compare: two sorts were a twentieth of the instructions that their compiler generates code for. Other
    compilers would keep all comparisons in memory.
    """
    index_S = jnp.arange(trained_BS.shape[1], dtype=jnp.int32)
    before_BS = jnp.cumsum(trained_BS, axis=1, dtype=jnp.int32) - trained_BS
    inverse_BS = jnp.where(trained_BS, before_BS, jnp.sum(trained_BS, axis=1, keepdims=True) + index_S - before_BS)
    if partition.platform() == "tpu":
        order_BS = jnp.sum(jnp.where(inverse_BS[:, None] == index_S[:, None], index_S, 0), axis=-1)
    else:
        order_BS = jnp.argsort(~trained_BS, axis=1, stable=True)
    return order_BS, inverse_BS


def over_chunks(chunks: Arrays, count: jax.Array, body: Callable[[jax.Array, Carry], Carry], start: Carry) -> Carry:
    """`body(index, carry)` for the first `count` chunks."""
    # The name tells a reader of the compiled program how often the loop turns at most.
    with jax.named_scope(f"{AT_MOST}{len(chunks[0])}"):
        return jax.lax.fori_loop(0, count, body, start)


def chunk_at(chunks: Arrays, index: jax.Array, layout: VocabLayout | None) -> Arrays:
    """One chunk, of all rows that come to this device's part of the vocabulary."""
    here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks)
    if layout is None or not layout.shared:
        return here
    return jax.tree.map(lambda x: jax.lax.all_gather(x, layout.shared, axis=0, tiled=True), here)


def own_rows(x_BC: jax.Array, layout: VocabLayout | None) -> jax.Array:
    """This device's rows of a chunk's values that every part of the vocabulary has whole, [B, C]."""
    if layout is None or not layout.shared:
        return x_BC
    rows = x_BC.shape[0] // jax.lax.axis_size(layout.shared)
    return jax.lax.dynamic_slice_in_dim(x_BC, jax.lax.axis_index(layout.shared) * rows, rows)


def own_gradient(grad_BCD: jax.Array, layout: VocabLayout | None) -> jax.Array:
    """The gradient of this device's rows, added up over what each part of the vocabulary contributes to them."""
    if layout is None:
        return grad_BCD
    rest = tuple(axis for axis in layout.vocab if axis not in layout.shared)
    if layout.shared:
        grad_BCD = jax.lax.psum_scatter(grad_BCD, layout.shared, scatter_dimension=0, tiled=True)
    return jax.lax.psum(grad_BCD, rest) if rest else grad_BCD


def vocab_axes(layout: VocabLayout | None) -> tuple[str, ...]:
    """Axes that split the vocabulary."""
    return () if layout is None else layout.vocab


def over_rows(sums: Carry, layout: VocabLayout | None) -> Carry:
    """A pytree of sums over this device's rows, added up over all rows."""
    if layout is None:
        return sums
    # Devices that gathered each other's rows have their sums already.
    return jax.lax.psum(sums, tuple(axis for axis in layout.row_axes if axis not in layout.shared))


def gathered_head(head: list[jax.Array], layout: VocabLayout | None, dtype: jnp.dtype) -> list[jax.Array]:
    """The head that a device multiplies with, from the parts that devices store."""
    if layout is None:
        return head

    def gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)

    return [_exchanged(x, spec, layout, dtype, gather) for x, spec in zip(head, layout.head, strict=True)]


def reduced_head_gradient(
    head_grad: list[jax.Array], parts: list[jax.Array], layout: VocabLayout | None
) -> list[jax.Array]:
    """Each device's gradient, added up over all rows, in the head's own type, and split as the head is stored."""
    if layout is None:
        return [g.astype(x.dtype) for g, x in zip(head_grad, parts, strict=True)]

    def scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)

    out = []
    for grad, part, spec in zip(head_grad, parts, layout.head, strict=True):
        scattered = [axis for entry in spec for axis in partition.mesh_axes(entry)]
        rest = tuple(axis for axis in layout.all_axes if axis not in scattered)
        grad = _exchanged(grad, spec, layout, part.dtype, scatter)
        out.append((jax.lax.psum(grad, rest) if rest else grad).astype(part.dtype))
    return out


def take(x: jax.Array, order_BS: jax.Array) -> jax.Array:
    """x [B, S, ...] with the positions of each row in another order."""
    index = order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def unchunked(x_JBC: jax.Array, inverse_BS: jax.Array) -> jax.Array:
    """[J, B, C, ...] in the order of `chunked` -> [B, S, ...] in the order of positions."""
    batch, length = inverse_BS.shape
    x_BS = jnp.swapaxes(x_JBC, 0, 1).reshape(batch, -1, *x_JBC.shape[3:])[:, :length]
    return take(x_BS, inverse_BS)


def _exchanged(
    x: jax.Array,
    spec: P,
    layout: VocabLayout,
    dtype: jnp.dtype,
    exchange: Callable[[jax.Array, tuple[str, ...], int], jax.Array],
) -> jax.Array:
    """x after an exchange over the axes that split its dimensions, except those that split the vocabulary."""
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > jnp.dtype(dtype).itemsize:
        x = x.astype(dtype)
    for dimension, entry in enumerate(spec):
        axes = tuple(axis for axis in partition.mesh_axes(entry) if axis not in layout.vocab)
        x = exchange(x, axes, dimension) if axes else x
    return x


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [J, B, C, ...], padded with zeros (weight 0) at the end."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 1)
