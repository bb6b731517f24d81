"""Mixture of experts: a router chooses a few feed-forward experts for each token (arXiv:1701.06538)."""

# B batch, S sequence, D model, F inner, E experts, K experts of one token, M tokens of the batch, R rows (M * K)

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn.adapter import ExpertAdapter
from jaxft.nn.experts import sharded as moe_sharded
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.frozen import frozen_product
from jaxft.nn.linear import TPSide
from jaxft.nn.mlp import ACTIVATIONS, Activation, ClampedSwiGLU
from jaxft.nn.partition import Dimension
from jaxft.nn.storage import StorageDims
from jaxft.quant import QuantizedArray

# The dimensions of the inputs and outputs of an expert's stored kernel, by the side that the tensor axis splits.
EXPERT_SIDES: dict[TPSide, tuple[Dimension, Dimension]] = {
    "outputs": ("expert_weight", "tensor"),
    "inputs": ("tensor", "expert_weight"),
}


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """Sizes and switches of a layer of experts, each a gated feed-forward of `hidden` inner units.

    chosen: the number of experts of each token. renormalize: whether the chosen probabilities are scaled to sum to one,
    which makes them the softmax over the chosen logits alone. activation: of the gate, or of gate and up together.
    fused: gate and up are one `gate_up_proj` whose columns alternate, gate first. use_bias: of router and experts.
    """

    width: int
    hidden: int
    experts: int
    chosen: int
    renormalize: bool
    activation: Activation | ClampedSwiGLU = "silu"
    fused: bool = False
    use_bias: bool = False


class Routes(NamedTuple):
    """The chosen experts of each token, best first: experts_MK int32; weights_MK float32, weights of their outputs."""

    weights_MK: jax.Array
    experts_MK: jax.Array


def route(logits_ME: jax.Array, shape: MoEShape) -> Routes:
    """The most probable experts of each token; probabilities are the softmax over all experts."""
    weights_MK, experts_MK = jax.lax.top_k(jax.nn.softmax(logits_ME, axis=-1), shape.chosen)
    if shape.renormalize:
        weights_MK = weights_MK / weights_MK.sum(axis=-1, keepdims=True)
    return Routes(weights_MK, experts_MK)


class MoEOutput(NamedTuple):
    """y [..., D]; the router's logits [..., E], float32; the experts that it chose, [..., K] int32."""

    y: jax.Array
    logits: jax.Array
    experts: jax.Array


class Router(nnx.Module):
    """Logits `x @ kernel (+ bias)`, float32 for every compute dtype, so that rounding does not decide a close choice.

    kernel: [D, E]. Not a Linear, so that no adapter is attached to it.
    """

    def __init__(
        self, shape: MoEShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        size = (shape.width, shape.experts)
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), size, param_dtype))
        self.bias = nnx.Param(jnp.zeros((shape.experts,), param_dtype)) if shape.use_bias else None
        self.dtype = dtype

    def __call__(self, x_MD: jax.Array) -> jax.Array:
        kernel = self.kernel.get_value().astype(self.dtype)
        logits_ME = jnp.einsum("MD,DE->ME", x_MD.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return logits_ME if self.bias is None else logits_ME + self.bias.get_value().astype(jnp.float32)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"kernel": StorageDims(("weight", None)), "bias": StorageDims((None,))}


class ExpertLinear(nnx.Module):
    """One linear map for each expert. kernel: [E, I, O], an array or a QuantizedArray. bias: [E, O] or None.

    The adapter slot is that of Linear, but the call `adapter(x, y, kernel, sizes_E)` passes the number of rows of each
    expert instead of a random key. tp_side: the side that the tensor axis splits.
    """

    def __init__(
        self, experts: int, inputs: int, outputs: int, *, use_bias: bool, tp_side: TPSide = "outputs", stddev: float,
        dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        kernel_EIO = stddev * jax.random.normal(rngs.params(), (experts, inputs, outputs), param_dtype)
        self.kernel: nnx.Param[jax.Array | QuantizedArray] = nnx.Param(kernel_EIO)
        self.bias = nnx.Param(jnp.zeros((experts, outputs), param_dtype)) if use_bias else None
        self.adapter: ExpertAdapter | None = nnx.data(None)
        self.dtype = dtype
        self.tp_side = tp_side

    def __call__(self, x: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """x: [R, I], rows sorted by expert. sizes_E: int32, the number of rows of each expert. Returns [R, O]."""
        x, kernel = x.astype(self.dtype), self.kernel.get_value()
        if isinstance(kernel, QuantizedArray):
            y = frozen_product(jax.lax.ragged_dot, lambda kernel: kernel, x, kernel, sizes_E)
        else:
            y = jax.lax.ragged_dot(x, kernel.astype(self.dtype), sizes_E)
        if self.adapter is not None:
            y = self.adapter(x, y, kernel, sizes_E)
        if self.bias is None:
            return y
        # The bias is a kernel with one input that is always 1, so that its gradient is a grouped matmul, no scatter.
        ones_R1, bias_E1O = jnp.ones((len(x), 1), self.dtype), self.bias.get_value().astype(self.dtype)[:, None]
        return y + jax.lax.ragged_dot(ones_R1, bias_E1O, sizes_E)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {
            "kernel": StorageDims(("expert", *EXPERT_SIDES[self.tp_side])),
            "bias": StorageDims(("expert", "expert_both")),
        }


class MoE(nnx.Module):
    """The weighted sum of the chosen experts' outputs. Experts have no capacity limit, so no token is dropped.

    A token's result does not depend on other tokens, nor on padding; they only change the order of rows. Under a mesh
    each device works on its own rows; `experts.sharded` describes the communication.
    """

    def __init__(
        self, shape: MoEShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        linear = functools.partial(
            ExpertLinear, shape.experts, use_bias=shape.use_bias, stddev=stddev, dtype=dtype, param_dtype=param_dtype,
            rngs=rngs,
        )  # fmt: skip
        self.shape = shape
        self.dtype = dtype
        self.router = Router(shape, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if shape.fused:
            self.gate_up_proj = linear(shape.width, 2 * shape.hidden)
        else:
            self.gate_proj = linear(shape.width, shape.hidden)
            self.up_proj = linear(shape.width, shape.hidden)
        self.down_proj = linear(shape.hidden, shape.width, tp_side="inputs")

    def __call__(self, x_BSD: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """`keys` is not used: nothing here is random."""
        return self._output(x_BSD).y

    def with_router_sums(
        self, x_BSD: jax.Array, segments_BS: jax.Array, routing: RouterSums
    ) -> tuple[jax.Array, RouterSums]:
        """(the output, `routing` including this layer's tokens). Segment 0 is padding and is not counted."""
        output = self._output(x_BSD)
        return output.y, routing.add(output.logits, output.experts, segments_BS > 0)

    def _output(self, x_BSD: jax.Array) -> MoEOutput:
        if not moe_sharded.divides(x_BSD.shape):
            output = self._route_and_combine(x_BSD.reshape(-1, self.shape.width), self._combine)
            return jax.tree.map(lambda y: y.reshape(*x_BSD.shape[:2], -1), output)
        shards = moe_sharded.expert_shards()

        def local_output(layer: MoE, x_MD: jax.Array) -> MoEOutput:
            exchange = functools.partial(moe_sharded.combine_over_shards, layer._experts, self.shape.experts // shards)
            return layer._route_and_combine(x_MD, layer._combine if shards == 1 else exchange)

        return moe_sharded.on_mesh(local_output, self, x_BSD)

    def _route_and_combine(
        self, x_MD: jax.Array, combine: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    ) -> MoEOutput:
        logits_ME = self.router(x_MD)
        weights_MK, experts_MK = route(logits_ME, self.shape)
        # Saved for the backward pass. If the choice were recomputed with other rounding, a close one could fall on
        # another expert than the one whose results were saved.
        experts_MK = checkpoint_name(experts_MK, "dots")
        y_MD = combine(x_MD.astype(self.dtype), weights_MK, experts_MK)
        return MoEOutput(y_MD.astype(self.dtype), logits_ME, experts_MK)

    def _combine(self, x_MD: jax.Array, weights_MK: jax.Array, experts_MK: jax.Array) -> jax.Array:
        experts_R = experts_MK.reshape(-1)
        order_R = jnp.argsort(experts_R, stable=True)
        sizes_E = jnp.bincount(experts_R, length=self.shape.experts).astype(jnp.int32)
        rows_RD = self._experts(x_MD[order_R // self.shape.chosen], sizes_E)
        rows_MKD = rows_RD[jnp.argsort(order_R)].reshape(*experts_MK.shape, -1)
        return jnp.einsum("MKD,MK->MD", rows_MKD.astype(jnp.float32), weights_MK)

    def _experts(self, x_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        if self.shape.fused:
            both_R2F = checkpoint_name(self.gate_up_proj(x_RD, sizes_E), "dots")
            gate_RF, up_RF = both_R2F[:, 0::2], both_R2F[:, 1::2]
        else:
            gate_RF = checkpoint_name(self.gate_proj(x_RD, sizes_E), "dots")
            up_RF = checkpoint_name(self.up_proj(x_RD, sizes_E), "dots")
        return self.down_proj(_gated(self.shape.activation, gate_RF, up_RF), sizes_E)


def _gated(activation: Activation | ClampedSwiGLU, gate: jax.Array, up: jax.Array) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up if isinstance(activation, str) else activation(gate, up)
