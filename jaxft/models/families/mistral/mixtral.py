"""Mixtral 8x7B and 8x22B: Mistral whose feed-forward layers are experts, two per token (arXiv:2401.04088)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import read_rope, read_sizes, with_defaults
from jaxft.models.moe import MUST_EQUAL, MoEConfig, check_experts, expert_tensors, read_window
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("mixtral",)
DEFAULTS = {
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None,
    "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
    "output_router_logits": False, "rope_theta": 1e6,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(MoEConfig):
    """Sizes under Hugging Face's names. intermediate_size: of one expert."""

    num_local_experts: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, must_equal=MUST_EQUAL)
        check_experts(hf, hf["num_local_experts"])
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            sliding_window=read_window(hf["sliding_window"]),
            num_local_experts=hf["num_local_experts"],
            num_experts_per_tok=hf["num_experts_per_tok"],
            router_aux_loss_coef=hf["router_aux_loss_coef"],
            output_router_logits=hf["output_router_logits"],
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        experts = self.experts(self.num_local_experts, self.intermediate_size, self.router(renormalize=True))
        return self.uniform(self.attention(form=ScoreForm(window=self.sliding_window)), experts)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        return expert_tensors(
            "model.layers.{i}.block_sparse_moe", self.num_local_experts, gate="w1", up="w3", down="w2"
        )


class Model(Decoder):
    """A Mixtral of the given config."""
