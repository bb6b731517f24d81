"""LoRA on the kernels of experts: a pair of halves for each expert."""

# R rows, E experts, I inputs, O outputs, r rank

import jax
import jax.numpy as jnp

from jaxft.adapters.lora.low_rank import HALVES, LowRank
from jaxft.nn.adapter import ExpertAdapter
from jaxft.nn.experts.grouped import grouped
from jaxft.nn.experts.layer import EXPERT_SIDES
from jaxft.nn.storage import StorageDims


class ExpertLoRA(LowRank, ExpertAdapter):
    """LoRA with lora_a [*stack, E, r, I] and lora_b [*stack, E, r, O]; there is no dropout on experts' rows."""

    stacks = False

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """x: [R, I] and y: [R, O], the rows of expert 0 first, sizes_E of them, and so on."""
        a_ErI, b_ErO = (half.astype(x.dtype) for half in self._halves())
        low_Rr = grouped(x, jnp.swapaxes(a_ErI, -1, -2), sizes_E)
        scale = self._scale()
        scale = scale if isinstance(scale, float) else scale.astype(x.dtype)
        return y + scale * grouped(low_Rr, b_ErO, sizes_E)

    def storage_dims(self) -> dict[str, StorageDims]:
        wide = dict(zip(("lora_a", "lora_b"), EXPERT_SIDES[self.tp_side], strict=True))
        halves = {name: StorageDims(("expert", None, wide[name.removesuffix("_start")])) for name in HALVES}
        return halves | {"scales": StorageDims(())}
