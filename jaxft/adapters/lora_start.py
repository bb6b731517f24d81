"""What A and B of a LoRA begin with."""

# I inputs, O outputs, r rank

import math
import re
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.errors import ModelError
from jaxft.quant import dense

STARTS = ("default", "gaussian", "pissa", "olora", "loftq", "eva")
_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")
# Drawn like the default, and set where the weights are that the base was quantised from.
LOFTQ = re.compile(r"loftq(?:_niter_(\d+))?")
# Likewise, and set where the data is.
EVA = re.compile(r"eva(?:_niter_(\d+))?")


def moves_the_start(init: str) -> bool:
    """Whether A^T B is not zero in the beginning, so that something has to be subtracted."""
    return init == "olora" or _PISSA.fullmatch(init) is not None


def understood(init: str) -> bool:
    """Whether there is a start of that name."""
    return init in STARTS or any(pattern.fullmatch(init) for pattern in (_PISSA, LOFTQ, EVA))


def draw(
    init: str,
    r: int,
    scale: jax.Array | float,
    shape: tuple[int, ...],
    kernel: jax.Array | None,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A [*stack, r, I] and B [*stack, r, O] for kernels of shape [*stack, I, O].

    init: `default`, A Kaiming uniform with a = sqrt(5) and B zero; `gaussian`, A normal with deviation 1 / r;
    `pissa`, the r largest singular values and vectors of the kernel (arXiv:2404.02948); `pissa_niter_N`, nearly so, by
    N steps of subspace iteration; `olora`, its QR factors (arXiv:2406.01775). scale: of the adapter, one for each of
    the first axis of the stack or one for all; 0 for what is left out. kernel: the base's, where init reads it.
    """
    *stack, inputs, outputs = shape
    if not moves_the_start(init):
        size = (*stack, r, inputs)
        bound = 1.0 / math.sqrt(inputs)  # as PEFT draws it: variance 1 / (3 I)
        drawn = (
            jax.random.uniform(key, size, jnp.float32, -bound, bound)
            if init != "gaussian"
            else jax.random.normal(key, size, jnp.float32) / r
        )
        return drawn, jnp.zeros((*stack, r, outputs), jnp.float32)
    if kernel is None:
        raise ModelError(f"init_lora_weights={init!r} is read off a kernel, which this layer does not have")
    count = math.prod(stack)
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), stack[:1] or ())
    scales = jnp.broadcast_to(scales.reshape(*stack[:1], *(1,) * (len(stack) - 1)), tuple(stack)).reshape(count)
    find = partial(_qr, r=r) if init == "olora" else partial(_svd, r=r, steps=_PISSA.fullmatch(init)[1])
    # One kernel after the other: a decomposition takes several times the memory of what it is of.
    kernels = jax.tree.map(lambda part: part.reshape(count, *part.shape[len(stack) :]), kernel)
    given = kernels, scales, jax.random.split(key, count)
    a, b = jax.lax.map(lambda each: find(dense(each[0], jnp.float32), *each[1:]), given)
    return a.reshape(*stack, r, inputs), b.reshape(*stack, r, outputs)


def _svd(kernel_IO: jax.Array, scale: jax.Array, key: jax.Array, *, r: int, steps: str | None) -> tuple[jax.Array, ...]:
    u_Ir, s_r, v_rO = leading(kernel_IO, key, r, steps)
    root_r1 = jnp.sqrt(s_r / jnp.where(scale == 0, 1, scale))[:, None]
    return root_r1 * u_Ir.T, root_r1 * v_rO


def leading(kernel_IO: jax.Array, key: jax.Array, r: int, steps: str | None) -> tuple[jax.Array, ...]:
    """The r largest singular values [r] between their vectors, [I, r] and [r, O], float32.

    steps: of subspace iteration, which finds them nearly so; None: by a whole decomposition.
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
    # PEFT's OLoRA does not divide by the scale: what it takes from the base is `scale` times these factors.
    q_Ok, r_kI = jnp.linalg.qr(kernel_IO.T)
    return r_kI[:r], q_Ok[:, :r].T
