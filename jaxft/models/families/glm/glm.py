"""GLM-4 9B of 2024: half of each head is rotated, in neighbouring pairs; a fused gate (arXiv:2406.12793)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, read_rope, read_sizes, with_defaults
from jaxft.nn.block import BEFORE, NormNames
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("glm",)
DEFAULTS = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7,
    "attention_bias": True, "partial_rotary_factor": 0.5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GlmConfig(FamilyConfig):
    """What `glm` and `glm4` share. attention_bias: of queries, keys and values alone."""

    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "GlmConfig":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=("partial_rotary_factor",), must_equal={"hidden_act": "silu"})
        rope = read_rope(hf, sizes["head_dim"], partial=True)
        return cls(**sizes, rope=rope, attention_bias=hf["attention_bias"])

    def hf_fields(self) -> dict[str, Any]:
        # An absent factor would mean a half.
        return super().hf_fields() | {"hidden_act": "silu", "partial_rotary_factor": self.rope.partial_rotary_factor}

    def rotated_in_pairs(self, norms: NormNames) -> DecoderShape:
        """Layers that are all equal. norms: the names of their norms."""
        attention = self.attention(bias=self.attention_bias, pairs=True)
        return self.uniform(attention, self.mlp(fused=True), norms=norms)


@dataclass(frozen=True, kw_only=True)
class Config(GlmConfig):
    """Sizes under Hugging Face's names."""

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["GlmForCausalLM"], "model_type": "glm", **self.hf_fields()}

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        return self.rotated_in_pairs(BEFORE)


class Model(Decoder):
    """A GLM-4 of 2024 of the given config."""
