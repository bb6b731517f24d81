"""Qwen3 dense: every head's queries and keys are normalised before the rotation (arXiv:2505.09388)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.qwen.qwen2 import DEFAULTS as QWEN2_DEFAULTS
from jaxft.models.families.qwen.qwen2 import WindowedConfig, read_windows
from jaxft.models.family import read_rope, read_sizes, with_defaults
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("qwen3",)
DEFAULTS = QWEN2_DEFAULTS | {"head_dim": 128, "attention_bias": False}


@dataclass(frozen=True, kw_only=True)
class Config(WindowedConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        used = ("use_sliding_window", "max_window_layers")
        sizes = read_sizes(hf, cls, used=used, must_equal={"hidden_act": "silu", "use_qk_norm": True})
        rope = read_rope(hf, sizes["head_dim"])
        return cls(**sizes, rope=rope, **read_windows(hf), attention_bias=hf["attention_bias"])

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers with q and k norms of single heads."""
        return self.by_layer_type(qk_norm="head", bias=self.attention_bias, output_bias=self.attention_bias)


class Model(Decoder):
    """A Qwen3 of the given config."""
