"""The initial values of A and B of a LoRA."""

# I inputs, O outputs, r rank

import math
import re
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.errors import ModelError
from jaxft.quant import QuantizedArray, dense

_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")
# Drawn like the default; set later from the weights that the base was quantized from (`checkpoint/quantized/loftq`).
LOFTQ = re.compile(r"loftq(?:_niter_(\d+))?")
# Drawn like the default; set later from data (`eva`).
EVA = re.compile(r"eva(?:_niter_(\d+))?")


def starts_nonzero(init: str) -> bool:
    """Whether the initial A^T B is not zero, so that it has to be subtracted."""
    return init == "olora" or _PISSA.fullmatch(init) is not None


def draw(
    init: str,
    r: int,
    scale: jax.Array | float,
    shape: tuple[int, ...],
    kernel: jax.Array | QuantizedArray | None,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A [*stack, r, I] and B [*stack, r, O] for kernels of shape [*stack, I, O].

    init: `default`, A Kaiming uniform with a = sqrt(5) and B zero; `gaussian`, A normal with deviation 1 / r; `pissa`,
    the r largest singular values and vectors of the kernel (arXiv:2404.02948); `pissa_niter_N`, the same, approximated
    by N steps of subspace iteration; `olora`, the kernel's QR factors (arXiv:2406.01775). scale: of the adapter, one
    for each index of the first stack axis or one for all; 0 for layers that are left out. kernel: the base's; only
    `pissa` and `olora` need it. Raises ModelError if these do not get one.
    """
    *stack, inputs, outputs = shape
    if not starts_nonzero(init):
        size = (*stack, r, inputs)
        bound = 1.0 / math.sqrt(inputs)  # as PEFT draws it: variance 1 / (3 I)
        drawn = (
            jax.random.uniform(key, size, jnp.float32, -bound, bound)
            if init != "gaussian"
            else jax.random.normal(key, size, jnp.float32) / r
        )
        return drawn, jnp.zeros((*stack, r, outputs), jnp.float32)
    if kernel is None:
        raise ModelError(f"init_lora_weights={init!r} is computed from a kernel, which this layer does not have")
    count = math.prod(stack)
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), stack[:1] or ())
    scales = jnp.broadcast_to(scales.reshape(*stack[:1], *(1,) * (len(stack) - 1)), tuple(stack)).reshape(count)
    pissa = _PISSA.fullmatch(init)
    halves = partial(_qr, r=r) if pissa is None else partial(_svd, r=r, steps=pissa[1])
    # One kernel after the other: a decomposition takes several times the memory of its kernel.
    kernels = jax.tree.map(lambda part: part.reshape(count, *part.shape[len(stack) :]), kernel)
    stacked = kernels, scales, jax.random.split(key, count)
    a, b = jax.lax.map(lambda each: halves(dense(each[0], jnp.float32), *each[1:]), stacked)
    return a.reshape(*stack, r, inputs), b.reshape(*stack, r, outputs)


def _svd(kernel_IO: jax.Array, scale: jax.Array, key: jax.Array, *, r: int, steps: str | None) -> tuple[jax.Array, ...]:
    u_Ir, s_r, v_rO = leading_singular_vectors(kernel_IO, key, r, steps)
    root_r1 = jnp.sqrt(s_r / jnp.where(scale == 0, 1, scale))[:, None]
    return root_r1 * u_Ir.T, root_r1 * v_rO


def leading_singular_vectors(
    kernel_IO: jax.Array, key: jax.Array, r: int, steps: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(left vectors [I, r], values [r], right vectors [r, O]) of the r largest singular values, float32.

    steps: number of steps of subspace iteration, an approximation; None: a full decomposition.
    """
    if steps is None:
        u, s, v = jnp.linalg.svd(kernel_IO, full_matrices=False)
        return u[:, :r], s[:r], v[:r]
    # arXiv:0909.4061, algorithm 5.1 after 4.4.
    matmul = partial(jnp.matmul, precision="highest")
    basis_Ir = jnp.linalg.qr(matmul(kernel_IO, jax.random.normal(key, (kernel_IO.shape[1], r), jnp.float32)))[0]
    for _ in range(int(steps)):
        basis_Or = jnp.linalg.qr(matmul(kernel_IO.T, basis_Ir))[0]
        basis_Ir = jnp.linalg.qr(matmul(kernel_IO, basis_Or))[0]
    u_rr, s_r, v_rO = jnp.linalg.svd(matmul(basis_Ir.T, kernel_IO), full_matrices=False)
    return matmul(basis_Ir, u_rr), s_r, v_rO


def _qr(kernel_IO: jax.Array, scale: jax.Array, key: jax.Array, *, r: int) -> tuple[jax.Array, ...]:
    # PEFT's OLoRA does not divide by the scale: it subtracts `scale` times the product of these factors from the base.
    q_Ok, r_kI = jnp.linalg.qr(kernel_IO.T)
    return r_kI[:r], q_Ok[:, :r].T
