"""Cross-entropy from hidden vectors, in chunks: whole [B, S, V] logits never exist.

Each chunk's gradient is computed where its logits are, in the forward pass, so the backward pass has
only to scale it. Trained positions are gathered to the front of their rows first; chunks without any
are skipped, so a prompt costs no vocabulary products.

On a mesh either the positions of a chunk come to the devices that keep a part of the vocabulary, or the head is
gathered once and its gradient, added up over the chunks, is reduced once: what moves fewer numbers. Where the
vocabulary is split, a few numbers of each position are exchanged.
"""

# B batch, S sequence, C chunk of a sequence, J chunks, D model, V vocab or a device's part of it

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.objectives.token_loss import NLL, TokenLoss, TokenSums, sums_and_slope

Unembed = Callable[[Any, jax.Array], jax.Array]
# Bytes of float32 logits that a chunk may hold on one device: CPUs like their caches, accelerators large products.
CHUNK_BYTES = {"cpu": 64 * 2**20, "accelerator": 256 * 2**20}
LANES = 128  # what accelerators take at once
AT_MOST = "turns_at_most_"  # how `jaxft.plan` finds the turns of a loop whose end depends on data
ROWS = ("batch", "sequence")


@dataclass(frozen=True)
class Spread:
    """How the arrays of one call lie on the mesh.

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


def token_sums(
    unembed: Unembed,
    head: Any,
    hidden_BSD: jax.Array,
    targets_BS: jax.Array,
    weights_BS: jax.Array,
    *,
    stored: Sequence[tuple[partition.Dimension | None, ...]] | None = None,
    chunk: int | None = None,
    loss: TokenLoss = NLL,
) -> TokenSums:
    """Weighted sums of the loss of every target, by default its cross-entropy.

    unembed(head, hidden [B, C, D]) -> logits [B, C, V] float32. targets_BS: int32. weights_BS: float32,
    0 where a position is not trained. stored: what the dimensions of each leaf of the head are, in the order of
    jax.tree.leaves. chunk: positions of each row a chunk; by CHUNK_BYTES where None.
    `loss` is differentiable in head and hidden_BSD, and so is `nll` where it is the loss; what else is summed has no
    gradient.
    """
    # As a plain list: nnx.Variable answers for its value's attributes, which hides where a leaf begins.
    leaves, treedef = jax.tree.flatten(head)
    hidden_BSD = partition.gathered(hidden_BSD, ("batch", "stream", None), ("batch", "sequence", None))

    def unembed_leaves(leaves: list[jax.Array], hidden_BCD: jax.Array) -> jax.Array:
        return unembed(treedef.unflatten(leaves), hidden_BCD)

    vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
    spread = None if stored is None else _spread(leaves, targets_BS.shape, vocab, stored)
    return _token_sums(unembed_leaves, chunk, spread, loss, leaves, hidden_BSD, targets_BS, weights_BS)


def _spread(leaves: Sequence[jax.Array], rows: tuple[int, ...], vocab: int, stored: Sequence[Any]) -> Spread | None:
    if partition.is_unsharded() or any(
        length % partition.shards(name) for length, name in zip(rows, ROWS, strict=True)
    ):
        return None
    positions = math.prod(rows) // math.prod(partition.shards(name) for name in ROWS)
    if vocab % partition.shards("both") == 0 and positions * partition.shards("weight") <= vocab:
        # Fewer numbers travel, and no device holds more than its part, when positions come to the vocabulary.
        split, names = "both", {"tensor": "both", "weight": None, "spread": None}
    elif vocab % partition.shards("tensor") == 0:
        split, names = "tensor", {"spread": "weight"}
    else:
        split, names = None, {"tensor": None, "both": "weight", "spread": "weight"}
    lies = [tuple(names.get(name, name) for name in dimensions) for dimensions in stored]
    specs = [partition.spec(x.shape, dimensions, uneven=None) for x, dimensions in zip(leaves, lies, strict=True)]
    vocab_axes = () if split is None else partition.axes_of(split)
    shared = partition.axes_of("weight") if split == "both" else ()
    return Spread(partition.spec(rows, ROWS), tuple(specs), vocab_axes, shared)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _token_sums(unembed, chunk, spread, loss, head, hidden_BSD, targets_BS, weights_BS):
    compute = partial(_sums, unembed, chunk, spread, loss)
    if spread is not None:
        rows = (P(*spread.rows, None), spread.rows, spread.rows)
        specs = {"in_specs": (list(spread.head), *rows), "out_specs": TokenSums(P(), P(), P())}
        compute = jax.shard_map(compute, check_vma=False, **specs)
    return compute(head, hidden_BSD, targets_BS, weights_BS)


def _forward(unembed, chunk, spread, loss, head, hidden_BSD, targets_BS, weights_BS):
    # symbolic_zeros tells whether the head moves; a frozen one gets no gradient computed.
    moves = any(leaf.perturbed for leaf in head)
    head = [leaf.value for leaf in head]
    compute = partial(_sums_and_gradients, unembed, chunk, spread, loss, moves)
    if spread is not None:
        hidden, rows = P(*spread.rows, None), spread.rows
        out = (TokenSums(P(), P(), P()), list(spread.head) if moves else None, hidden)
        compute = jax.shard_map(
            compute, in_specs=(list(spread.head), hidden, rows, rows), out_specs=out, check_vma=False
        )
    sums, head_grad, grad_BSD = compute(head, hidden_BSD.value, targets_BS.value, weights_BS.value)
    return sums, (head_grad, grad_BSD)


def _backward(unembed, chunk, spread, loss, residuals, cotangents):
    asked = (cotangents.loss, cotangents.nll) if loss.plain else (cotangents.loss,)
    factor = sum((c for c in asked if not isinstance(c, SymbolicZero)), start=jnp.float32(0))
    head_grad, grad_BSD = jax.tree.map(lambda g: g * factor.astype(g.dtype), residuals)
    return head_grad, grad_BSD, None, None


_token_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _sums(unembed, chunk, spread, loss, head, hidden_BSD, targets_BS, weights_BS):
    """On one device's rows; the sums are of all."""
    head = _gathered(head, spread, hidden_BSD.dtype)
    pieces, needed, _ = _pieces(unembed, chunk, spread, head, hidden_BSD, targets_BS, weights_BS)

    def step(index, total):
        hidden_BCD, targets_BC, weights_BC = _piece(pieces, index, spread)
        sums, _ = sums_and_slope(loss, unembed(head, hidden_BCD), targets_BC, weights_BC, _vocab(spread))
        return jax.tree.map(jnp.add, total, sums)

    return _over_rows(_loop(pieces, needed, step, _nothing()), spread)


def _sums_and_gradients(unembed, chunk, spread, loss, moves, head, hidden_BSD, targets_BS, weights_BS):
    """On one device's rows: the sums of all, the gradient of its part of the head, that of its rows."""
    parts, head = head, _gathered(head, spread, hidden_BSD.dtype)
    pieces, needed, order_BS = _pieces(unembed, chunk, spread, head, hidden_BSD, targets_BS, weights_BS)

    def step(index, carry):
        total, head_grad, grads_JBCD = carry
        hidden_BCD, targets_BC, weights_BC = _piece(pieces, index, spread)
        wrt = (head, hidden_BCD) if moves else (hidden_BCD,)
        logits_BCV, pull = jax.vjp(unembed if moves else partial(unembed, head), *wrt)
        sums, slope_BCV = sums_and_slope(loss, logits_BCV, targets_BC, weights_BC, _vocab(spread))
        *part, grad_BCD = pull(slope_BCV)
        if moves:
            head_grad = jax.tree.map(lambda whole, x: whole + x.astype(whole.dtype), head_grad, part[0])
        grads_JBCD = jax.lax.dynamic_update_index_in_dim(grads_JBCD, _own_rows(grad_BCD, spread), index, 0)
        return jax.tree.map(jnp.add, total, sums), head_grad, grads_JBCD

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head) if moves else None
    total, head_grad, grads_JBCD = _loop(pieces, needed, step, (_nothing(), zero, jnp.zeros_like(pieces[0])))
    batch, length, width = hidden_BSD.shape
    grad_BSD = jnp.swapaxes(grads_JBCD, 0, 1).reshape(batch, -1, width)[:, :length]
    grad_BSD = _gather(grad_BSD, jnp.argsort(order_BS, axis=1))
    return _over_rows(total, spread), _reduced(head_grad, parts, spread), grad_BSD


def _pieces(unembed, chunk, spread, head, hidden_BSD, targets_BS, weights_BS):
    """Chunks of (hidden, targets, weights) with trained positions first, how many hold any, and the order taken."""
    if chunk is None:
        vocab = jax.eval_shape(unembed, head, hidden_BSD[:, :1]).shape[-1]
        shared = 1 if spread is None or not spread.shared else jax.lax.axis_size(spread.shared)
        room = CHUNK_BYTES["cpu" if partition.platform() == "cpu" else "accelerator"]
        chunk = room // (4 * vocab * shared * hidden_BSD.shape[0])
        chunk = chunk // LANES * LANES or chunk
    chunk = max(1, min(chunk, hidden_BSD.shape[1]))
    order_BS = jnp.argsort(weights_BS == 0, axis=1, stable=True)
    pieces = tuple(_chunks(_gather(x, order_BS), chunk) for x in (hidden_BSD, targets_BS, weights_BS))
    trained = jnp.max(jnp.sum(weights_BS != 0, axis=1))
    if spread is not None:
        # The same on every device, so that all of them come to the same exchanges.
        trained = jax.lax.pmax(trained, spread.all_axes)
    return pieces, -(-trained // chunk), order_BS


def _loop(pieces, needed, step, start):
    # The name tells who reads the compiled program how often the loop turns at most.
    with jax.named_scope(f"{AT_MOST}{len(pieces[0])}"):
        return jax.lax.fori_loop(0, needed, step, start)


def _piece(pieces, index, spread):
    """One chunk, of all rows that come to this part of the vocabulary."""
    piece = [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in pieces]
    if spread is None or not spread.shared:
        return piece
    return [jax.lax.all_gather(x, spread.shared, axis=0, tiled=True) for x in piece]


def _own_rows(grad_BCD, spread):
    """The gradient of this device's rows, from what each part of the vocabulary gives to all of them."""
    if spread is None:
        return grad_BCD
    rest = tuple(axis for axis in spread.vocab if axis not in spread.shared)
    if spread.shared:
        grad_BCD = jax.lax.psum_scatter(grad_BCD, spread.shared, scatter_dimension=0, tiled=True)
    return jax.lax.psum(grad_BCD, rest) if rest else grad_BCD


def _vocab(spread):
    return () if spread is None else spread.vocab


def _nothing():
    return TokenSums(*(jnp.float32(0) for _ in TokenSums._fields))


def _over_rows(sums, spread):
    if spread is None:
        return sums
    # Who gathered each other's rows has their sums already.
    return jax.lax.psum(sums, tuple(axis for axis in spread.row_axes if axis not in spread.shared))


def _gathered(head, spread, dtype):
    """The head that a device multiplies with, from the parts that devices store."""
    if spread is None:
        return head

    def gather(x, axes, dimension):
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)

    return [_along(x, spec, spread, dtype, gather) for x, spec in zip(head, spread.head, strict=True)]


def _reduced(head_grad, parts, spread):
    """Each device's sum over its rows, added up over all, in the head's own type, and brought to where it is stored."""
    if head_grad is None:
        return None
    if spread is None:
        return [g.astype(x.dtype) for g, x in zip(head_grad, parts, strict=True)]

    def scatter(x, axes, dimension):
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)

    out = []
    for grad, part, spec in zip(head_grad, parts, spread.head, strict=True):
        scattered = [axis for entry in spec for axis in partition.mesh_axes(entry)]
        rest = tuple(axis for axis in spread.all_axes if axis not in scattered)
        grad = _along(grad, spec, spread, part.dtype, scatter)
        out.append((jax.lax.psum(grad, rest) if rest else grad).astype(part.dtype))
    return out


def _along(x, spec, spread, dtype, exchange):
    """x after an exchange over the axes that split its dimensions, but for those that split the vocabulary."""
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > jnp.dtype(dtype).itemsize:
        x = x.astype(dtype)
    for dimension, entry in enumerate(spec):
        axes = tuple(axis for axis in partition.mesh_axes(entry) if axis not in spread.vocab)
        x = exchange(x, axes, dimension) if axes else x
    return x


def _gather(x: jax.Array, order_BS: jax.Array) -> jax.Array:
    index = order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [J, B, C, ...], padded with zeros (weight 0) at the end."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 1)
