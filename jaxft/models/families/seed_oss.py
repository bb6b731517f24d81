"""Seed-OSS 36B: Llama with biases on queries, keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, read_rope, read_sizes, with_defaults
from jaxft.models.hf_fields import tell_dropout
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("seed_oss",)
DEFAULTS = {
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True,
    "attention_out_bias": False, "mlp_bias": False,
}  # fmt: skip
DROPOUT = ("attention_dropout", "residual_dropout")
OWN = ("attention_bias", "attention_out_bias", "mlp_bias")


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. attention_bias: of queries, keys and values alone."""

    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=DROPOUT, must_equal={"hidden_act": "silu"})
        tell_dropout(hf, DROPOUT)
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), **{name: hf[name] for name in OWN})

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["SeedOssForCausalLM"],
            "model_type": "seed_oss",
            "hidden_act": "silu",
            # If they are absent, transformers takes 0.1 for them.
            **dict.fromkeys(DROPOUT, 0.0),
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        attention = self.attention(bias=self.attention_bias, output_bias=self.attention_out_bias)
        return self.uniform(attention, self.mlp(bias=self.mlp_bias))


class Model(Decoder):
    """A Seed-OSS of the given config."""
