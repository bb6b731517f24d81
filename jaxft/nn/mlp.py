"""Feed-forward layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn.linear import Linear


class GatedMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (arXiv:2002.05202). x: [B, S, width]."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        use_bias: bool,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"use_bias": use_bias, "stddev": stddev, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = Linear(width, hidden, keep="dots", **options)
        self.up_proj = Linear(width, hidden, keep="dots", **options)
        self.down_proj = Linear(hidden, width, **options)

    def __call__(self, x_BSD: jax.Array, keys: jax.Array | None) -> jax.Array:
        """`keys` is three PRNG keys or None."""
        key = (None,) * 3 if keys is None else keys
        gate = jax.nn.silu(self.gate_proj(x_BSD, key[0]))
        return self.down_proj(gate * self.up_proj(x_BSD, key[1]), key[2])
