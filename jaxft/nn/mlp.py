"""Feed-forward layers, gated or plain."""

# B batch, S sequence, D model, F inner

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.linear import Linear, apply_layers
from jaxft.nn.param_kind import Constant
from jaxft.nn.storage import StorageDims

Activation = Literal["silu", "gelu_tanh", "relu2", "xielu"]
# Those without parameters.
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
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


@jax.custom_vjp
def _with_whole_gradients(gate_BSF: jax.Array, up_BSF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """gate and up, whose gradients are arrays of their own.

    Several products read each of them. The compiler for TPUs would compute one of them anew in every product.
    """
    return gate_BSF, up_BSF


def _whole_forward(gate_BSF: jax.Array, up_BSF: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    return (gate_BSF, up_BSF), None


def _whole_backward(_: None, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    grad_gate_BSF, grad_up_BSF = jax.lax.optimization_barrier(grads)
    return grad_gate_BSF, grad_up_BSF


_with_whole_gradients.defvjp(_whole_forward, _whole_backward)


class XIELU(nnx.Module):
    """Quadratic above zero, exponential below, with a slope for each side that is learnt (arXiv:2411.13010).

    beta and eps are Constants: files hold them, and nothing trains them.
    """

    def __init__(self, *, param_dtype: jnp.dtype) -> None:
        beta, alpha = 0.5, 0.8  # the start of both slopes, arXiv:2411.13010, section 3
        self.alpha_p = nnx.Param(jnp.log(jnp.expm1(jnp.full((1,), alpha))).astype(param_dtype))
        self.alpha_n = nnx.Param(jnp.log(jnp.expm1(jnp.full((1,), alpha - beta))).astype(param_dtype))
        self.beta = Constant(jnp.asarray(beta, param_dtype))
        self.eps = Constant(jnp.asarray(-1e-6, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape and dtype, computed in float32."""
        names = (self.alpha_p, self.alpha_n, self.beta, self.eps)
        alpha_p, alpha_n, beta, eps = (value.get_value().astype(jnp.float32) for value in names)
        x32 = x.astype(jnp.float32)
        above = jax.nn.softplus(alpha_p) * jnp.square(x32)
        below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x32, eps)) - x32)
        return (jnp.where(x32 > 0, above, below) + beta * x32).astype(x.dtype)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {name: StorageDims((None,)) for name in ("alpha_p", "alpha_n")} | dict.fromkeys(
            ("beta", "eps"), StorageDims(())
        )


def above_quantile(x: jax.Array, share: float) -> jax.Array:
    """`max(x - c, 0)`, where c would be above a share of the last axis if its numbers were of a normal distribution.

    c is mean + deviation * quantile, float32. Source: statistical top-k of Spark Transformer, arXiv:2506.06644.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    # Padding may be zeros alone, where the root has no gradient.
    deviation = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))
    return jax.nn.relu(x32 - mean - deviation * statistics.NormalDist().inv_cdf(share)).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class MLPShape:
    """Sizes and switches of a feed-forward layer.

    gated: whether there is a gate. fused: gate and up are one `gate_up_proj`, gate first. sparsity: the share of the
    gate that becomes zero before the activation, by `above_quantile`; 0 for none.
    """

    width: int
    hidden: int
    activation: Activation = "silu"
    use_bias: bool = False
    fused: bool = False
    gated: bool = True
    sparsity: float = 0.0


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (arXiv:2002.05202), or `down(activation(up(x)))`. x: [B, S, width]."""

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
            if shape.gated:
                self.gate_proj = linear(shape.width, shape.hidden, keep="dots")
            self.up_proj = linear(shape.width, shape.hidden, keep="dots")
        self.down_proj = linear(shape.hidden, shape.width, tp_side="inputs")
        self.act_fn: XIELU | None = XIELU(param_dtype=param_dtype) if shape.activation == "xielu" else nnx.data(None)

    def __call__(self, x_BSD: jax.Array, keys: jax.Array | None) -> jax.Array:
        """keys: three PRNG keys for dropout in adapters, or None."""
        key = (None,) * 3 if keys is None else keys
        activation = self.act_fn or ACTIVATIONS[self.shape.activation]
        if not self.shape.gated:
            up_BSF = partition.split(self.up_proj(x_BSD, key[1]), "batch", "sequence", "tensor")
            return self.down_proj(partition.split(activation(up_BSF), "batch", "sequence", "tensor"), key[2])
        if self.shape.fused:
            gate_BSF, up_BSF = jnp.split(self.gate_up_proj(x_BSD, key[0]), 2, axis=-1)
        else:
            gate_BSF, up_BSF = apply_layers((self.gate_proj, self.up_proj), x_BSD, (key[0], key[1]))
        gate_BSF, up_BSF = (partition.split(x, "batch", "sequence", "tensor") for x in (gate_BSF, up_BSF))
        gate_BSF, up_BSF = _with_whole_gradients(gate_BSF, up_BSF)
        if self.shape.sparsity:
            gate_BSF = above_quantile(gate_BSF, self.shape.sparsity)
        return self.down_proj(partition.split(activation(gate_BSF) * up_BSF, "batch", "sequence", "tensor"), key[2])
