"""GLM-4.7-Flash: latent attention, and small experts beside a shared one, as in DeepSeek V3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.families.deepseek.deepseek_v3 import LATENT_DEFAULTS, ONLY, LatentConfig, read_latent
from jaxft.models.family import SIZES, no_reward_model, with_defaults
from jaxft.models.hf_fields import require
from jaxft.nn.decoder import Decoder, DecoderShape

MODEL_TYPES = ("glm4_moe_lite",)
DEFAULTS = LATENT_DEFAULTS | {
    "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "v_head_dim": 256, "moe_intermediate_size": 1536, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
}  # fmt: skip
DENSE, SPARSE = "dense", "sparse"  # values of mlp_layer_types


@dataclass(frozen=True, kw_only=True)
class Config(LatentConfig):
    """Sizes under Hugging Face's names. Files say by mlp_layer_types which layers have experts: all after the first."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        require(hf, SIZES)
        types = hf.pop("mlp_layer_types", None)
        hf["first_k_dense_replace"] = _dense_layers(types, hf) if types else hf.get("first_k_dense_replace", 1)
        only = ONLY | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        return cls(**read_latent(hf, cls, experts=64, must_equal=only))

    def to_hf(self) -> dict[str, Any]:
        dense = self.first_k_dense_replace
        return {
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "model_type": "glm4_moe_lite",
            "hidden_act": "silu",
            "num_nextn_predict_layers": 0,
            **self.hf_fields(),
            "mlp_layer_types": [DENSE] * dense + [SPARSE] * (self.num_hidden_layers - dense),
        }

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("glm4_moe_lite")

    def shape(self) -> DecoderShape:
        """Latent attention, and experts after the first layer."""
        return self.latent_layers(self.balanced_router())


def _dense_layers(types: Any, hf: Mapping[str, Any]) -> int:
    """The number of first layers without experts. Raises ModelError for another order."""
    dense = list(types).count(DENSE) if isinstance(types, list | tuple) else 0
    if list(types) != [DENSE] * dense + [SPARSE] * (hf["num_hidden_layers"] - dense):
        raise ModelError(
            f"mlp_layer_types={types!r}: implemented are {DENSE!r} layers followed by {SPARSE!r} ones, "
            f"{hf['num_hidden_layers']} in all"
        )
    return dense


class Model(Decoder):
    """A GLM-4.7-Flash of the given config."""
