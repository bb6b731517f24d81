"""Linear layers and embeddings. One optional adapter slot keeps every base parameter at its path."""

# B batch, S sequence, I inputs, O outputs, D model, V vocab

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.frozen import through
from jaxft.quant import QuantizedArray

# Which side of a kernel the tensor axis splits, and with that how it is stored and how it is multiplied with.
STORED = {"outputs": ("weight", "tensor"), "inputs": ("tensor", "weight")}
WHOLE = {"outputs": (None, "tensor"), "inputs": ("tensor", None)}
BIAS_STORED = {"outputs": ("both",), "inputs": ("weight",)}
TABLE_STORED, TABLE_WHOLE = ("tensor", "weight"), ("tensor", None)
LOOKED_UP = ("replica", None, "weight")


def product(x: jax.Array, kernel: jax.Array | QuantizedArray, tp_side: Literal["inputs", "outputs"]) -> jax.Array:
    """x [..., I] @ kernel [I, O] in the type of x; a kernel of a wider type is rounded to it before it travels.

    The gradient of a kernel comes out of the product over a device's rows, and of the sum over devices, in the kernel's
    own type: float32 where it is kept so, and where `training.step` rounded it first, the narrower one.
    """
    if isinstance(kernel, QuantizedArray):
        return through(jnp.matmul, partial(_gathered, tp_side), x, kernel)
    if kernel.dtype == x.dtype:
        return x @ partition.gathered(kernel, STORED[tp_side], WHOLE[tp_side])
    return _wide_product(x, kernel, tp_side)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_product(x: jax.Array, kernel: jax.Array, tp_side: str) -> jax.Array:
    return x @ partition.gathered(kernel.astype(x.dtype), STORED[tp_side], WHOLE[tp_side])


def _wide_forward(x: jax.Array, kernel: jax.Array, tp_side: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _wide_product(x, kernel, tp_side), (x, kernel)


def _wide_backward(
    tp_side: str, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    whole = partition.gathered(kernel.astype(x.dtype), STORED[tp_side], WHOLE[tp_side])
    grad_kernel = jnp.einsum("...i,...o->io", x, grad, preferred_element_type=kernel.dtype)
    return grad @ whole.T, partition.split(grad_kernel.astype(kernel.dtype), *STORED[tp_side])


_wide_product.defvjp(_wide_forward, _wide_backward)


def _gathered(tp_side: str, kernel: QuantizedArray) -> QuantizedArray:
    # Codes travel, not what they mean: a quarter of the bytes.
    return kernel.each(lambda part: partition.gathered(part, STORED[tp_side], WHOLE[tp_side]))


class Linear(nnx.Module):
    """`y = x @ kernel (+ bias)`, then the adapter's correction where one is attached.

    kernel: [I, O], an array or a QuantizedArray, which stays still. x: [..., I], computed in `dtype`. keep: name under
    which rematerialisation policies find the result, for layers whose result the backward pass reads. parted: the side
    that the tensor axis splits.
    Layers under a scan hold a leading stack axis in every parameter and are called on one slice of it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = False,
        keep: str | None = None,
        tp_side: Literal["inputs", "outputs"] = "outputs",
        stddev: float = 0.02,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (inputs, outputs), param_dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype)) if use_bias else None
        self.adapter = nnx.data(None)
        self.dtype = dtype
        self.keep = keep
        self.tp_side = tp_side

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        kernel = self.kernel.get_value()
        x = x.astype(self.dtype)
        if self.adapter is not None:
            x = self.adapter.enter(x)
        y = product(x, kernel, self.tp_side)
        on_product = self.adapter is not None and self.adapter.on_product
        if on_product:
            y = self.adapter(x, y, kernel, key)
        if self.bias is not None:
            bias = self.bias.get_value().astype(self.dtype)
            y = y + partition.gathered(bias, BIAS_STORED[self.tp_side], WHOLE[self.tp_side][1:])
        if self.adapter is not None and not on_product:
            y = self.adapter(x, y, kernel, key)
        return y if self.keep is None else checkpoint_name(y, self.keep)

    def stored(self) -> dict[str, tuple[partition.Dimension | None, ...]]:
        """What the dimensions of every parameter are, stack axes left out, by its path from here."""
        return _with_adapter({"kernel": STORED[self.tp_side], "bias": BIAS_STORED[self.tp_side]}, self.adapter)


class Embedding(nnx.Module):
    """A table [V, D]: rows for tokens on the way in, and, where tied, scores for tokens on the way out."""

    def __init__(
        self, vocab: int, width: int, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Param(stddev * jax.random.normal(rngs.params(), (vocab, width), param_dtype))
        self.adapter = nnx.data(None)
        self.dtype = dtype

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        # Every device looks all tokens up in its part of each row of the table, and gives on what is another's.
        x_BSD = jnp.take(self.embedding.get_value(), partition.split(tokens_BS, *LOOKED_UP[:2]), axis=0)
        x_BSD = partition.gathered(x_BSD.astype(self.dtype), LOOKED_UP, ("batch", "stream", None))
        return x_BSD if self.adapter is None else self.adapter(tokens_BS, x_BSD)

    def scores(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> logits [..., V] float32."""
        table = partition.gathered(self.embedding.get_value().astype(self.dtype), TABLE_STORED, TABLE_WHOLE)
        return jnp.einsum("...D,VD->...V", hidden.astype(self.dtype), table, preferred_element_type=jnp.float32)

    def stored(self) -> dict[str, tuple[partition.Dimension | None, ...]]:
        """What the dimensions of every parameter are, by its path from here."""
        return _with_adapter({"embedding": TABLE_STORED}, self.adapter)


def _with_adapter(
    own: dict[str, tuple[partition.Dimension | None, ...]], adapter: Any
) -> dict[str, tuple[partition.Dimension | None, ...]]:
    beside = {} if adapter is None else adapter.stored()
    return own | {f"adapter/{path}": dimensions for path, dimensions in beside.items()}
