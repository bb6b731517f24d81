"""ERNIE 4.5 0.3B: Llama whose heads are rotated in neighbouring pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("ernie4_5",)
DEFAULTS = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. use_bias: of all linear layers but the LM head."""

    use_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu"})
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), use_bias=hf["use_bias"])

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Ernie4_5ForCausalLM"],
            "model_type": "ernie4_5",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        raise no_reward_model("ernie4_5")

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        attention = self.attention(bias=self.use_bias, output_bias=self.use_bias, pairs=True)
        return self.uniform(attention, self.mlp(bias=self.use_bias))


class Model(Decoder):
    """An ERNIE 4.5 without experts of the given config."""
