"""Gemma 2: alternating local and global layers, capped scores and logits, norms around each part (arXiv:2408.00118)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import (
    FULL,
    SLIDING,
    FamilyConfig,
    check_window,
    read_layer_types,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.models.hf_fields import require
from jaxft.nn.attention.rope import Rope
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import AROUND, BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("gemma2",)
GELU = "gelu_pytorch_tanh"
# For Gemma 2 and 3; if they differ, each has its own DEFAULTS.
SHARED_DEFAULTS = {
    "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
DEFAULTS = SHARED_DEFAULTS | {
    "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
ONLY = {
    "hidden_act": GELU,
    "hidden_activation": GELU,
    "use_bidirectional_attention": False,
    "cache_implementation": "hybrid",
}


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(FamilyConfig):
    """What Gemma 2 and 3 share. query_pre_attn_scalar: scores are q k^T divided by its square root."""

    sliding_window: int
    layer_types: tuple[str, ...]
    query_pre_attn_scalar: float
    attention_bias: bool
    final_logit_softcapping: float | None

    def sandwich_norms(self, ropes: Mapping[str, Rope], *, softcap: float | None, **attention: Any) -> DecoderShape:
        """Layers with norms before and after each part. ropes: by layer type. softcap: of the attention scores."""
        norm, mlp = NormShape(eps=self.rms_norm_eps, plus_one=True), self.mlp(activation="gelu_tanh")
        scale, distinct = self.query_pre_attn_scalar**-0.5, tuple(dict.fromkeys(ropes.values()))
        blocks = {
            kind: BlockShape(
                mixer=self.attention(
                    form=ScoreForm(window=window, scale=scale, softcap=softcap),
                    bias=self.attention_bias,
                    output_bias=self.attention_bias,
                    rope=distinct.index(ropes[kind]),
                    **attention,
                ),
                mlp=mlp,
                norm=norm,
                norms=AROUND,
            )
            for kind, window in ((SLIDING, self.sliding_window), (FULL, None))
        }
        return DecoderShape(
            layers=tuple(blocks[kind] for kind in self.layer_types),
            ropes=distinct,
            norm=norm,
            embed_scale=self.hidden_size**0.5,
            logit_softcap=self.final_logit_softcapping,
        )


def read_gemma(hf: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The fields that GemmaConfig adds. period: by default every period-th layer is global."""
    require(hf, ["query_pre_attn_scalar"])
    layers = range(hf["num_hidden_layers"])
    types = read_layer_types(hf, [FULL if (i + 1) % period == 0 else SLIDING for i in layers])
    check_window(hf["sliding_window"])
    return {
        "layer_types": types,
        **{
            name: hf[name]
            for name in ("sliding_window", "query_pre_attn_scalar", "attention_bias", "final_logit_softcapping")
        },
    }


@dataclass(frozen=True, kw_only=True)
class Config(GemmaConfig):
    """Sizes under Hugging Face's names."""

    attn_logit_softcapping: float | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, must_equal=ONLY | {"sliding_window_size": hf["sliding_window"]})
        rope = read_rope(hf, sizes["head_dim"])
        softcap = hf["attn_logit_softcapping"]
        return cls(**sizes, rope=rope, **read_gemma(hf, period=2), attn_logit_softcapping=softcap)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_activation": GELU,
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Both kinds of layers have the same rope."""
        return self.sandwich_norms({SLIDING: self.rope, FULL: self.rope}, softcap=self.attn_logit_softcapping)


class Model(Decoder):
    """A Gemma 2 of the given config."""
