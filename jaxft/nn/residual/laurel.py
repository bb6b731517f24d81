"""LAuReL (arXiv:2411.07501): a low-rank part of the stream that is learnt beside the residual connection."""

# B batch, S sequence, D model, R rank

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.linear import Linear
from jaxft.nn.norm import Norm, NormShape


class Laurel(nnx.Module):
    """`x + norm(right(left(x)))`, the paper's low-rank form (LAuReL-LR) with a norm. Files have these names."""

    def __init__(
        self,
        width: int,
        rank: int,
        norm: NormShape,
        *,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(Linear, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear_left = linear(width, rank, keep="dots")
        self.linear_right = linear(rank, width, tp_side="inputs")
        self.post_laurel_norm = Norm(width, norm, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x_BSD: jax.Array, whole_BSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, S, D]. whole_BSD: x_BSD with all positions of a device's rows. key: turns dropout on."""
        left_key, right_key = (None, None) if key is None else jax.random.split(key)
        low_BSR = partition.split(self.linear_left(whole_BSD, left_key), "batch", "sequence", "tensor")
        return x_BSD + self.post_laurel_norm(partition.stream(self.linear_right(low_BSR, right_key)))
