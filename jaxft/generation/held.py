"""What one row leaves in its cache, for a later call whose prompt begins alike: the turns of a conversation."""

# V vocab, T cache

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation import steps
from jaxft.nn.attention.cache import Cache


class ConversationCache:
    """The cache of one conversation between calls of one model; see `generate_text`.

    computed: how many tokens of the last prompt went through the model; the others were found here. A call that is
    interrupted leaves nothing behind, and the next one computes its whole prompt; so does one after the model's weights
    or its active adapters have changed.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._tokens: tuple[int, ...] = ()
        self._cache: Cache | None = None
        self._graphdef: Any = None
        self._params: list[jax.Array] = []
        self._length = 0

    def take(
        self, graphdef: Any, params: Any, prompt: Sequence[int], vocab: int
    ) -> tuple[steps.Prefix | None, int, int]:
        """(what is held of a prompt, how many of its tokens that is, length of that cache); None, 0, 0 for nothing.

        At least the last token of the prompt is left to be computed. What is held is given away.
        """
        cache, length, self._cache = self._cache, self._length, None
        same = graphdef == self._graphdef and _same(jax.tree.leaves(params), self._params)
        self._params = []
        count = _common(self._tokens, prompt)
        # Another graph would have turned the keys otherwise: rotary factors that follow from the length.
        if cache is None or count == 0 or not same or not _reaches_back(cache, count):
            self.computed = len(prompt)
            return None, 0, 0
        self.computed = len(prompt) - count
        # What came after these tokens is out of sight, and its slots are written anew.
        cut = tuple(
            part._replace(positions_BT=jnp.where(part.positions_BT < count, part.positions_BT, -1)) for part in cache
        )
        seen_V = np.zeros(vocab, bool)
        seen_V[[token for token in prompt[:count] if token < vocab]] = True  # virtual tokens are beyond it
        return steps.Prefix(cut, jnp.asarray(seen_V)), count, length

    def keep(self, graphdef: Any, params: Any, memory: steps.Memory, tokens: Sequence[int], length: int) -> None:
        """Holds the first row of a memory. tokens: those known to be in it. length: that the memory was made for."""
        rows = memory.seen_BV.shape[0]
        self._cache = memory.cache if rows == 1 else tuple(steps.first_row(part) for part in memory.cache)
        self._tokens, self._graphdef, self._length = tuple(tokens), graphdef, length
        self._params = jax.tree.leaves(params)


def _same(arrays: Sequence[jax.Array], held: Sequence[jax.Array]) -> bool:
    return len(arrays) == len(held) and all(a is b for a, b in zip(arrays, held, strict=True))


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    most = min(len(held), len(prompt) - 1)
    return next((i for i in range(most) if held[i] != prompt[i]), most)


def _reaches_back(cache: Cache, count: int) -> bool:
    """Whether every layer still has what the token at `count` sees.

    A layer with a window has overwritten its oldest tokens by those beyond `count`.
    """
    written = max(int(end) for end in jax.device_get([jnp.max(part.positions_BT) for part in cache])) + 1
    return all(written <= max(part.slots, count + 1) for part in cache)
