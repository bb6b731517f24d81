"""OLMo 2: norms after attention and feed-forward, and over whole q and k projections (arXiv:2501.00656)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, read_rope, read_sizes, with_defaults
from jaxft.nn.block import AFTER
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("olmo2",)
DEFAULTS = {"rms_norm_eps": 1e-5, "attention_bias": False}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu", "use_qk_norm": True})
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), attention_bias=hf["attention_bias"])

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Olmo2ForCausalLM"],
            "model_type": "olmo2",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Post-norm layers, all equal."""
        bias = self.attention_bias
        attention = self.attention(qk_norm="whole", bias=bias, output_bias=bias)
        return self.uniform(attention, self.mlp(), norms=AFTER)


class Model(Decoder):
    """An OLMo 2 of the given config."""
