"""DeepSeek V2 and V2-Lite: latent attention, and experts beside shared ones (arXiv:2405.04434)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.deepseek.deepseek_v3 import LATENT_DEFAULTS, ONLY, LatentConfig, read_latent
from jaxft.models.family import with_defaults
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("deepseek_v2",)
DEFAULTS = LATENT_DEFAULTS | {
    "max_position_embeddings": 2048, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "n_shared_experts": 2, "first_k_dense_replace": 0,
    "norm_topk_prob": False, "topk_method": "greedy", "mlp_bias": False,
}  # fmt: skip
GREEDY, BY_GROUP = "greedy", "group_limited_greedy"  # values of topk_method


@dataclass(frozen=True, kw_only=True)
class Config(LatentConfig):
    """Sizes under Hugging Face's names. topk_method: whether experts are chosen within the best groups."""

    topk_method: str

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        if hf["topk_method"] == GREEDY:  # groups have no meaning then
            hf |= {"n_group": 1, "topk_group": 1}
        method = hf["topk_method"] if hf["topk_method"] in (GREEDY, BY_GROUP) else GREEDY
        only = ONLY | {"scoring_func": "softmax", "topk_method": method}
        return cls(**read_latent(hf, cls, experts=64, must_equal=only, group_best=1), topk_method=method)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Latent attention, and experts after the first layers. The weights of experts are never renormalised."""
        router = self.router(
            renormalize=False, groups=self.n_group, chosen_groups=self.topk_group, scale=self.routed_scaling_factor
        )
        return self.latent_layers(router)


class Model(Decoder):
    """A DeepSeek V2 of the given config."""
