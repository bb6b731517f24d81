"""Command R7B and Command A: attention beside the feed-forward, ropes in local layers only (arXiv:2504.00698)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import (
    FULL,
    SLIDING,
    FamilyConfig,
    check_window,
    no_reward_model,
    read_periodic_types,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import BlockShape, NormNames
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("cohere2",)
DEFAULTS = {
    "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "attention_bias": False, "sliding_window": 4096,
    "logit_scale": 0.0625, "tie_word_embeddings": True,
}  # fmt: skip
# Fields that describe the architecture and that transformers does not read.
ONLY = {
    "hidden_act": "silu", "use_parallel_block": True, "use_gated_activation": True, "use_parallel_embedding": True,
    "position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "order_of_interleaved_layers": "local_attn_first",
}  # fmt: skip
PERIOD = 4  # by default every fourth layer is global
NORMS: NormNames = ("input_layernorm", None, None, None)


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names.

    rms_norm_eps: called layer_norm_eps in files. sliding_window: of SLIDING layers. logit_scale: factor on logits.
    """

    attention_bias: bool
    sliding_window: int
    layer_types: tuple[str, ...]
    logit_scale: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        eps = hf.pop("layer_norm_eps")
        if hf.get("rms_norm_eps", eps) != eps:
            raise ModelError("rms_norm_eps of model_type 'cohere2' has no meaning: its norms have a layer_norm_eps")
        hf["rms_norm_eps"] = eps
        only = ONLY | {
            "layer_switch": hf.get("sliding_window_pattern") or PERIOD,
            "use_embedding_sharing": hf["tie_word_embeddings"],
        }
        sizes = read_sizes(hf, cls, used=("sliding_window_pattern",), must_equal=only)
        if sizes["head_dim"] * sizes["num_attention_heads"] != sizes["hidden_size"]:
            raise ModelError(
                f"head_dim={sizes['head_dim']} of model_type 'cohere2' must be hidden_size / num_attention_heads"
            )
        types = read_periodic_types(hf, PERIOD)
        check_window(hf["sliding_window"])
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            layer_types=types,
            **{name: hf[name] for name in ("attention_bias", "sliding_window", "logit_scale")},
        )

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        fields["layer_norm_eps"] = fields.pop("rms_norm_eps")
        return {
            "architectures": ["Cohere2ForCausalLM"],
            "model_type": "cohere2",
            "hidden_act": "silu",
            **fields,
        }

    def score_architecture(self) -> str:
        raise no_reward_model("cohere2")

    def shape(self) -> DecoderShape:
        """Layers of one norm each, a LayerNorm; local ones rotate neighbouring dimensions, global ones none."""
        norm, bias = NormShape(eps=self.rms_norm_eps, centered=True), self.attention_bias
        blocks = {
            kind: BlockShape(
                mixer=self.attention(
                    form=ScoreForm(window=window), bias=bias, output_bias=bias, rope=rope, pairs=rope is not None
                ),
                mlp=self.mlp(),
                norm=norm,
                norms=NORMS,
                parallel=True,
            )
            for kind, window, rope in ((SLIDING, self.sliding_window, 0), (FULL, None, None))
        }
        return DecoderShape(
            layers=tuple(blocks[kind] for kind in self.layer_types),
            ropes=(self.rope,),
            norm=norm,
            logit_scale=self.logit_scale,
        )


class Model(Decoder):
    """A Command R7B or Command A of the given config."""
