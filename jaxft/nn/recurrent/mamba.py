"""Mamba-2, a mixer with a state of constant size (arXiv:2405.21060), as in Granite 4 and Nemotron."""

# B batch, S sequence, D model, C channels of the convolution, G groups, R heads of a group, H heads, P head size,
# N state size, I inner width: H * P

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.attention.cache import StateCache
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.linear import Linear
from jaxft.nn.norm import Norm, NormShape
from jaxft.nn.recurrent.chunks import on_own_heads
from jaxft.nn.recurrent.convolution import Convolution
from jaxft.nn.recurrent.layer import Recurrent
from jaxft.nn.recurrent.state_space import CHUNK, StateSpaceInputs, state_space, state_space_step
from jaxft.nn.storage import StorageDims


@dataclass(frozen=True, kw_only=True)
class Mamba2Shape:
    """Sizes and switches of one layer.

    groups: of heads, which share how the state is written and read. state_dim: N. taps: of the convolution. shortest,
    longest: the bounds of the time step dt. use_bias: of the projections. use_conv_bias: of the convolution.
    adapt_output: whether the adapter target `all-linear` means the output projection too.
    """

    width: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    taps: int = 4
    shortest: float = 0.0
    longest: float = float("inf")
    use_bias: bool = False
    use_conv_bias: bool = True
    adapt_output: bool = True

    @property
    def inner(self) -> int:
        """The width of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """The width of what passes the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_dim

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(heads, head size, state size)."""
        return (self.heads, self.head_dim, self.state_dim)

    @property
    def state(self) -> int:
        """The numbers of a row's state."""
        return self.inner * self.state_dim

    @property
    def token_flops(self) -> int:
        """FLOPs of the recurrence for one token forward, projections left out."""
        return 2 * CHUNK * (self.groups * self.state_dim + self.inner) + 4 * self.state


class Mamba2(Recurrent):
    """Projection to z | x B C | dt, a short convolution on x B C, the recurrence, a gated norm, output projection.

    The norm follows the gate, and normalises each group of heads by itself.
    """

    shape: Mamba2Shape

    def __init__(
        self, shape: Mamba2Shape, norm: NormShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        linear = functools.partial(
            Linear, use_bias=shape.use_bias, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs, keep="dots"
        )
        self.shape, self.dtype = shape, dtype
        self.in_proj = linear(shape.width, shape.inner + shape.channels + shape.heads)
        self.conv1d = Convolution(
            shape.channels, shape.taps, use_bias=shape.use_conv_bias, stddev=stddev, param_dtype=param_dtype, rngs=rngs
        )
        self.A_log = nnx.Param(jnp.log(jnp.arange(1, shape.heads + 1, dtype=jnp.float32)).astype(param_dtype))
        self.D = nnx.Param(jnp.ones((shape.heads,), param_dtype))
        self.dt_bias = nnx.Param(jnp.ones((shape.heads,), param_dtype))
        grouped = NormShape(eps=norm.eps, groups=shape.groups)
        self.norm = Norm(shape.inner, grouped, dtype=dtype, param_dtype=param_dtype)
        self.out_proj = linear(shape.inner, shape.width, tp_side="inputs", in_all_linear=shape.adapt_output)

    def __call__(
        self, x_BSD: jax.Array, tokens: Tokens, cache: StateCache | None, layer: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, StateCache | None]:
        """(the output, the cache with these tokens). layer: this layer's index in the cache's stack. keys: four PRNG
        keys for dropout in adapters, or None.
        """
        key, shape = (None,) * 4 if keys is None else keys, self.shape
        ends = (shape.inner, shape.inner + shape.channels)
        z_BSI, mixed_BSC, time_BSH = jnp.split(self.in_proj(x_BSD, key[0]), ends, axis=-1)
        y_BSHP, cache = self.mix(mixed_BSC, (time_BSH,), tokens, cache, layer)
        y_BSI = y_BSHP.reshape(z_BSI.shape) * jax.nn.silu(z_BSI.astype(jnp.float32))
        return self.out_proj(partition.split(self.norm(y_BSI), "batch", "sequence", "tensor"), key[3]), cache

    def storage_dims(self) -> dict[str, StorageDims]:
        return {name: StorageDims((None,)) for name in ("A_log", "D", "dt_bias")}

    def recurrence(
        self,
        mixed_BSC: jax.Array,
        others: tuple[jax.Array, ...],
        real_BS: jax.Array,
        documents_BS: jax.Array,
        state_BNXY: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """See Recurrent. others: what the time steps are computed from."""
        (time_BSH,) = others
        shape, where = self.shape, mixed_BSC.shape[:2]
        mixed_BSC = jax.nn.silu(mixed_BSC.astype(jnp.float32)).astype(self.dtype).astype(jnp.float32)
        x, b, c = jnp.split(mixed_BSC, (shape.inner, shape.inner + shape.groups * shape.state_dim), axis=-1)
        x_BSHP = x.reshape(*where, shape.heads, shape.head_dim)
        time_BSH = jax.nn.softplus(time_BSH.astype(jnp.float32) + self.dt_bias.get_value().astype(jnp.float32))
        time_BSH = jnp.where(real_BS[..., None], jnp.clip(time_BSH, shape.shortest, shape.longest), 0)
        decay_BSH = -jnp.exp(self.A_log.get_value().astype(jnp.float32)) * time_BSH
        grouped, by_group = (*where, shape.groups, -1), (*where, shape.groups, shape.state_dim)
        inputs = StateSpaceInputs(
            (x_BSHP * time_BSH[..., None]).reshape(*grouped, shape.head_dim),
            decay_BSH.reshape(grouped), b.reshape(by_group), c.reshape(by_group),
        )  # fmt: skip
        state_shape = (where[0], shape.groups, shape.heads // shape.groups, shape.head_dim, shape.state_dim)
        state = jnp.zeros(state_shape, jnp.float32) if state_BNXY is None else state_BNXY.reshape(state_shape)
        y, state = self._divided(inputs, documents_BS, state)
        y_BSHP = y.reshape(x_BSHP.shape) + x_BSHP * self.D.get_value().astype(jnp.float32)[:, None]
        return y_BSHP, state.reshape(where[0], shape.heads, shape.head_dim, shape.state_dim)

    def _divided(
        self, inputs: StateSpaceInputs, documents_BS: jax.Array, state_BGRPN: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The recurrence, divided over devices by groups, or by the heads of each group if there are too few groups."""
        precision = "highest" if jnp.dtype(self.dtype) == jnp.float32 else "default"
        by_group = partition.is_unsharded() or self.shape.groups % partition.shards("tensor") == 0
        group: partition.Dimension | None = "tensor" if by_group else None
        head: partition.Dimension | None = None if by_group else "tensor"

        def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = StateSpaceInputs(*arrays[:4])
            if own.x_BSGRP.shape[1] == 1:
                return state_space_step(own, arrays[5])
            return state_space(own, arrays[4], arrays[5], precision=precision)

        dims: tuple[partition.Dimensions, ...] = (
            ("batch", None, group, head, None), ("batch", None, group, head), ("batch", None, group, None),
            ("batch", None, group, None), ("batch", None), ("batch", group, head, None, None),
        )  # fmt: skip
        return on_own_heads(run, (*inputs, documents_BS, state_BGRPN), dims, outputs=(0, 5))
