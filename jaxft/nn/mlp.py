"""Gated feed-forward layers."""

# B batch, S sequence, D model, F inner

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.linear import Linear

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """`gate sigmoid(alpha gate) (up + 1)`, with gate clipped to at most `limit` and up to -limit ... limit.

    Source: gpt-oss, arXiv:2508.10925, section 2.2.
    """

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """gate, up and the result have the same shape."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


@dataclass(frozen=True, kw_only=True)
class MLPShape:
    """Sizes and switches of a gated feed-forward layer. fused: gate and up are one `gate_up_proj`, gate first."""

    width: int
    hidden: int
    activation: Activation = "silu"
    use_bias: bool = False
    fused: bool = False


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (arXiv:2002.05202). x: [B, S, width]."""

    def __init__(
        self, shape: MLPShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        linear = functools.partial(
            Linear, use_bias=shape.use_bias, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.shape = shape
        if shape.fused:
            self.gate_up_proj = linear(shape.width, 2 * shape.hidden, keep="dots")
        else:
            self.gate_proj = linear(shape.width, shape.hidden, keep="dots")
            self.up_proj = linear(shape.width, shape.hidden, keep="dots")
        self.down_proj = linear(shape.hidden, shape.width, tp_side="inputs")

    def __call__(self, x_BSD: jax.Array, keys: jax.Array | None) -> jax.Array:
        """keys: three PRNG keys for dropout in adapters, or None."""
        key = (None,) * 3 if keys is None else keys
        activation = ACTIVATIONS[self.shape.activation]
        if self.shape.fused:
            gate_BSF, up_BSF = jnp.split(self.gate_up_proj(x_BSD, key[0]), 2, axis=-1)
        else:
            gate_BSF, up_BSF = self.gate_proj(x_BSD, key[0]), self.up_proj(x_BSD, key[1])
        gate_BSF, up_BSF = (partition.split(x, "batch", "sequence", "tensor") for x in (gate_BSF, up_BSF))
        return self.down_proj(partition.split(activation(gate_BSF) * up_BSF, "batch", "sequence", "tensor"), key[2])
