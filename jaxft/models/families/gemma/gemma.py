"""Gemma 1 2B and 7B: scaled embeddings, a gated GELU and heads wider than the stream (arXiv:2403.08295)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, read_rope, read_sizes, with_defaults
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("gemma",)
GELU = "gelu_pytorch_tanh"
DEFAULTS = {
    "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "attention_bias": False,
    "tie_word_embeddings": True,
}  # fmt: skip
ONLY = {"hidden_act": GELU, "hidden_activation": GELU, "use_bidirectional_attention": False}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        if hf.get("hidden_act") == "gelu":  # the first files have this name for the approximation by tanh
            hf["hidden_act"] = GELU
        sizes = read_sizes(hf, cls, must_equal=ONLY)
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), attention_bias=hf["attention_bias"])

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GemmaForCausalLM"],
            "model_type": "gemma",
            "hidden_act": GELU,
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        norm, bias = NormShape(eps=self.rms_norm_eps, plus_one=True), self.attention_bias
        block = BlockShape(
            mixer=self.attention(bias=bias, output_bias=bias), mlp=self.mlp(activation="gelu_tanh"), norm=norm
        )
        return DecoderShape(
            layers=(block,) * self.num_hidden_layers,
            ropes=(self.rope,),
            norm=norm,
            embed_scale=self.hidden_size**0.5,
        )


class Model(Decoder):
    """A Gemma 1 of the given config."""
