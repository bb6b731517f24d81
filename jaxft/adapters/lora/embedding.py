"""LoRA on the embedding table."""

# B batch, S sequence, V vocab, D model, r rank

import jax
import jax.numpy as jnp

from jaxft.adapters.attach import AdapterParam
from jaxft.adapters.lora.low_rank import LoRASettings
from jaxft.nn import partition
from jaxft.nn.adapter import EmbeddingAdapter
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims

# Both halves are small enough to be gathered in full, so that each device looks up its own tokens.
TABLE_DIMS: dict[str, Dimensions] = {"lora_embedding_a": ("weight", None), "lora_embedding_b": (None, "weight")}


class EmbeddingLoRA(EmbeddingAdapter):
    """`rows + scale * A[tokens] B`, with A initially zero and B random, as in PEFT. There is no dropout on tokens.

    lora_embedding_a: [V, r], lora_embedding_b: [r, D], float32. A tied LM head uses the table without the adapter.
    """

    peft_type, stacks = "LORA", False

    def __init__(self, vocab: int, width: int, settings: LoRASettings, *, key: jax.Array) -> None:
        super().__init__()
        self.settings = settings
        self.lora_embedding_a = AdapterParam(jnp.zeros((vocab, settings.r), jnp.float32))
        self.lora_embedding_b = AdapterParam(jax.random.normal(key, (settings.r, width), jnp.float32))

    def __call__(self, tokens_BS: jax.Array, x_BSD: jax.Array) -> jax.Array:
        """x_BSD: the rows of the table, in the compute dtype."""
        a_Vr, b_rD = (
            partition.gather(getattr(self, name).get_value().astype(x_BSD.dtype), dims, (None, None))
            for name, dims in TABLE_DIMS.items()
        )
        low_BSr = jnp.take(a_Vr, tokens_BS, axis=0)
        return x_BSD + self.settings.scale * (low_BSr @ b_rD)

    def storage_dims(self) -> dict[str, StorageDims]:
        return {name: StorageDims(dims) for name, dims in TABLE_DIMS.items()}

    def merged(self, table: jax.Array, at: tuple[int, ...] = ()) -> jax.Array:
        """The merged table [V, D], float32."""
        a, b = self.lora_embedding_a.get_value(), self.lora_embedding_b.get_value()
        return table + self.settings.scale * jnp.matmul(a, b, precision="highest")

    def rank(self, stack_index: int | None) -> int:
        """The rank; there is one table and no stack."""
        return self.settings.r

    def plain(self) -> "EmbeddingLoRA":
        """This adapter itself, because nothing is subtracted from it."""
        return self
