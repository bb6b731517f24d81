"""Llama 2, 3, 3.1, 3.2, 3.3 and models of the same architecture, such as SmolLM2 (arXiv:2407.21783)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, read_rope, read_sizes
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("llama",)


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu"})
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            attention_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        attention = self.attention(bias=self.attention_bias, output_bias=self.attention_bias)
        return self.uniform(attention, self.mlp(bias=self.mlp_bias))


class Model(Decoder):
    """A Llama of the given config."""
