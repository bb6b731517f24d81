"""Qwen3-Next 80B-A3B: delta-nets and gated attention, each followed by many small experts and a shared one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.qwen.qwen3_5 import ONLY, SHARED_DEFAULTS, USED, DeltaNetConfig, read_delta_net
from jaxft.models.family import LAYER, read_rope, read_sizes, with_defaults
from jaxft.models.moe import MUST_EQUAL, MoEConfig, check_experts, expert_tensors, shared_tensors
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("qwen3_next",)
# For this family and qwen3_5_moe; what differs is in the DEFAULTS of each.
EXPERT_DEFAULTS = SHARED_DEFAULTS | {
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "router_aux_loss_coef": 0.001, "output_router_logits": False,
}  # fmt: skip
DEFAULTS = EXPERT_DEFAULTS | {
    "intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": (),
}  # fmt: skip
OWN = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
       "router_aux_loss_coef", "output_router_logits")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeltaNetMoEConfig(DeltaNetConfig, MoEConfig):
    """What this family shares with qwen3_5_moe."""

    num_experts: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int

    def shared_and_chosen(self, *, renormalize: bool) -> MoEShape:
        """A layer of experts with a shared one, whose output a gate multiplies."""
        return self.experts(
            self.num_experts,
            self.moe_intermediate_size,
            self.router(renormalize=renormalize),
            shared=self.mlp(hidden=self.shared_expert_intermediate_size),
            shared_gate=True,
        )

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig."""
        module = f"{LAYER}.mlp"
        yield from expert_tensors(module, experts.experts, gate="gate_proj", up="up_proj", down="down_proj")
        if experts.shared is not None:
            yield from shared_tensors(experts.shared, f"{module}.shared_expert", gate=f"{module}.shared_expert_gate")


@dataclass(frozen=True, kw_only=True)
class Config(DeltaNetMoEConfig):
    """Sizes under Hugging Face's names. intermediate_size: of layers without experts."""

    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=USED, must_equal=MUST_EQUAL | ONLY)
        check_experts(hf, hf["num_experts"])
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"], partial=True),
            **read_delta_net(hf),
            **{name: hf[name] for name in (*OWN, "norm_topk_prob", "decoder_sparse_step")},
            mlp_only_layers=tuple(hf["mlp_only_layers"] or ()),
            sliding_window=None,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Delta-nets and gated attention in the order of `layer_types`, most of them before experts."""
        experts, dense = self.shared_and_chosen(renormalize=self.norm_topk_prob), self.mlp()
        sparse = (
            (i + 1) % self.decoder_sparse_step == 0 and i not in self.mlp_only_layers
            for i in range(self.num_hidden_layers)
        )
        return self.by_layer_type([experts if one else dense for one in sparse], grouped=True)


class Model(Decoder):
    """A Qwen3-Next of the given config."""
