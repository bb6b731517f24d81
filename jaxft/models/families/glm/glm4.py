"""GLM-4 0414 9B, 32B and GLM-Z1: as `glm`, with norms after each part too."""

from dataclasses import dataclass
from typing import Any

from jaxft.models.families.glm.glm import GlmConfig
from jaxft.nn.block import NormNames
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("glm4",)
# Here post_attention_layernorm is the norm before the feed-forward.
NORMS: NormNames = (
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(GlmConfig):
    """Sizes under Hugging Face's names."""

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", **self.hf_fields()}

    def shape(self) -> DecoderShape:
        """Layers with norms around each part, all equal."""
        return self.rotated_in_pairs(NORMS)


class Model(Decoder):
    """A GLM-4 0414 of the given config."""
