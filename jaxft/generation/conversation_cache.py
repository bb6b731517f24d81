"""The KV cache kept between the turns of one conversation."""

# V vocab, T cache

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.generation import steps
from jaxft.nn.attention.cache import Cache, cut, first_row
from jaxft.nn.decoder import Decoder

_first_row = jax.jit(first_row)


class ConversationCache:
    """The cache of one conversation between calls of one model; see `generate_text`.

    computed: the number of tokens of the last prompt that the model computed; the others were in the cache. The cache
    is dropped, and the next call computes its whole prompt, after an interrupted call and after a change of the model's
    weights or active adapters.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._tokens: tuple[int, ...] = ()
        self._cache: Cache | None = None
        self._graphdef: nnx.GraphDef[Decoder] | None = None
        self._params: list[jax.Array] = []
        self._length = 0

    def take(
        self, graphdef: nnx.GraphDef[Decoder], params: nnx.State, prompt: Sequence[int], vocab: int
    ) -> tuple[steps.Prefix | None, int, int]:
        """(the cached prefix of a prompt, its tokens, the length of its cache); None, 0, 0 if nothing is cached.

        At least the last token of the prompt is left to be computed. The caller now owns the prefix; this object is
        empty until the next `keep`.
        """
        cache, length, self._cache = self._cache, self._length, None
        same_model = graphdef == self._graphdef and _are_same(jax.tree.leaves(params), self._params)
        self._params = []
        count = _shared_start(self._tokens, prompt)
        # Another graph may have rotated the keys otherwise: rotary factors can depend on the length.
        known = None if cache is None or count == 0 or not same_model else cut(cache, count)
        if known is None:
            self.computed = len(prompt)
            return None, 0, 0
        self.computed = len(prompt) - count
        seen_V = np.zeros(vocab, bool)
        seen_V[[token for token in prompt[:count] if token < vocab]] = True  # virtual tokens are beyond it
        return steps.Prefix(known, jnp.asarray(seen_V)), count, length

    def keep(
        self,
        graphdef: nnx.GraphDef[Decoder],
        params: nnx.State,
        memory: steps.Memory,
        tokens: Sequence[int],
        length: int,
    ) -> None:
        """Keeps the first row of a memory. tokens: those known to be in it. length: that for which it was made."""
        rows = memory.seen_BV.shape[0]
        self._cache = memory.cache if rows == 1 else _first_row(memory.cache)
        self._tokens, self._graphdef, self._length = tuple(tokens), graphdef, length
        self._params = jax.tree.leaves(params)


def _are_same(arrays: Sequence[jax.Array], others: Sequence[jax.Array]) -> bool:
    return len(arrays) == len(others) and all(a is b for a, b in zip(arrays, others, strict=True))


def _shared_start(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of equal first tokens; at most all but the last one of the prompt."""
    most = min(len(tokens), len(prompt) - 1)
    return next((i for i in range(most) if tokens[i] != prompt[i]), most)
