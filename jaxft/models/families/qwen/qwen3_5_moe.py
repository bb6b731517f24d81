"""Qwen3.5 and 3.6 with experts, such as 35B-A3B: the layers of Qwen3.5, each followed by many small experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.qwen.qwen3_5 import ONLY, USED, read_delta_net
from jaxft.models.families.qwen.qwen3_next import EXPERT_DEFAULTS, OWN, DeltaNetMoEConfig
from jaxft.models.family import no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.moe import MUST_EQUAL, check_experts
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("qwen3_5_moe_text",)
DEFAULTS = EXPERT_DEFAULTS | {"num_experts": 256, "num_experts_per_tok": 8}
# Every layer has experts, and the weights of those that are chosen always sum to one.
FIXED = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True, kw_only=True)
class Config(DeltaNetMoEConfig):
    """Sizes under Hugging Face's names. intermediate_size is unused, and no field of the files: no layer is dense."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        hf.setdefault("intermediate_size", hf["moe_intermediate_size"])
        sizes = read_sizes(hf, cls, used=USED, must_equal=MUST_EQUAL | ONLY | FIXED)
        check_experts(hf, hf["num_experts"])
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"], partial=True),
            **read_delta_net(hf),
            **{name: hf[name] for name in OWN},
            sliding_window=None,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": "qwen3_5_moe_text",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("qwen3_5_moe_text")

    def shape(self) -> DecoderShape:
        """Delta-nets and gated attention in the order of `layer_types`, all before experts."""
        return self.by_layer_type([self.shared_and_chosen(renormalize=True)] * self.num_hidden_layers)


class Model(Decoder):
    """A Qwen3.5 with experts of the given config."""
