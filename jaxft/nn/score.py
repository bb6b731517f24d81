"""The score head: one number for each hidden vector, such as a reward."""

# B batch, S sequence, D model

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.storage import StorageDims

# What a decoder ends in: an LM head, which gives logits over the vocabulary, or a score head.
Head = Literal["vocabulary", "score"]


class ScoreHead(nnx.Module):
    """`score = hidden . weight`, without bias, in float32; transformers' `score` of a model with one label.

    weight: [D] float32 whatever the model is stored in, 0 at the start, so that every score is 0 and the first loss
    does not depend on a draw.
    """

    def __init__(self, width: int) -> None:
        self.weight = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, hidden_BSD: jax.Array) -> jax.Array:
        """The scores of hidden vectors after the last norm, [B, S] float32."""
        weight_D = partition.gather(self.weight.get_value(), ("weight",), (None,))
        return jnp.einsum("BSD,D->BS", hidden_BSD.astype(jnp.float32), weight_D, precision="highest")

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"weight": StorageDims(("weight",))}
