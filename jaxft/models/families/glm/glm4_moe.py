"""GLM-4.5, 4.6 and 4.5-Air: experts beside a shared one, chosen by scores that a balancing bias corrects."""

# Source: GLM-4.5, arXiv:2508.06471, section 2.1

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.moe import BalancedConfig, read_balanced
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("glm4_moe",)
DEFAULTS = {
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
    "attention_bias": False, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "output_router_logits": False,
    "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "use_qk_norm": False,
}  # fmt: skip
OWN = ("attention_bias", "use_qk_norm")
# The layers that predict several tokens at once are left out.
USED = ("partial_rotary_factor", "num_local_experts", "num_nextn_predict_layers")


@dataclass(frozen=True, kw_only=True)
class Config(BalancedConfig):
    """Sizes under Hugging Face's names."""

    attention_bias: bool
    use_qk_norm: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=USED, must_equal={"hidden_act": "silu"})
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"], partial=True),
            **read_balanced(hf, experts=128, group_best=2),
            **{name: hf[name] for name in OWN},
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "hidden_act": "silu",
            "num_nextn_predict_layers": 0,
            **self.hf_fields(),
            "partial_rotary_factor": self.rope.partial_rotary_factor,
        }

    def score_architecture(self) -> str:
        raise no_reward_model("glm4_moe")

    def shape(self) -> DecoderShape:
        """Pre-norm layers, the first ones dense."""
        attention = self.attention(bias=self.attention_bias, qk_norm="head" if self.use_qk_norm else None)
        experts = self.shared_and_routed(self.balanced_router())
        return self.sparse(attention, experts, range(self.first_k_dense_replace))


class Model(Decoder):
    """A GLM-4.5 of the given config."""
