"""What recurrent mixers share: a short convolution, then a recurrence, over packed rows or on from a cache."""

# B batch, S sequence, C channels of the convolution, P inputs before a row, N heads, X and Y sizes of a head's state

from abc import abstractmethod
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn.attention.cache import StateCache
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.attention.unshare import gather_back, unshare
from jaxft.nn.recurrent.convolution import Convolution


class RecurrentShape(Protocol):
    """channels, taps: of the convolution. state_shape: (N, X, Y). state: their product. token_flops: of one token
    forward, projections left out.
    """

    @property
    def channels(self) -> int: ...
    @property
    def taps(self) -> int: ...
    @property
    def state_shape(self) -> tuple[int, int, int]: ...
    @property
    def state(self) -> int: ...
    @property
    def token_flops(self) -> int: ...


class Recurrent(nnx.Module):
    """A mixer whose state has the same size however long a row is."""

    shape: RecurrentShape
    dtype: jnp.dtype
    conv1d: Convolution

    @abstractmethod
    def recurrence(
        self,
        mixed_BSC: jax.Array,
        others: tuple[jax.Array, ...],
        real_BS: jax.Array,
        documents_BS: jax.Array,
        state_BNXY: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """(the outputs [B, S, N, ...], the state after the last token).

        mixed_BSC: what came from the convolution. others: projections that do not pass it. real_BS: False at padding,
        which must change no state. documents_BS: the number of each position's document, ascending. state_BNXY: before
        the first position; None for zeros.
        """

    def mix(
        self, mixed_BSC: jax.Array, others: tuple[jax.Array, ...], tokens: Tokens, cache: StateCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, StateCache | None]:  # fmt: skip
        """(the outputs of convolution and recurrence, the cache with these tokens). layer: index in its stack."""
        segments_BS = tokens.segments_BS
        if tokens.whole is not None:  # each document passes the recurrence by itself
            mixed_BSC, *rest = (unshare(x, tokens.whole) for x in (mixed_BSC, *others))
            others, segments_BS = tuple(rest), tokens.whole.segments_BWS.reshape(mixed_BSC.shape[:2])
        real_BS = segments_BS > 0
        if cache is None:
            # Padding has the number of the document before it.
            documents_BS = jax.lax.cummax(segments_BS, axis=1)
            mixed_BSC = self.conv1d(mixed_BSC, documents_BS)
            y_BSNX, _ = self.recurrence(mixed_BSC, others, real_BS, documents_BS, None)
        else:
            mixed_BSC, inputs_BPC = self.conv1d.after(cache.inputs_RBWC[layer], mixed_BSC, real_BS)
            one_BS = jnp.ones_like(segments_BS)
            y_BSNX, state_BNXY = self.recurrence(mixed_BSC, others, real_BS, one_BS, cache.state_RBNXY[layer])
            cache = cache._replace(
                state_RBNXY=cache.state_RBNXY.at[layer].set(state_BNXY),
                inputs_RBWC=cache.inputs_RBWC.at[layer].set(inputs_BPC),
            )
        return y_BSNX if tokens.whole is None else gather_back(y_BSNX, tokens.whole), cache

    def init_cache(self, layers: int, batch: int, length: int) -> StateCache:
        """The empty cache of a stack of such layers; its size does not depend on the length of rows."""
        shape = self.shape
        state_RBNXY = jnp.zeros((layers, batch, *shape.state_shape), jnp.float32)
        inputs_RBPC = jnp.zeros((layers, batch, shape.taps - 1, shape.channels), self.dtype)
        return StateCache(state_RBNXY, inputs_RBPC, jnp.zeros(batch, jnp.int32))
