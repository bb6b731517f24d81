"""LoRA on the table of embeddings."""

# B batch, S sequence, V vocab, D model, r rank

import jax
import jax.numpy as jnp

from jaxft.adapters.attach import AdapterParam
from jaxft.adapters.low_rank import LoRASettings
from jaxft.nn import partition
from jaxft.nn.adapter import Adapter
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

# Small enough to be gathered whole, so that tokens look up where they are.
TABLE_DIMS: dict[str, Dimensions] = {"lora_embedding_a": ("weight", None), "lora_embedding_b": (None, "weight")}


class EmbeddingLoRA(Adapter):
    """`rows + scale * A[tokens] B`, A zero and B drawn, as in PEFT; there is no dropout on tokens.

    lora_embedding_a: [V, r], lora_embedding_b: [r, D], float32. What a tied head makes of the table is left as it is.
    """

    peft_type, stacks = "LORA", False

    def __init__(self, vocab: int, width: int, settings: LoRASettings, *, key: jax.Array) -> None:
        super().__init__()
        self.settings = settings
        self.lora_embedding_a = AdapterParam(jnp.zeros((vocab, settings.r), jnp.float32))
        self.lora_embedding_b = AdapterParam(jax.random.normal(key, (settings.r, width), jnp.float32))

    def __call__(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """x_BSD: the rows of the table, in the type of computation."""
        a_Vr, b_rD = (
            partition.gathered(getattr(self, name).get_value().astype(x_BSD.dtype), dims, (None, None))
            for name, dims in TABLE_DIMS.items()
        )
        low_BSr = jnp.take(a_Vr, tokens_BS, axis=0)
        return x_BSD + self.settings.scale * (low_BSr @ b_rD)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {name: StorageDims(dims) for name, dims in TABLE_DIMS.items()}

    def merged(self, table: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The table [V, D] that does alone what both do together, float32."""
        a, b = self.lora_embedding_a.get_value(), self.lora_embedding_b.get_value()
        return table + self.settings.scale * jnp.matmul(a, b, precision="highest")

    def rank(self, place: int | None) -> int:
        """Its rank; there is one table, no stack."""
        return self.settings.r

    def plain(self) -> "EmbeddingLoRA":
        """Itself: it begins with zero."""
        return self
