"""Mixture of experts: a router chooses a few feed-forward experts for each token (arXiv:1701.06538)."""

# B batch, S sequence, D model, F inner, E experts, K experts of one token, M tokens of the batch, R rows (M * K)

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.adapter import ExpertAdapter
from jaxft.nn.experts import megablox
from jaxft.nn.experts import sharded as moe_sharded
from jaxft.nn.experts.combine import combine
from jaxft.nn.experts.exchange import contiguous, over_shards
from jaxft.nn.experts.grouped import grouped, reads_stacks
from jaxft.nn.experts.router import Router, RouterShape
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.frozen import frozen_product
from jaxft.nn.linear import TPSide
from jaxft.nn.mlp import ACTIVATIONS, MLP, Activation, ClampedSwiGLU, MLPShape
from jaxft.nn.partition import Dimension, stream, whole
from jaxft.nn.storage import StorageDims
from jaxft.quant import QuantizedArray

# The dimensions of the inputs and outputs of an expert's stored kernel, by the side that the tensor axis splits.
EXPERT_SIDES: dict[TPSide, tuple[Dimension, Dimension]] = {
    "outputs": ("expert_weight", "tensor"),
    "inputs": ("tensor", "expert_weight"),
}


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """Sizes and switches of a layer of experts, each a feed-forward of `hidden` inner units.

    activation: of the gate, or of gate and up together; of up if there is no gate (`gated`). fused: gate and up are one
    `gate_up_proj`, whose columns alternate, gate first, or of which gate is the first half. use_bias: of the experts.
    shared: a dense feed-forward that every token passes too. shared_gate: whether its output is multiplied by a sigmoid
    that depends on the token.
    """

    width: int
    hidden: int
    experts: int
    router: RouterShape
    activation: Activation | ClampedSwiGLU = "silu"
    gated: bool = True
    fused: Literal["alternating", "halves"] | None = None
    use_bias: bool = False
    shared: MLPShape | None = None
    shared_gate: bool = False


class MoEOutput(NamedTuple):
    """y [..., D]; the router's logits [..., E], float32; the experts that it chose, [..., K] int32."""

    y: jax.Array
    logits: jax.Array
    experts: jax.Array


class ExpertLinear(nnx.Module):
    """One linear map for each expert. kernel: [E, I, O], an array or a QuantizedArray. bias: [E, O] or None.

    The adapter slot is that of Linear, but the call `adapter(x, y, kernel, sizes_E)` passes the number of rows of each
    expert instead of a random key. tp_side: the side that the tensor axis splits. stack: the kernels of all layers, for
    the length of a call (`read_stacks`), or None.
    """

    def __init__(
        self, experts: int, inputs: int, outputs: int, *, use_bias: bool, tp_side: TPSide = "outputs", stddev: float,
        dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        kernel_EIO = stddev * jax.random.normal(rngs.params(), (experts, inputs, outputs), param_dtype)
        self.kernel: nnx.Param[jax.Array | QuantizedArray] = nnx.Param(kernel_EIO)
        self.bias = nnx.Param(jnp.zeros((experts, outputs), param_dtype)) if use_bias else None
        self.adapter: ExpertAdapter | None = nnx.data(None)
        self.stack: megablox.Stack | None = nnx.data(None)
        self.dtype = dtype
        self.tp_side = tp_side

    def __call__(self, x: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """x: [R, I], rows sorted by expert. sizes_E: int32, the number of rows of each expert. Returns [R, O]."""
        x, kernel = x.astype(self.dtype), self.kernel.get_value()
        if isinstance(kernel, QuantizedArray):
            y = frozen_product(grouped, lambda kernel: kernel, x, kernel, sizes_E)
        elif self.stack is not None and kernel.dtype == self.dtype:
            y = megablox.product_in_stack(x, kernel, self.stack, sizes_E)
        else:
            y = grouped(x, kernel.astype(self.dtype), sizes_E)
        if self.adapter is not None:
            y = self.adapter(x, y, kernel, sizes_E)
        if self.bias is None:
            return y
        # The bias is a kernel with one input that is always 1, so that its gradient is a grouped matmul, no scatter.
        ones_R1, bias_E1O = jnp.ones((len(x), 1), self.dtype), self.bias.get_value().astype(self.dtype)[:, None]
        return y + grouped(ones_R1, bias_E1O, sizes_E)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {
            "kernel": StorageDims(("expert", *EXPERT_SIDES[self.tp_side])),
            "bias": StorageDims(("expert", "expert_both")),
        }


def stacks_of(layers: nnx.Module) -> list[jax.Array | None]:
    """The kernels of all experts of a stack of layers, [L, E, I, O], in the order of its modules.

    None for those that its layers do not read there. They have no gradient: each layer's own kernel has it.
    """
    kernels = [part.kernel.get_value() for _, part in nnx.iter_modules(layers) if isinstance(part, ExpertLinear)]
    can_read = reads_stacks()
    return [jax.lax.stop_gradient(x) if can_read and isinstance(x, jax.Array) else None for x in kernels]


def read_stacks(module: nnx.Module, stacks: Sequence[jax.Array | None], index: jax.Array) -> None:
    """Lets the experts of a layer read their kernels from those of its stack, which saves a copy of them.

    stacks: of `stacks_of`, taken outside of the loop over layers. index: the number of the layer.
    """
    parts = [part for _, part in nnx.iter_modules(module) if isinstance(part, ExpertLinear)]
    for part, kernels in zip(parts, stacks, strict=True):
        part.stack = nnx.data(None if kernels is None else megablox.Stack(kernels, index))


class SharedGate(nnx.Module):
    """`sigmoid(x @ kernel)`. kernel: [D, 1]. Not a Linear, so that no adapter is attached to it."""

    def __init__(self, width: int, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (width, 1), param_dtype))
        self.dtype = dtype

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        kernel = partition.gather(self.kernel.get_value().astype(self.dtype), ("weight", None), (None, None))
        logits_BS1 = jnp.einsum("BSD,DO->BSO", x_BSD.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return jax.nn.sigmoid(logits_BS1).astype(self.dtype)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"kernel": StorageDims(("weight", None))}


class MoE(nnx.Module):
    """The weighted sum of the chosen experts' outputs, plus that of the shared expert if there is one.

    Experts have no capacity limit, so no token is dropped. A token's result does not depend on other tokens, nor on
    padding; they only change the order of rows. Under a mesh each device works on its own rows; `experts.sharded`
    describes the communication. The shared expert is divided over devices as any dense feed-forward is.
    """

    def __init__(
        self, shape: MoEShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        options: dict[str, Any] = {"stddev": stddev, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(
            ExpertLinear, shape.experts, use_bias=shape.use_bias, stddev=stddev, dtype=dtype, param_dtype=param_dtype,
            rngs=rngs,
        )  # fmt: skip
        self.shape = shape
        self.dtype = dtype
        self.router = Router(shape.width, shape.experts, shape.router, **options)
        if shape.fused is not None:
            self.gate_up_proj = linear(shape.width, 2 * shape.hidden)
        else:
            if shape.gated:
                self.gate_proj = linear(shape.width, shape.hidden)
            self.up_proj = linear(shape.width, shape.hidden)
        self.down_proj = linear(shape.hidden, shape.width, tp_side="inputs")
        self.shared_expert: MLP | None = nnx.data(None) if shape.shared is None else MLP(shape.shared, **options)
        self.shared_expert_gate: SharedGate | None = (
            SharedGate(shape.width, **options) if shape.shared_gate else nnx.data(None)
        )

    def __call__(self, x_BSD: jax.Array, keys: jax.Array | None = None, seen_BSD: jax.Array | None = None) -> jax.Array:
        """keys: three PRNG keys for dropout in adapters of the shared expert, or None. seen_BSD: what the router sees;
        None for x_BSD.
        """
        return self._with_shared(self._routed(x_BSD, seen_BSD).y, x_BSD, keys)

    def with_router_sums(
        self,
        x_BSD: jax.Array,
        segments_BS: jax.Array,
        routing: RouterSums,
        keys: jax.Array | None = None,
        seen_BSD: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterSums]:
        """(the output, `routing` including this layer's tokens). Segment 0 is padding and is not counted."""
        routed = self._routed(x_BSD, seen_BSD)
        y_BSD = self._with_shared(routed.y, x_BSD, keys)
        return y_BSD, routing.add(routed.logits, routed.experts, segments_BS > 0)

    def _with_shared(self, y_BSD: jax.Array, x_BSD: jax.Array, keys: jax.Array | None) -> jax.Array:
        if self.shared_expert is None:
            return y_BSD
        shared_BSD = stream(self.shared_expert(whole(x_BSD), keys))
        return y_BSD + (shared_BSD if self.shared_expert_gate is None else shared_BSD * self.shared_expert_gate(x_BSD))

    def _routed(self, x_BSD: jax.Array, seen_BSD: jax.Array | None) -> MoEOutput:
        """Without the shared expert."""
        inputs_BSD = (x_BSD,) if seen_BSD is None else (x_BSD, seen_BSD)
        if not moe_sharded.divides(x_BSD.shape):
            inputs_MD = (each_BSD.reshape(-1, self.shape.width) for each_BSD in inputs_BSD)
            output = self._route_and_combine(self._combine, *inputs_MD)
            return jax.tree.map(lambda y: y.reshape(*x_BSD.shape[:2], -1), output)

        def local_output(layer: MoE, *inputs_MD: jax.Array) -> MoEOutput:
            whole = moe_sharded.expert_shards() == 1
            return layer._route_and_combine(layer._combine if whole else layer._combine_over_shards, *inputs_MD)

        return moe_sharded.on_mesh(local_output, self._without_shared(), *inputs_BSD)

    def _without_shared(self) -> "MoE":
        if self.shared_expert is None:
            return self
        routed = nnx.merge(*nnx.split(self))
        routed.shared_expert, routed.shared_expert_gate = nnx.data(None), nnx.data(None)
        return routed

    def _route_and_combine(
        self,
        combine: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        x_MD: jax.Array,
        seen_MD: jax.Array | None = None,
    ) -> MoEOutput:
        logits_ME = self.router(x_MD if seen_MD is None else seen_MD)
        weights_MK, experts_MK = self.router.route(logits_ME)
        # Saved for the backward pass. If the choice were recomputed with other rounding, a close one could fall on
        # another expert than the one whose results were saved.
        experts_MK = checkpoint_name(experts_MK, "dots")
        x_MD = x_MD.astype(self.dtype)
        if self.shape.router.on_input:
            x_MD, weights_MK = x_MD * weights_MK.astype(self.dtype), jnp.ones_like(weights_MK)
        y_MD = combine(x_MD, weights_MK, experts_MK)
        return MoEOutput(y_MD.astype(self.dtype), logits_ME, experts_MK)

    def _combine(self, x_MD: jax.Array, weights_MK: jax.Array, experts_MK: jax.Array) -> jax.Array:
        return combine(self._experts, self.shape.experts, x_MD, weights_MK, experts_MK)

    def _combine_over_shards(self, x_MD: jax.Array, weights_MK: jax.Array, experts_MK: jax.Array) -> jax.Array:
        own = self.shape.experts // moe_sharded.expert_shards()
        if not moe_sharded.exchanges():
            return moe_sharded.combine_over_shards(self._experts, own, x_MD, weights_MK, experts_MK)
        graphdef, state = nnx.split(self)
        parameters, treedef = jax.tree.flatten(state)

        def experts(parameters: Sequence[jax.Array], x_WD: jax.Array, sizes: jax.Array) -> jax.Array:
            layer = nnx.merge(graphdef, jax.tree.unflatten(treedef, parameters))
            return layer._experts(x_WD, sizes)

        most = len(x_MD) * min(experts_MK.shape[1], own)
        answers = functools.partial(over_shards, experts, parameters, most=most)
        y_MD = combine(answers, self.shape.experts, contiguous(x_MD), weights_MK, experts_MK)
        return y_MD.reshape(x_MD.shape)

    def _experts(self, x_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        if not self.shape.gated:
            up_RF = checkpoint_name(self.up_proj(x_RD, sizes_E), "dots")
            return self.down_proj(_activated(self.shape.activation, up_RF), sizes_E)
        if self.shape.fused is not None:
            both_R2F = checkpoint_name(self.gate_up_proj(x_RD, sizes_E), "dots")
            halves = jnp.split(both_R2F, 2, axis=-1)
            gate_RF, up_RF = (both_R2F[:, 0::2], both_R2F[:, 1::2]) if self.shape.fused == "alternating" else halves
        else:
            gate_RF = checkpoint_name(self.gate_proj(x_RD, sizes_E), "dots")
            up_RF = checkpoint_name(self.up_proj(x_RD, sizes_E), "dots")
        return self.down_proj(_activated(self.shape.activation, gate_RF, up_RF), sizes_E)


def _activated(activation: Activation | ClampedSwiGLU, gate_RF: jax.Array, up_RF: jax.Array | None = None) -> jax.Array:
    """An expert's inner values. up_RF: None if it has no gate, and the first array is up."""
    if not isinstance(activation, str):
        if up_RF is None:
            raise ModelError("the clamped SwiGLU needs a gate")
        return activation(gate_RF, up_RF)
    active_RF = ACTIVATIONS[activation](gate_RF)
    return active_RF if up_RF is None else active_RF * up_RF
