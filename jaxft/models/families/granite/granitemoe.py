"""Granite 3 with experts, 1B-A400M and 3B-A800M: Granite's factors; all experts of a layer are in one tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxft.models.families.granite.granite import DROPOUT, FACTORS
from jaxft.models.family import LAYER, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.hf_fields import tell_dropout
from jaxft.models.moe import PATH, RoutedConfig, check_experts
from jaxft.models.tensor_map import EACH_TRANSPOSED, TensorMap, linear
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("granitemoe",)
DEFAULTS = {
    "attention_bias": False, "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, **dict.fromkeys(FACTORS, 1.0),
}  # fmt: skip
OWN = ("attention_bias", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")


@dataclass(frozen=True, kw_only=True)
class Config(RoutedConfig):
    """Sizes under Hugging Face's names, factors as in Granite without experts. intermediate_size: of one expert."""

    attention_bias: bool
    num_local_experts: int
    router_aux_loss_coef: float
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=DROPOUT, must_equal={"hidden_act": "silu"})
        tell_dropout(hf, DROPOUT)
        check_experts(hf, hf["num_local_experts"])
        own = {name: hf[name] for name in OWN} | {name: float(hf[name]) for name in FACTORS}
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), **own)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GraniteMoeForCausalLM"],
            "model_type": "granitemoe",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        raise no_reward_model("granitemoe")

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        bias = self.attention_bias
        attention = self.attention(form=ScoreForm(scale=self.attention_multiplier), bias=bias, output_bias=bias)
        router = self.router(renormalize=True)
        experts = self.experts(self.num_local_experts, self.intermediate_size, router, fused="halves")
        return replace(
            self.uniform(attention, experts, residual_scale=self.residual_multiplier),
            embed_scale=self.embedding_multiplier,
            logit_scale=1 / self.logits_scaling,
        )

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig. Files have all experts of a layer in one tensor, each as a linear layer has it."""
        module = f"{LAYER}.block_sparse_moe"
        yield from linear(f"{module}.router.layer", f"{PATH}/router")
        for hf, ours in (("input_linear", "gate_up_proj"), ("output_linear", "down_proj")):
            yield TensorMap(f"{module}.{hf}.weight", f"{PATH}/{ours}/kernel", EACH_TRANSPOSED)


class Model(Decoder):
    """A Granite with experts of the given config."""
