"""InternLM3: Llama with names of its own for the biases (arXiv:2403.17297 describes the series)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import FamilyConfig, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("internlm3",)
DEFAULTS = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip
# transformers writes the two biases under the names of Llama.
ALIASES = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. qkv_bias: of the projections in attention. bias: of the feed-forward ones."""

    qkv_bias: bool
    bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        biases: dict[str, Any] = {name: bool(hf.get(name, hf.get(alias))) for name, alias in ALIASES.items()}
        aliases = {alias: biases[name] for name, alias in ALIASES.items()}
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu"} | aliases)
        if biases["qkv_bias"] != biases["bias"]:
            raise ModelError(
                f"qkv_bias={biases['qkv_bias']} and bias={biases['bias']} of model_type 'internlm3' must be equal: "
                "transformers has no other InternLM3"
            )
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), **biases)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["InternLM3ForCausalLM"],
            "model_type": "internlm3",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        raise no_reward_model("internlm3")

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        return self.uniform(self.attention(bias=self.qkv_bias, output_bias=self.qkv_bias), self.mlp(bias=self.bias))


class Model(Decoder):
    """An InternLM3 of the given config."""
