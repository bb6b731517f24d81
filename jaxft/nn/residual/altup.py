"""AltUp (arXiv:2301.13310): a residual of several streams, of which each layer computes one and predicts the others."""

# A streams, B batch, S sequence, D model

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.linear import Linear
from jaxft.nn.norm import Norm, NormShape
from jaxft.nn.storage import StorageDims

PREFIX = "streams/"  # of the paths of `Streams`, whose names in files begin without it
PROJECTIONS, UNEMBED = "altup_projections", "altup_unembed_projections"  # the names of files
SMALL = ("modality_router", "prediction_coefs", "correction_coefs")  # matrices with A inputs or outputs
LEAST_POWER = 1e-5  # of a projected stream, before it is brought to the size of the first


@dataclass(frozen=True, kw_only=True)
class AltUpShape:
    """streams: their number A. active: the one that layers compute. scaled: whether a layer's own input is gated by the
    active stream times a learnt vector.
    """

    streams: int
    active: int = 0
    scaled: bool = True


class AltUp(nnx.Module):
    """What one layer predicts of all streams, and how its result corrects the prediction (algorithm 1 of the paper).

    Both are sums over streams with coefficients that a token chooses: `tanh(router(norm(x) / D))`, times a matrix.
    """

    def __init__(
        self,
        width: int,
        shape: AltUpShape,
        norm: NormShape,
        *,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(
            Linear, tp_side="neither", in_all_linear=False, stddev=stddev, dtype=dtype, param_dtype=param_dtype,
            rngs=rngs,
        )  # fmt: skip
        self.shape = shape
        self.router_norm = Norm(width, norm, dtype=dtype, param_dtype=param_dtype)
        self.modality_router = linear(width, shape.streams)
        self.prediction_coefs = linear(shape.streams, shape.streams**2)
        self.correction_coefs = linear(shape.streams, shape.streams)
        self.correct_output_scale = nnx.Param(jnp.zeros((width,), param_dtype))

    def predict(self, x_ABSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """The streams after the layer, as far as they follow from those before it, [A, B, S, D].

        key: of the layer, for dropout, or None.
        """
        router_key, key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 10))
        modes_BSA = self._modes(x_ABSD[self.shape.active], router_key)
        coefficients_BSX = self.prediction_coefs(modes_BSA, key).astype(jnp.float32)
        x32 = [stream.astype(jnp.float32) for stream in x_ABSD]
        count = self.shape.streams
        # Sums, not a product of matrices: the streams are as few as a matrix unit is wide.
        predicted = [
            x32[j] + sum(coefficients_BSX[..., j * count + i, None] * x32[i] for i in range(count))
            for j in range(count)
        ]
        return partition.split_stream(jnp.stack(predicted).astype(x_ABSD.dtype))

    def correct(self, predicted_ABSD: jax.Array, x_BSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """The streams after the layer, [A, B, S, D]. x_BSD: the active one, as the layer computed it. key: as above."""
        router_key, key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 11))
        coefficients_BSA = self.correction_coefs(self._modes(x_BSD, router_key), key).astype(jnp.float32) + 1
        error_BSD = x_BSD.astype(jnp.float32) - predicted_ABSD[self.shape.active].astype(jnp.float32)
        added_ABSD = jnp.moveaxis(coefficients_BSA, -1, 0)[..., None] * error_BSD
        return partition.split_stream((predicted_ABSD.astype(jnp.float32) + added_ABSD).astype(predicted_ABSD.dtype))

    def gate_input(self, x_ABSD: jax.Array) -> jax.Array:
        """The stream by which the layer's own input is gated, [B, S, D]."""
        x_BSD = x_ABSD[self.shape.active]
        if not self.shape.scaled:
            return x_BSD
        scale = partition.gather(self.correct_output_scale.get_value(), ("weight",), (None,)).astype(jnp.float32)
        return (x_BSD.astype(jnp.float32) * scale).astype(x_BSD.dtype)

    def _modes(self, x_BSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """What the coefficients are computed from, [B, S, A], between -1 and 1."""
        normed_BSD = self.router_norm(x_BSD)
        routed_BSA = self.modality_router((normed_BSD.astype(jnp.float32) / x_BSD.shape[-1]).astype(x_BSD.dtype), key)
        return jnp.tanh(routed_BSA.astype(jnp.float32)).astype(x_BSD.dtype)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"correct_output_scale": StorageDims(("weight",))}


class Streams(nnx.Module):
    """Makes the streams of the embedded tokens, and the last hidden vectors of the streams: projections of equal size.

    Each projection is brought to the first stream's root mean square. Files have these names.
    """

    def __init__(
        self,
        width: int,
        count: int,
        *,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(Linear, width, width, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.count = count
        self.altup_projections = nnx.List([linear() for _ in range(count - 1)])
        self.altup_unembed_projections = nnx.List([linear() for _ in range(count - 1)])

    def expand(self, x_BSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """[A, B, S, D]: the embedded tokens and their projections. key: turns dropout on."""
        keys, whole_BSD = self._keys(PROJECTIONS, key), partition.whole(x_BSD)
        projected = [layer(whole_BSD, each) for layer, each in zip(self.altup_projections, keys, strict=True)]
        return partition.split_stream(jnp.stack([x_BSD, *_as_large_as(x_BSD, projected)]))

    def combine(self, x_ABSD: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, S, D]: the mean of the first stream and of the others' projections. key: turns dropout on."""
        keys = self._keys(UNEMBED, key)
        layers = zip(self.altup_unembed_projections, x_ABSD[1:], keys, strict=True)
        projected = [layer(partition.whole(stream), each) for layer, stream, each in layers]
        streams = jnp.stack([x_ABSD[0], *_as_large_as(x_ABSD[0], projected)]).astype(jnp.float32)
        return partition.split_stream(jnp.mean(streams, axis=0).astype(x_ABSD.dtype))

    def _keys(self, name: str, key: jax.Array | None) -> Sequence[jax.Array | None]:
        if key is None:
            return (None,) * (self.count - 1)
        return list(jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), self.count - 1))


def _as_large_as(x_BSD: jax.Array, others: Sequence[jax.Array]) -> list[jax.Array]:
    """The others, each token's vector with the root mean square of that of x_BSD."""
    # Padding may be zeros alone, where the root has no gradient.
    size_BS1 = jnp.sqrt(jnp.maximum(_power(x_BSD), jnp.finfo(jnp.float32).tiny))
    scaled = []
    for other in map(partition.split_stream, others):
        factor_BS1 = size_BS1 / jnp.sqrt(jnp.maximum(_power(other), LEAST_POWER))
        scaled.append((other.astype(jnp.float32) * factor_BS1).astype(other.dtype))
    return scaled


def _power(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
