"""LFM2 8B-A1B: LFM2 with experts after the first layers (arXiv:2511.23404)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.lfm.lfm2 import SHARED_DEFAULTS, SHARED_USED, ConvConfig, read_conv
from jaxft.models.family import LAYER, no_reward_model, with_defaults
from jaxft.models.moe import PATH, RoutedConfig, check_experts, expert_tensors
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("lfm2_moe",)
DEFAULTS = SHARED_DEFAULTS | {
    "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2,
    "num_experts": 32, "num_experts_per_tok": 4, "use_expert_bias": True, "routed_scaling_factor": 1.0,
    "norm_topk_prob": True, "output_router_logits": False,
}  # fmt: skip
OWN = (
    "moe_intermediate_size", "num_dense_layers", "num_experts", "num_experts_per_tok", "use_expert_bias",
    "routed_scaling_factor", "norm_topk_prob", "output_router_logits",
)  # fmt: skip
USED = (*SHARED_USED, "num_local_experts", "tie_embedding")
EPSILON = 1e-6  # in the sum of the chosen scores


@dataclass(frozen=True, kw_only=True)
class Config(ConvConfig, RoutedConfig):
    """Sizes under Hugging Face's names. The first num_dense_layers have no experts, and intermediate_size inner units.

    use_expert_bias: whether a bias beside the scores balances the choice.
    """

    moe_intermediate_size: int
    num_dense_layers: int
    num_experts: int
    use_expert_bias: bool
    routed_scaling_factor: float
    norm_topk_prob: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        hf["tie_word_embeddings"] = hf.get("tie_embedding", hf["tie_word_embeddings"])
        fields = read_conv(hf, cls, used=USED, must_equal={})
        check_experts(hf, hf["num_experts"])
        return cls(**fields, **{name: hf[name] for name in OWN})

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", **self.hf_fields()}

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("lfm2_moe")

    def shape(self) -> DecoderShape:
        """Convolutions and attention, each before a feed-forward or experts."""
        router = self.router(
            renormalize=self.norm_topk_prob, scores="sigmoid", choice_bias=self.use_expert_bias, epsilon=EPSILON,
            scale=self.routed_scaling_factor,
        )  # fmt: skip
        experts, dense = self.experts(self.num_experts, self.moe_intermediate_size, router), self.mlp()
        return self.layers(
            dense if number < self.num_dense_layers else experts for number in range(self.num_hidden_layers)
        )

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        return self.moe_tensors(block.mlp) if isinstance(block.mlp, MoEShape) else super().mlp_tensors(block)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig."""
        module = f"{LAYER}.feed_forward"
        yield from expert_tensors(module, experts.experts, gate="w1", up="w3", down="w2")
        if experts.router.choice_bias:
            yield TensorMap(f"{module}.expert_bias", f"{PATH}/router/choice_bias")


class Model(Decoder):
    """An LFM2 with experts of the given config."""
