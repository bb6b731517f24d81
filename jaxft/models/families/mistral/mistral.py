"""Mistral 7B, Nemo and Small: Llama with an optional sliding window (arXiv:2310.06825)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, check_window, read_rope, read_sizes, with_defaults
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("mistral",)
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. sliding_window: tokens that each token sees, itself included; None for all."""

    sliding_window: int | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, must_equal={"hidden_act": "silu"})
        if hf["sliding_window"] is not None:
            check_window(hf["sliding_window"])
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), sliding_window=hf["sliding_window"])

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        return self.uniform(self.attention(form=ScoreForm(window=self.sliding_window)), self.mlp())


class Model(Decoder):
    """A Mistral of the given config."""
