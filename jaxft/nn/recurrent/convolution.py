"""Causal depthwise convolutions over a few positions, which do not look into other documents of a packed row."""

# B batch, S sequence, C channels, W taps, P inputs before the row: W - 1

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.storage import StorageDims


class Convolution(nnx.Module):
    """y[i] = sum over w of taps[w] * x[i - (W - 1) + w] (+ bias), channel by channel.

    taps: [W, C], the last one for the position itself.
    """

    def __init__(
        self, channels: int, width: int, *, use_bias: bool = False, stddev: float, param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.taps = nnx.Param(stddev * jax.random.normal(rngs.params(), (width, channels), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype)) if use_bias else None

    def __call__(self, x_BSC: jax.Array, documents_BS: jax.Array) -> jax.Array:
        """The sums over positions of the same document. documents_BS: the number of each position's document."""
        taps_WC, length = self._whole_taps(x_BSC.dtype), x_BSC.shape[1]
        y_BSC = x_BSC * taps_WC[-1]
        for back in range(1, min(len(taps_WC), length)):
            same_BS = documents_BS[:, back:] == documents_BS[:, :-back]
            term_BSC = jnp.where(same_BS[..., None], x_BSC[:, :-back] * taps_WC[-1 - back], 0)
            y_BSC = y_BSC + jnp.pad(term_BSC, ((0, 0), (back, 0), (0, 0)))
        return self._biased(y_BSC)

    def after(self, before_BPC: jax.Array, x_BSC: jax.Array, real_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the sums, the last P inputs) for tokens that go on after others of the same document.

        before_BPC: the P inputs before them, the oldest first, zeros before the first token. real_BS: False at padding,
        which follows a row's tokens.
        """
        taps_WC, length = self._whole_taps(x_BSC.dtype), x_BSC.shape[1]
        all_BTC = jnp.concatenate([before_BPC.astype(x_BSC.dtype), x_BSC], axis=1)
        y_BSC = jnp.zeros_like(x_BSC)
        for tap in range(len(taps_WC)):
            y_BSC = y_BSC + all_BTC[:, tap : tap + length] * taps_WC[tap]
        last_BP = jnp.sum(real_BS, axis=1)[:, None] + jnp.arange(before_BPC.shape[1])
        last_BPC = jnp.take_along_axis(all_BTC, last_BP[..., None], axis=1)
        return self._biased(y_BSC), last_BPC.astype(before_BPC.dtype)

    def _whole_taps(self, dtype: jnp.dtype) -> jax.Array:
        return partition.gather(self.taps.get_value().astype(dtype), (None, "weight"), (None, None))

    def _biased(self, y_BSC: jax.Array) -> jax.Array:
        if self.bias is None:
            return y_BSC
        return y_BSC + partition.gather(self.bias.get_value().astype(y_BSC.dtype), ("weight",), (None,))

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"taps": StorageDims((None, "weight")), "bias": StorageDims(("weight",))}
