"""Gemma 3, text: five local layers per global layer, each kind with its own rope (arXiv:2503.19786)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.families.gemma.gemma2 import GELU, ONLY, SHARED_DEFAULTS, GemmaConfig, read_gemma
from jaxft.models.family import FULL, SLIDING, check_period, read_rope, read_sizes, ropes_by_kind, with_defaults
from jaxft.nn.attention.rope import Rope
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("gemma3_text",)
# transformers 4 left fields with these values out of the text_config of multimodal folders.
DEFAULTS = SHARED_DEFAULTS | {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "max_position_embeddings": 131072, "final_logit_softcapping": None,
}  # fmt: skip
# transformers reads attn_logit_softcapping but does not use it, so a number here would have no defined meaning.
GEMMA3_ONLY = ONLY | {"attn_logit_softcapping": None, "use_qk_norm": True}


@dataclass(frozen=True, kw_only=True)
class Config(GemmaConfig):
    """Sizes under Hugging Face's names. rope: of global layers. local_rope: of those with a window."""

    local_rope: Rope

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        check_period(hf.get("sliding_window_pattern"))
        period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
        used = ("sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq")
        sizes = read_sizes(hf, cls, used=used, must_equal=GEMMA3_ONLY)
        thetas = {FULL: hf.get("rope_theta", 1e6), SLIDING: hf.get("rope_local_base_freq", 1e4)}
        rope, local = (read_rope(part, sizes["head_dim"]) for part in ropes_by_kind(hf, thetas))
        return cls(**sizes, rope=rope, local_rope=local, **read_gemma(hf, period))

    def to_hf(self) -> dict[str, Any]:
        if self.local_rope.kind != "default":
            raise ModelError(f"transformers 4 has no field for {self.local_rope.kind!r} rope scaling of local layers")
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": GELU,
            **self.hf_fields(),
            "rope_local_base_freq": self.local_rope.theta,
        }

    def rope_fields(self) -> dict[str, Any]:
        """The ropes in both dialects; for local layers transformers 4 has no field but their theta."""
        nested = {FULL: self.rope.to_parameters(), SLIDING: self.local_rope.to_parameters()}
        return (super().rope_fields() if self.local_rope.kind == "default" else {}) | {"rope_parameters": nested}

    def score_architecture(self) -> str:
        """The class for text alone; the one without `Text` in its name takes images too."""
        return "Gemma3TextForSequenceClassification"

    def shape(self) -> DecoderShape:
        """Layers with q and k norms of single heads."""
        return self.sandwich_norms({SLIDING: self.local_rope, FULL: self.rope}, softcap=None, qk_norm="head")


class Model(Decoder):
    """A Gemma 3 of the given config."""
