"""Products of rows, sorted by expert, with the experts' matrices."""

# R rows, E experts, I inputs, O outputs; N blocks of b rows, C blocks of one turn of the loop

import functools
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.nn import partition
from jaxft.nn.experts import megablox
from jaxft.optional import tokamax_module

# ragged: `jax.lax.ragged_dot`, for which XLA multiplies every row with every matrix. loop: a block of rows at a time.
# blocks: several at a time. megablox: JAX's kernels for TPUs. tokamax: a Triton kernel of the library of that name.
Form = Literal["ragged", "loop", "blocks", "megablox", "tokamax"]
LEAST_BLOCK, MOST_BLOCK = 16, 1024  # rows
SMALL = 2**27  # FLOPs that a CPU does in so few milliseconds that a loop, which takes longer to compile, gains nothing
# Bytes of the matrices that one turn gathers, or of their gradients, if that is more than one matrix. GPUs need several
# products at once to be busy; CPUs copy less with one.
TURN_BYTES: dict[Form, int] = {"loop": 0, "blocks": 2**26}


def grouped(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array, form: Form | None = None) -> jax.Array:
    """x [R, I] times kernel [E, I, O] -> [R, O]: the first sizes_E[0] rows with matrix 0, the next with matrix 1, ...

    Rows beyond the sum of sizes_E have undefined results and gradients. form: None for that of the platform.
    """
    form = form or form_of(partition.platform(), 2 * len(x) * kernel.size, inputs=kernel.shape[1])
    if form == "ragged":
        return jax.lax.ragged_dot(x, kernel, sizes_E)
    if form == "megablox":
        return megablox.product(x, kernel, sizes_E)
    if form == "tokamax":
        return _by_tokamax(x, kernel, sizes_E)
    return _by_blocks(TURN_BYTES[form], x, kernel, sizes_E)


def reads_stacks() -> bool:
    """Whether a layer's matrices can be read from those of all layers: not where they are gathered for each layer."""
    return partition.platform() == "tpu" and partition.is_unsharded()


def form_of(platform: str, flops: int, *, inputs: int) -> Form:
    """The form for cpu, gpu or tpu. flops: of the products of every row with every matrix. inputs: of a matrix."""
    if platform == "gpu":
        return "blocks" if _tokamax() is None else "tokamax"
    if platform == "tpu":
        return "ragged" if inputs == 1 else "megablox"  # biases have one input
    return "ragged" if flops < SMALL else "loop"


@functools.cache
def _tokamax() -> Callable[..., jax.Array] | None:
    """`ragged_dot` of tokamax, None if the library is absent or does not load with this JAX."""
    module = tokamax_module("tokamax")
    return None if module is None else module.ragged_dot


def _by_tokamax(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
    ragged_dot = _tokamax()
    if ragged_dot is not None:
        try:
            return ragged_dot(x, kernel, sizes_E, implementation="triton")
        except NotImplementedError:  # how it says that a device or a type has no kernel
            pass
    return _by_blocks(TURN_BYTES["blocks"], x, kernel, sizes_E)


class _Blocks(NamedTuple):
    """Blocks of rows of one expert each, in the order of the rows.

    experts_TC: their experts, for each turn. rows_TCb: their rows of x, R where a block is not full. positions_R: the
    position of each row among the rows of all blocks.
    """

    experts_TC: jax.Array
    rows_TCb: jax.Array
    positions_R: jax.Array


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: at most half of an expert's share, so that blocks are filled to two thirds or more."""
    size = LEAST_BLOCK
    while size < MOST_BLOCK and 4 * size * experts <= rows:
        size *= 2
    return size


def _blocks(rows: int, sizes_E: jax.Array, at_once: int) -> _Blocks:
    experts, size = len(sizes_E), block_size(rows, len(sizes_E))
    most = min(rows, (rows + experts * (size - 1)) // size)  # blocks, however rows are spread
    at_once = min(at_once, most)
    turns = -(-most // at_once)
    counts_E, starts_E = -(-sizes_E // size), jnp.cumsum(sizes_E) - sizes_E
    firsts_E = jnp.cumsum(counts_E) - counts_E
    block_N = jnp.arange(turns * at_once)
    experts_N = _group_of(block_N, counts_E)
    at_Nb = (block_N - firsts_E[experts_N])[:, None] * size + jnp.arange(size)
    rows_Nb = jnp.where(at_Nb < sizes_E[experts_N, None], starts_E[experts_N, None] + at_Nb, rows)
    row_R = jnp.arange(rows)
    experts_R = _group_of(row_R, sizes_E)
    return _Blocks(
        experts_TC=experts_N.reshape(turns, at_once),
        rows_TCb=rows_Nb.reshape(turns, at_once, size),
        positions_R=firsts_E[experts_R] * size + row_R - starts_E[experts_R],
    )


def _group_of(index: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The group of each index if the first sizes_E[0] are in group 0, and so on; the last group for those beyond."""
    return jnp.searchsorted(jnp.cumsum(sizes_E)[:-1], index, side="right", method="compare_all")


Operands = tuple[jax.Array, jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(turn_bytes: int, x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _product("cbi,cio->cbo", turn_bytes, x, kernel, sizes_E)


def _forward(turn_bytes: int, *operands: jax.Array) -> tuple[jax.Array, Operands]:
    x, kernel, sizes_E = operands
    return _by_blocks(turn_bytes, x, kernel, sizes_E), (x, kernel, sizes_E)


def _backward(turn_bytes: int, operands: Operands, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes_E = operands
    grad_x = _product("cbo,cio->cbi", turn_bytes, grad, kernel, sizes_E)
    return grad_x, _kernel_gradient(turn_bytes, x, grad, kernel, sizes_E), None


_by_blocks.defvjp(_forward, _backward)


def _product(products: str, turn_bytes: int, x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
    at_once = max(1, turn_bytes // (kernel[0].size * kernel.dtype.itemsize))
    blocks = _blocks(len(x), sizes_E, at_once)

    def turn(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        experts_C, rows_Cb = block
        return None, jnp.einsum(products, _taken(x, rows_Cb), kernel[experts_C])

    _, y = jax.lax.scan(turn, None, (blocks.experts_TC, blocks.rows_TCb))
    return _taken(y.reshape(-1, y.shape[-1]), blocks.positions_R)


def _kernel_gradient(
    turn_bytes: int, x: jax.Array, grad: jax.Array, kernel: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """The gradient of `kernel`, in its dtype: sums over the blocks of an expert, float32, without atomic additions."""
    experts = len(kernel)
    blocks = _blocks(len(x), sizes_E, max(1, turn_bytes // (kernel[0].size * 4)))
    at_once = blocks.experts_TC.shape[1]

    def turn(
        carry: tuple[jax.Array, jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        done_EIO, open_IO, opened = carry  # the sum of the last turn's last expert, which may go on
        experts_C, rows_Cb = block
        parts_CIO = jnp.einsum(
            "cbi,cbo->cio", _taken(x, rows_Cb), _taken(grad, rows_Cb), preferred_element_type=jnp.float32
        )
        parts_CIO = parts_CIO.at[0].add(jnp.where(experts_C[0] == opened, open_IO, 0))
        group_C = jnp.cumsum(jnp.diff(experts_C, prepend=experts_C[:1]) > 0)
        of_group_CC = (group_C == jnp.arange(at_once)[:, None]).astype(jnp.float32)
        sums_CIO = jnp.einsum("gc,cio->gio", of_group_CC, parts_CIO, precision=jax.lax.Precision.HIGHEST)
        # Groups that the turn does not have are out of range, and dropped.
        expert_C = (experts + jnp.arange(at_once)).at[group_C].set(experts_C)
        done_EIO = done_EIO.at[expert_C].set(sums_CIO.astype(kernel.dtype), mode="drop", unique_indices=True)
        return (done_EIO, sums_CIO[group_C[-1]], experts_C[-1]), None

    # Inside shard_map the loop's first values must differ among devices as its later ones do.
    zero = jnp.minimum(sizes_E[0], 0)
    start = jnp.zeros_like(kernel) + zero.astype(kernel.dtype), jnp.zeros(kernel.shape[1:]) + zero, zero - 1
    (gradient, _, _), _ = jax.lax.scan(turn, start, (blocks.experts_TC, blocks.rows_TCb))
    return gradient


def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
