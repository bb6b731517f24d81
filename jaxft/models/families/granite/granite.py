"""Granite 3: Llama with factors on embeddings, branches, scores and logits (arXiv:2408.13359 for the training)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import FamilyConfig, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.hf_fields import tell_dropout
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("granite",)
FACTORS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
DEFAULTS = {"attention_bias": False, "mlp_bias": False, **dict.fromkeys(FACTORS, 1.0)}
DROPOUT = ("attention_dropout",)


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names.

    embedding_multiplier: factor on embedded tokens. residual_multiplier: on what is added to the residual stream.
    attention_multiplier: on scores, in place of 1 / sqrt(head_dim). logits_scaling: logits are divided by it.
    """

    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=DROPOUT, must_equal={"hidden_act": "silu"})
        tell_dropout(hf, DROPOUT)
        own = {name: hf[name] for name in ("attention_bias", "mlp_bias")}
        factors: dict[str, Any] = {name: float(hf[name]) for name in FACTORS}
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), **own, **factors)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        raise no_reward_model("granite")

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        norm, bias = NormShape(eps=self.rms_norm_eps), self.attention_bias
        block = BlockShape(
            mixer=self.attention(form=ScoreForm(scale=self.attention_multiplier), bias=bias, output_bias=bias),
            mlp=self.mlp(bias=self.mlp_bias),
            norm=norm,
            residual_scale=self.residual_multiplier,
        )
        return DecoderShape(
            layers=(block,) * self.num_hidden_layers,
            ropes=(self.rope,),
            norm=norm,
            embed_scale=self.embedding_multiplier,
            logit_scale=1 / self.logits_scaling,
        )


class Model(Decoder):
    """A Granite 3 of the given config."""
