"""How the routers of a model spread its tokens: what losses on them need, summed over tokens and layers."""

# M tokens, E experts, K experts of one token

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterSums(NamedTuple):
    """Sums over all tokens that are no padding, in all layers with experts; float32.

    chosen_E: how many tokens went to each expert. probability_E: the probabilities that the routers gave to each.
    squared_logz: logsumexp(logits)^2. tokens: how many there were, one token counting once a layer.
    """

    chosen_E: jax.Array
    probability_E: jax.Array
    squared_logz: jax.Array
    tokens: jax.Array

    @staticmethod
    def zero(experts: int) -> "RouterSums":
        """Nothing counted yet."""
        return RouterSums(jnp.zeros(experts), jnp.zeros(experts), jnp.float32(0), jnp.float32(0))

    def add(self, logits_ME: jax.Array, experts_MK: jax.Array, real_M: jax.Array) -> "RouterSums":
        """With the tokens of one layer besides. experts_MK: int32, where they went. real_M: bool, False at padding.

        Differentiable in the logits; the choice of an expert, a step function of them, has no gradient.
        """
        weight_M = real_M.astype(jnp.float32)
        logz_M = jax.nn.logsumexp(logits_ME, axis=-1)
        probability_ME = jnp.exp(logits_ME - logz_M[:, None])
        chosen_ME = jax.nn.one_hot(experts_MK, logits_ME.shape[-1], dtype=jnp.float32).sum(axis=1)
        return RouterSums(
            self.chosen_E + weight_M @ chosen_ME,
            self.probability_E + weight_M @ probability_ME,
            self.squared_logz + weight_M @ jnp.square(logz_M),
            self.tokens + weight_M.sum(),
        )
