"""Statistics of routers, summed over tokens and layers, for the losses on routers."""

# B batch, S sequence, E experts, K experts of one token

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterSums(NamedTuple):
    """Sums over all tokens except padding and over all layers with experts; float32.

    chosen_E: the number of tokens that chose each expert. probability_E: router probabilities of each expert.
    squared_logz: logsumexp(logits)^2. tokens: the number of tokens; a token counts once per layer.
    """

    chosen_E: jax.Array
    probability_E: jax.Array
    squared_logz: jax.Array
    tokens: jax.Array

    @staticmethod
    def zero(experts: int) -> "RouterSums":
        """Sums over no tokens."""
        return RouterSums(jnp.zeros(experts), jnp.zeros(experts), jnp.float32(0), jnp.float32(0))

    def add(self, logits_BSE: jax.Array, experts_BSK: jax.Array, real_BS: jax.Array) -> "RouterSums":
        """These sums plus the tokens of one layer. experts_BSK: int32, the chosen experts. real_BS: False at padding.

        Differentiable in the logits; the choice of an expert is a step function of them and has no gradient.
        """
        weight_BS = real_BS.astype(jnp.float32)
        logz_BS = jax.nn.logsumexp(logits_BSE, axis=-1)
        probability_BSE = jnp.exp(logits_BSE - logz_BS[..., None])
        chosen_BSE = jax.nn.one_hot(experts_BSK, logits_BSE.shape[-1], dtype=jnp.float32).sum(axis=-2)
        return RouterSums(
            self.chosen_E + jnp.einsum("BS,BSE->E", weight_BS, chosen_BSE),
            self.probability_E + jnp.einsum("BS,BSE->E", weight_BS, probability_BSE),
            self.squared_logz + jnp.sum(weight_BS * jnp.square(logz_BS)),
            self.tokens + jnp.sum(weight_BS),
        )
