"""The gated delta-net, a mixer with a state of constant size (arXiv:2412.06464), as in Qwen3-Next and Qwen3.5."""

# B batch, S sequence, D model, C channels of the convolution, H key heads, R value heads of a key head, K key size,
# V value size, N value heads: H * R

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
from jaxft.nn.recurrent.delta_rule import CHUNK, DeltaInputs, delta_rule, delta_step
from jaxft.nn.recurrent.layer import Recurrent
from jaxft.nn.storage import StorageDims

LENGTH_EPS = 1e-6  # added to the squared length of queries and keys


@dataclass(frozen=True, kw_only=True)
class DeltaNetShape:
    """Sizes of one layer. taps: of the convolution. grouped: the projections are `in_proj_qkvz` and `in_proj_ba`, whose
    columns are sorted by key head, and not four projections.
    """

    width: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    grouped: bool = False

    @property
    def keys(self) -> int:
        """The width of all key heads."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """The width of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """The width of queries, keys and values, which pass the convolution."""
        return 2 * self.keys + self.values

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(value heads, key size, value size)."""
        return (self.value_heads, self.key_dim, self.value_dim)

    @property
    def state(self) -> int:
        """The numbers of a row's state."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def token_flops(self) -> int:
        """FLOPs of the rule for one token forward, projections left out; most are those of the chunk's inverse."""
        among_keys = 4 * self.keys * CHUNK
        with_state = 6 * self.state
        inverse = 4 * self.value_heads * CHUNK**2 * (CHUNK.bit_length() - 1)
        return among_keys + with_state + inverse + 4 * self.values * CHUNK


class DeltaNet(Recurrent):
    """Projections, a short convolution on queries, keys and values, the delta rule, a gated norm, output projection."""

    shape: DeltaNetShape

    def __init__(
        self, shape: DeltaNetShape, norm: NormShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        linear = functools.partial(Linear, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs, keep="dots")
        self.shape, self.dtype = shape, dtype
        channels = shape.channels
        if shape.grouped:
            self.in_proj_qkvz = linear(shape.width, channels + shape.values)
            self.in_proj_ba = linear(shape.width, 2 * shape.value_heads, in_all_linear=False)
        else:
            self.in_proj_qkv = linear(shape.width, channels)
            self.in_proj_z = linear(shape.width, shape.values)
            self.in_proj_b = linear(shape.width, shape.value_heads, in_all_linear=False)
            self.in_proj_a = linear(shape.width, shape.value_heads, in_all_linear=False)
        self.conv1d = Convolution(channels, shape.taps, stddev=stddev, param_dtype=param_dtype, rngs=rngs)
        rates_N = jax.random.uniform(rngs.params(), (shape.value_heads,), minval=0.01, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rates_N).astype(param_dtype))
        self.dt_bias = nnx.Param(jnp.ones((shape.value_heads,), param_dtype))
        self.norm = Norm(shape.value_dim, NormShape(eps=norm.eps), dtype=dtype, param_dtype=param_dtype)
        self.out_proj = linear(shape.values, shape.width, tp_side="inputs")

    def __call__(
        self, x_BSD: jax.Array, tokens: Tokens, cache: StateCache | None, layer: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, StateCache | None]:
        """(the output, the cache with these tokens). layer: this layer's index in the cache's stack. keys: four PRNG
        keys for dropout in adapters, or None.
        """
        key = (None,) * 4 if keys is None else keys
        qkv_BSC, z_BSNV, decay_BSN, rate_BSN = self._project(x_BSD, key)
        y_BSNV, cache = self.mix(qkv_BSC, (decay_BSN, rate_BSN), tokens, cache, layer)
        y_BSNV = (self.norm(y_BSNV).astype(jnp.float32) * jax.nn.silu(z_BSNV.astype(jnp.float32))).astype(self.dtype)
        y_BSX = partition.split(y_BSNV.reshape(*x_BSD.shape[:2], -1), "batch", "sequence", "tensor")
        return self.out_proj(y_BSX, key[3]), cache

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"A_log": StorageDims((None,)), "dt_bias": StorageDims((None,))}

    def _project(self, x_BSD: jax.Array, key: tuple[jax.Array | None, ...] | jax.Array) -> tuple[jax.Array, ...]:
        """Queries, keys and values side by side, the gate z by head, and what g and beta are computed from."""
        shape, where = self.shape, x_BSD.shape[:2]
        heads = (*where, shape.value_heads)
        if not shape.grouped:
            qkv_BSC, z_BSX = self.in_proj_qkv(x_BSD, key[0]), self.in_proj_z(x_BSD, key[1])
            rate_BSN, decay_BSN = self.in_proj_b(x_BSD, key[2]), self.in_proj_a(x_BSD, key[2])
            return qkv_BSC, z_BSX.reshape(*heads, -1), decay_BSN, rate_BSN
        ratio = shape.value_heads // shape.key_heads
        ends = (shape.key_dim, 2 * shape.key_dim, 2 * shape.key_dim + ratio * shape.value_dim)
        by_head = self.in_proj_qkvz(x_BSD, key[0]).reshape(*where, shape.key_heads, -1)
        q, k, v, z = (x.reshape(*where, -1) for x in jnp.split(by_head, ends, axis=-1))
        rate, decay = jnp.split(self.in_proj_ba(x_BSD, key[2]).reshape(*where, shape.key_heads, -1), 2, axis=-1)
        qkv_BSC = jnp.concatenate([q, k, v], axis=-1)
        return qkv_BSC, z.reshape(*heads, -1), decay.reshape(heads), rate.reshape(heads)

    def recurrence(
        self,
        mixed_BSC: jax.Array,
        others: tuple[jax.Array, ...],
        real_BS: jax.Array,
        documents_BS: jax.Array,
        state_BNXY: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """See Recurrent. others: what g and beta are computed from."""
        decay_BSN, rate_BSN = others
        shape = self.shape
        qkv_BSC = jax.nn.silu(mixed_BSC.astype(jnp.float32)).astype(self.dtype)
        q, k, v = jnp.split(qkv_BSC, (shape.keys, 2 * shape.keys), axis=-1)
        key_heads = shape.key_heads
        ratio = shape.value_heads // key_heads
        by_keys, by_values = (key_heads, shape.key_dim), (key_heads, ratio, shape.value_dim)
        slowing_N = jnp.exp(self.A_log.get_value().astype(jnp.float32))
        time_BSN = jax.nn.softplus(decay_BSN.astype(jnp.float32) + self.dt_bias.get_value().astype(jnp.float32))
        decay_BSN = jnp.where(real_BS[..., None], -slowing_N * time_BSN, 0)
        rate_BSN = jnp.where(real_BS[..., None], jax.nn.sigmoid(rate_BSN.astype(jnp.float32)), 0)
        where = q.shape[:2]
        inputs = DeltaInputs(
            q_BSHK=_unit(q.reshape(*where, *by_keys)) * shape.key_dim**-0.5,
            k_BSHK=_unit(k.reshape(*where, *by_keys)),
            v_BSHRV=v.reshape(*where, *by_values).astype(jnp.float32),
            decay_BSHR=decay_BSN.reshape(*where, key_heads, ratio),
            rate_BSHR=rate_BSN.reshape(*where, key_heads, ratio),
        )
        state_shape = (where[0], key_heads, ratio, shape.key_dim, shape.value_dim)
        state = jnp.zeros(state_shape, jnp.float32) if state_BNXY is None else state_BNXY.reshape(state_shape)
        precision = "highest" if jnp.dtype(self.dtype) == jnp.float32 else "default"
        if where[1] == 1:
            y, state = _over_heads(delta_step, inputs, state)
        else:
            rule = functools.partial(delta_rule, precision=precision)
            y, state = _over_heads(lambda *parts: rule(parts[0], parts[2], parts[1]), inputs, state, documents_BS)
        y_BSNV = y.reshape(*where, shape.value_heads, shape.value_dim).astype(self.dtype)
        return y_BSNV, state.reshape(where[0], shape.value_heads, shape.key_dim, shape.value_dim)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors scaled to length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + LENGTH_EPS)


def _over_heads(rule, inputs: DeltaInputs, state_BHRKV: jax.Array, *per_row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rule(inputs, state, *per_row)` on every device for its own rows and heads."""
    if not partition.is_unsharded() and inputs.q_BSHK.shape[2] % partition.shards("tensor"):
        # Too few key heads: every value head gets a copy of its own.
        inputs = _by_value_head(inputs)
        state_BHRKV = state_BHRKV.reshape(len(state_BHRKV), -1, 1, *state_BHRKV.shape[3:])
    by_heads: list[partition.Dimensions] = [("batch", None, "tensor", *(None,) * (x.ndim - 3)) for x in inputs]
    dims = (*by_heads, ("batch", "tensor", None, None, None), *(("batch", None),) * len(per_row))

    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rule(DeltaInputs(*arrays[:5]), *arrays[5:])

    return on_own_heads(run, (*inputs, state_BHRKV, *per_row), dims, outputs=(2, 5))


def _by_value_head(inputs: DeltaInputs) -> DeltaInputs:
    ratio = inputs.v_BSHRV.shape[3]
    q, k = (jnp.repeat(x, ratio, axis=2) for x in inputs[:2])
    rest = (x.reshape(*x.shape[:2], -1, 1, *x.shape[4:]) for x in inputs[2:])
    return DeltaInputs(q, k, *rest)
