"""A short convolution between two gates, a mixer that looks a few positions back (LFM2, arXiv:2511.23404)."""

# B batch, S sequence, D model

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.attention.cache import StateCache
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.linear import Linear
from jaxft.nn.norm import NormShape
from jaxft.nn.recurrent.convolution import Convolution
from jaxft.nn.recurrent.layer import Recurrent


@dataclass(frozen=True, kw_only=True)
class ShortConvShape:
    """Sizes of one layer. taps: of the convolution. use_bias: of convolution and projections."""

    width: int
    taps: int = 3
    use_bias: bool = False

    @property
    def channels(self) -> int:
        """The width of what passes the convolution."""
        return self.width

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Nothing is kept but the convolution's last inputs."""
        return (1, 0, 0)

    @property
    def state(self) -> int:
        """The numbers of a row's state."""
        return 0

    @property
    def token_flops(self) -> int:
        """FLOPs of gates and convolution for one token forward, projections left out."""
        return 2 * (self.taps + 1) * self.width


class ShortConv(Recurrent):
    """Projection to B | C | x, the convolution of B x, times C, output projection."""

    shape: ShortConvShape

    def __init__(
        self, shape: ShortConvShape, norm: NormShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        linear = functools.partial(
            Linear, use_bias=shape.use_bias, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs, keep="dots"
        )
        self.shape, self.dtype = shape, dtype
        self.in_proj = linear(shape.width, 3 * shape.width)
        self.conv1d = Convolution(
            shape.width, shape.taps, use_bias=shape.use_bias, stddev=stddev, param_dtype=param_dtype, rngs=rngs
        )
        self.out_proj = linear(shape.width, shape.width, tp_side="inputs")

    def __call__(
        self, x_BSD: jax.Array, tokens: Tokens, cache: StateCache | None, layer: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, StateCache | None]:
        """(the output, the cache with these tokens). layer: this layer's index in the cache's stack. keys: four PRNG
        keys for dropout in adapters, or None.
        """
        key = (None,) * 4 if keys is None else keys
        before_BSD, after_BSD, x_BSD = jnp.split(self.in_proj(x_BSD, key[0]), 3, axis=-1)
        y_BS1D, cache = self.mix(before_BSD * x_BSD, (), tokens, cache, layer)
        y_BSD = after_BSD * y_BS1D.reshape(after_BSD.shape)
        return self.out_proj(partition.split(y_BSD, "batch", "sequence", "tensor"), key[3]), cache

    def recurrence(
        self,
        mixed_BSC: jax.Array,
        others: tuple[jax.Array, ...],
        real_BS: jax.Array,
        documents_BS: jax.Array,
        state_BNXY: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """See Recurrent: no state passes on."""
        if state_BNXY is None:
            state_BNXY = jnp.zeros((len(mixed_BSC), *self.shape.state_shape), jnp.float32)
        return mixed_BSC[:, :, None], state_BNXY
