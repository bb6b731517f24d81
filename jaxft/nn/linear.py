"""Linear layers and embeddings, with an optional adapter slot that does not change the paths of base parameters."""

# B batch, S sequence, I inputs, O outputs, D model, V vocab

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.adapter import Adapter, EmbeddingAdapter
from jaxft.nn.frozen import frozen_product, narrow_product, suits_tiles, tiled_product
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims
from jaxft.quant import QuantizedArray
from jaxft.quant.narrow import MatmulDtype

TPSide = Literal["inputs", "outputs", "neither"]  # the side of a kernel that the tensor axis splits
# The dimensions of a kernel and a bias in storage and in use, for each side.
KERNEL_DIMS: dict[TPSide, Dimensions] = {
    "outputs": ("weight", "tensor"), "inputs": ("tensor", "weight"), "neither": ("weight", None)
}  # fmt: skip
WHOLE: dict[TPSide, Dimensions] = {"outputs": (None, "tensor"), "inputs": ("tensor", None), "neither": (None, None)}
BIAS_DIMS: dict[TPSide, Dimensions] = {"outputs": ("both",), "inputs": ("weight",), "neither": ("weight",)}
TABLE_DIMS: Dimensions = ("tensor", "weight")
TABLE_WHOLE: Dimensions = ("tensor", None)
LOOKED_UP: Dimensions = ("replica", None, "weight")


def product(
    x: jax.Array, kernel: jax.Array | QuantizedArray, tp_side: TPSide, matmul_dtype: MatmulDtype | None = None
) -> jax.Array:
    """x [..., I] @ kernel [I, O] in the dtype of x; a kernel of a wider dtype is rounded to it before it is gathered.

    matmul_dtype: the type to which the operands of this product, and of that for the gradient of x, are rounded; None
    for that of x.

    The gradient of a kernel has the kernel's own dtype, both in the product over a device's rows and in the sum over
    devices: float32 if the kernel is float32, the narrower dtype if `training.step` rounded the kernel first.
    """
    layout = partial(_gather_codes, tp_side)
    if matmul_dtype is not None:
        return narrow_product(partial(product, tp_side=tp_side), layout, matmul_dtype, x, kernel)
    if isinstance(kernel, QuantizedArray):
        if suits_tiles(x, kernel):
            return tiled_product(layout, x, kernel)
        return frozen_product(jnp.matmul, layout, x, kernel)
    if kernel.dtype == x.dtype and partition.platform() == "cpu" and partition.is_unsharded():
        return _product_on_cpu(x, kernel)
    if kernel.dtype == x.dtype:
        return x @ partition.gather(kernel, KERNEL_DIMS[tp_side], WHOLE[tp_side])
    return _wide_product(x, kernel, tp_side)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_product(x: jax.Array, kernel: jax.Array, tp_side: TPSide) -> jax.Array:
    return x @ partition.gather(kernel.astype(x.dtype), KERNEL_DIMS[tp_side], WHOLE[tp_side])


def _wide_forward(x: jax.Array, kernel: jax.Array, tp_side: TPSide) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _wide_product(x, kernel, tp_side), (x, kernel)


def _wide_backward(
    tp_side: TPSide, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    whole = partition.gather(kernel.astype(x.dtype), KERNEL_DIMS[tp_side], WHOLE[tp_side])
    grad_kernel = jnp.einsum("...i,...o->io", x, grad, preferred_element_type=kernel.dtype)
    return grad @ whole.T, partition.split(grad_kernel.astype(kernel.dtype), *KERNEL_DIMS[tp_side])


_wide_product.defvjp(_wide_forward, _wide_backward)


@jax.custom_vjp
def _product_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _forward_on_cpu(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward_on_cpu(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    # One product of matrices that are in memory as they are: XLA then reads x in the order of its transpose. In JAX's
    # own form, a sum over two axes, it transposes all of grad; without the barrier, x in the code that computes it.
    x_MI, grad_MO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad @ kernel.T, jax.lax.optimization_barrier(x_MI).T @ grad_MO


_product_on_cpu.defvjp(_forward_on_cpu, _backward_on_cpu)


def _gather_codes(tp_side: TPSide, kernel: QuantizedArray) -> QuantizedArray:
    # Codes are sent, not dequantized weights: a quarter of the bytes.
    return kernel.map_arrays(lambda part: partition.gather(part, KERNEL_DIMS[tp_side], WHOLE[tp_side]))


class Linear(nnx.Module):
    """`y = x @ kernel (+ bias)`, then the adapter's correction if one is attached.

    kernel: [I, O], an array or a QuantizedArray, which is frozen. x: [..., I], computed in `dtype`. keep: name under
    which rematerialisation policies save the result, for layers whose result the backward pass reads. tp_side: the side
    that the tensor axis splits; neither for a small kernel, whose inputs it splits along positions. in_all_linear:
    whether the adapter target `all-linear` means it. matmul_dtype: see `product`; set by `nn.quantized.use_matmul`.
    Layers under a scan have a leading stack axis in every parameter and are called on one slice of it.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = False,
        keep: str | None = None,
        tp_side: TPSide = "outputs",
        in_all_linear: bool = True,
        stddev: float = 0.02,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        kernel_IO = stddev * jax.random.normal(rngs.params(), (inputs, outputs), param_dtype)
        self.kernel: nnx.Param[jax.Array | QuantizedArray] = nnx.Param(kernel_IO)
        self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype)) if use_bias else None
        self.adapter: Adapter | None = nnx.data(None)
        self.dtype = dtype
        self.keep = keep
        self.in_all_linear = in_all_linear
        self.tp_side = tp_side
        self.matmul_dtype: MatmulDtype | None = None

    def __call__(self, x: jax.Array, key: jax.Array | None = None, *, addition: jax.Array | None = None) -> jax.Array:
        """addition: what the adapter adds to the output, if that is computed already (`apply_layers`)."""
        kernel, adapter = self.kernel.get_value(), self.adapter if addition is None else None
        x = x.astype(self.dtype)
        if adapter is not None:
            x = adapter.enter(x)
        y = product(x, kernel, self.tp_side, self.matmul_dtype)
        if adapter is not None and adapter.on_product:
            y = adapter(x, y, kernel, key)
        if self.bias is not None:
            bias = self.bias.get_value().astype(self.dtype)
            y = y + partition.gather(bias, BIAS_DIMS[self.tp_side], WHOLE[self.tp_side][1:])
        if adapter is not None and not adapter.on_product:
            y = adapter(x, y, kernel, key)
        if addition is not None:
            y = y + addition
        return y if self.keep is None else checkpoint_name(y, self.keep)

    def storage_dims(self) -> dict[str, StorageDims]:
        # A small kernel is whole where its few inputs do not divide.
        fallback = (None, None) if self.tp_side == "neither" else None
        kernel = StorageDims(KERNEL_DIMS[self.tp_side], fallback)
        return {"kernel": kernel, "bias": StorageDims(BIAS_DIMS[self.tp_side])}


def apply_layers(layers: Sequence[Linear], x: jax.Array, keys: Sequence[jax.Array | None]) -> tuple[jax.Array, ...]:
    """The outputs of layers that all have the input x [..., I]. Their adapters are computed at once if they can be
    (`Adapter.additions`).
    """
    adapters = {index: layer.adapter for index, layer in enumerate(layers) if layer.adapter is not None}
    kinds = {type(adapter) for adapter in adapters.values()}
    results: Sequence[jax.Array] | None = None
    if len(adapters) > 1 and len(kinds) == 1:
        results = kinds.pop().additions(list(adapters.values()), x.astype(layers[0].dtype), [keys[i] for i in adapters])
    additions = {} if results is None else dict(zip(adapters, results, strict=True))
    return tuple(
        layer(x, key, addition=additions.get(index))
        for index, (layer, key) in enumerate(zip(layers, keys, strict=True))
    )


class Embedding(nnx.Module):
    """A table [V, D]: embeds input tokens and, if the LM head is tied to it, scores output tokens."""

    def __init__(
        self, vocab: int, width: int, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Param(stddev * jax.random.normal(rngs.params(), (vocab, width), param_dtype))
        self.adapter: EmbeddingAdapter | None = nnx.data(None)
        self.dtype = dtype

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        # Every device looks up all tokens in its part of each row of the table, then sends others their parts.
        x_BSD = jnp.take(self.embedding.get_value(), partition.split(tokens_BS, *LOOKED_UP[:2]), axis=0)
        x_BSD = partition.gather(x_BSD.astype(self.dtype), LOOKED_UP, ("batch", "stream", None))
        return x_BSD if self.adapter is None else self.adapter(tokens_BS, x_BSD)

    def scores(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> logits [..., V] float32."""
        table = partition.gather(self.embedding.get_value().astype(self.dtype), TABLE_DIMS, TABLE_WHOLE)
        return jnp.einsum("...D,VD->...V", hidden.astype(self.dtype), table, preferred_element_type=jnp.float32)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"embedding": StorageDims(TABLE_DIMS)}
