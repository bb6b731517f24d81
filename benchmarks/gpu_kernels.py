"""Kernels of `gpu_check.py` against their reference form in float32, on the numbers that the kernels get."""

# B batch, S sequence, N query heads, K kv heads, H head_dim, R rows, E experts, I inputs, O outputs

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import ConfigError
from jaxft.hardware.attached import check_matmul
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.attention.kernels import blockwise, cudnn, mosaic
from jaxft.nn.attention.score_form import PLAIN, ScoreForm
from jaxft.nn.experts.grouped import grouped
from jaxft.nn.linear import product
from jaxft.quant import FORMATS, dense
from jaxft.quant.narrow import MatmulDtype

# Of a result in bfloat16: its own rounding is 0.2 %, and that of numbers on the way to it about as much.
BOUND = 0.01
# Of operands in 8 bits, twice the error of a product of normal numbers (docs/quantization.md).
NARROW_BOUNDS: dict[MatmulDtype, float] = {"int8": 0.02, "fp8": 0.12}
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A form that the platform chooses, and its reference. Their results are compared, and the gradients of `operands`.

    fixed: the arguments after the operands.
    """

    name: str
    form: Callable[..., jax.Array]
    reference: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]
    fixed: tuple[Any, ...]
    bound: float = BOUND


def kernels(*, smoke: bool) -> Iterator[Kernel]:
    """Every kernel that a training step may take on this device, on drawn operands in bfloat16."""
    yield from _attention(smoke=smoke)
    yield from _experts(smoke=smoke)
    yield from _quantized(smoke=smoke)
    yield from _narrow(smoke=smoke)


def compared(kernel: Kernel) -> dict[str, Any]:
    """The errors of the result and of each gradient as shares of their size, the largest of them beside its bound, and
    the time of one call forward and backward.
    """
    wide = tuple(x.astype(jnp.float32) for x in kernel.operands)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(partial(_with_gradients, kernel.reference))(wide, kernel.fixed)
    form = jax.jit(partial(_with_gradients, kernel.form))
    got = jax.block_until_ready(form(kernel.operands, kernel.fixed))
    errors = [float(_error(*pair)) for pair in zip(got, expected, strict=True)]
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(form(kernel.operands, kernel.fixed))
        seconds.append(time.perf_counter() - started)
    # `not` finds NaN too.
    return {
        "kernel": kernel.name, "errors": errors, "error": max(errors), "bound": kernel.bound,
        "ok": not any(not error <= kernel.bound for error in errors), "seconds": min(seconds),
    }  # fmt: skip


def _with_gradients(
    function: Callable[..., jax.Array], operands: tuple[jax.Array, ...], fixed: tuple[Any, ...]
) -> tuple[jax.Array, ...]:
    """The result, and the gradients of a sum of it with drawn weights."""
    y, pull = jax.vjp(lambda *operands: function(*operands, *fixed), *operands)
    return y, *pull(jax.random.normal(jax.random.key(1), y.shape, jnp.bfloat16).astype(y.dtype))


def _error(got: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.linalg.norm((got.astype(jnp.float32) - expected).ravel()) / jnp.linalg.norm(expected.ravel())


def _drawn(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)


def _attention(*, smoke: bool) -> Iterator[Kernel]:
    b, s, n, k, h = (2, 32, 4, 2, 16) if smoke else (2, 2048, 32, 8, 128)
    q_BSNH, k_BSKH, v_BSKH = _drawn(0, b, s, n, h), _drawn(1, b, s, k, h), _drawn(2, b, s, k, h)
    whole_BS = jnp.ones((b, s), jnp.int32)
    packed_BS = jnp.broadcast_to(1 + jnp.arange(s) * 5 // s, (b, s)).astype(jnp.int32)
    # Documents of 1, 2, 3, ... tokens, in the other row in reverse, and padding.
    real = s - s // 16
    ragged_S = jnp.repeat(jnp.arange(1, s), jnp.arange(1, s), total_repeat_length=real)
    ragged_BS = jnp.pad(jnp.stack([ragged_S, 1 + ragged_S[-1] - ragged_S[::-1]]), ((0, 0), (0, s - real)))
    window = ScoreForm(window=s // 4)

    for name, segments_BS, score_form in (
        ("whole rows", whole_BS, PLAIN),
        ("five documents a row", packed_BS, PLAIN),
        ("many documents and padding", ragged_BS.astype(jnp.int32), PLAIN),
        ("a window and five documents", packed_BS, window),
    ):
        chosen = Kernel(
            name=f"attention, {name}",
            form=partial(causal_attention, form=score_form),
            reference=partial(blockwise.attention, form=score_form),
            operands=(q_BSNH, k_BSKH, v_BSKH),
            fixed=(segments_BS,),
        )
        yield chosen
        # What a GPU takes that has tokamax's kernels too, so that the faster one is known.
        if jax.default_backend() == "gpu" and mosaic.fits(q_BSNH, s, None, value_dim=h):
            yield replace(chosen, name=f"{chosen.name}, by cuDNN", form=partial(_by_cudnn, form=score_form))


def _by_cudnn(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BS: jax.Array, *, form: ScoreForm
) -> jax.Array:
    return cudnn.attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, segments_BS, form, None)


def _experts(*, smoke: bool) -> Iterator[Kernel]:
    rows, experts, inputs, outputs = (64, 4, 32, 48) if smoke else (8192, 32, 2048, 768)
    x_RI, kernel_EIO = _drawn(3, rows, inputs), _drawn(4, experts, inputs, outputs)
    # Uneven, and one expert without rows.
    share_E = jnp.arange(experts) / jnp.sum(jnp.arange(experts))
    ends_E = jnp.round(jnp.cumsum(share_E) * rows).astype(jnp.int32)
    sizes_E = jnp.diff(ends_E, prepend=0)

    def reference(x_RI: jax.Array, kernel_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return grouped(x_RI, kernel_EIO, sizes_E, "ragged")

    yield Kernel(
        name="products of experts",
        form=grouped,
        reference=reference,
        operands=(x_RI, kernel_EIO),
        fixed=(sizes_E,),
    )


def _quantized(*, smoke: bool) -> Iterator[Kernel]:
    rows, inputs, outputs = (16, 128, 64) if smoke else (4096, 4096, 14336)
    x_RI, weights_IO = _drawn(5, rows, inputs), _drawn(6, inputs, outputs)

    def form(x_RI: jax.Array, kernel: Any) -> jax.Array:
        return product(x_RI, kernel, "neither")

    def reference(x_RI: jax.Array, kernel: Any) -> jax.Array:
        return x_RI @ dense(kernel, jnp.float32)

    for name in ("nf4-dq",) if smoke else ("nf4-dq", "int8"):
        kernel = jax.jit(FORMATS[name].quantize)(weights_IO)
        yield Kernel(name=f"products with {name}", form=form, reference=reference, operands=(x_RI,), fixed=(kernel,))


def _narrow(*, smoke: bool) -> Iterator[Kernel]:
    rows, inputs, outputs = (16, 128, 64) if smoke else (8192, 4096, 4096)

    def form(x_RI: jax.Array, kernel_IO: jax.Array, dtype: MatmulDtype) -> jax.Array:
        return product(x_RI, kernel_IO, "neither", dtype)

    for dtype, bound in NARROW_BOUNDS.items():
        try:
            check_matmul(dtype, jax.devices()[0])
        except ConfigError:
            continue
        yield Kernel(
            name=f"products of {dtype} operands",
            form=partial(form, dtype=dtype),
            reference=jnp.matmul,
            operands=(_drawn(7, rows, inputs), _drawn(8, inputs, outputs)),
            fixed=(),
            bound=bound,
        )
