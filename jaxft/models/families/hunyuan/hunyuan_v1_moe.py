"""Hunyuan A13B: the attention of Hunyuan without experts, and a shared expert beside those that are chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.families.hunyuan.hunyuan_v1_dense import ONLY as DENSE_ONLY
from jaxft.models.families.hunyuan.hunyuan_v1_dense import UNUSED, normed_after_rope_tensors, plain_alpha
from jaxft.models.family import LAYER, read_rope, read_sizes, with_defaults
from jaxft.models.hf_fields import tell_dropout
from jaxft.models.moe import RoutedConfig, check_experts, expert_tensors, read_count, shared_tensors
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("hunyuan_v1_moe",)
DEFAULTS = {
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False, "output_router_logits": False,
}  # fmt: skip
# transformers reads none of these; other values are those of models that it does not implement.
ONLY = {name: value for name, value in DENSE_ONLY.items() if name != "num_experts"} | {
    "routed_scaling_factor": 1.0, "use_mixed_mlp_moe": True, "moe_layer_num_skipped": 0, "norm_topk_prob": True,
    "n_group": None, "topk_group": None,
}  # fmt: skip
DROPOUT = ("attention_dropout",)
USED = (
    *UNUSED,
    *DROPOUT,
    "num_local_experts",
    "moe_drop_tokens",
    "moe_random_routing_dropped_token",
    "capacity_factor",
)


@dataclass(frozen=True, kw_only=True)
class Config(RoutedConfig):
    """Sizes under Hugging Face's names; num_experts_per_tok is moe_topk in files. intermediate_size: of one expert."""

    attention_bias: bool
    num_experts: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = plain_alpha(with_defaults(hf, DEFAULTS))
        lists = {name: _same_in_all(hf, name) for name in ("moe_topk", "moe_intermediate_size", "num_shared_expert")}
        hf = hf | {name: value for name, value in lists.items() if value is not None}
        only = ONLY | {"moe_intermediate_size": hf.get("intermediate_size"), "num_shared_expert": 1}
        sizes = read_sizes(hf, cls, used=(*USED, "moe_topk"), must_equal=only)
        tell_dropout(hf, DROPOUT)
        experts = read_count(hf, ("num_experts", "num_local_experts"), 1)
        chosen = read_count(hf, ("moe_topk", "num_experts_per_tok"), 1)
        check_experts({"moe_topk": chosen}, experts, "moe_topk")
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"], alpha=True),
            attention_bias=hf["attention_bias"],
            num_experts=experts,
            num_experts_per_tok=chosen,
            output_router_logits=hf["output_router_logits"],
        )

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        return {
            "architectures": ["HunYuanMoEV1ForCausalLM"],
            "model_type": "hunyuan_v1_moe",
            "hidden_act": "silu",
            "moe_topk": fields.pop("num_experts_per_tok"),
            **fields,
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers, all equal."""
        bias = self.attention_bias
        attention = self.attention(qk_norm="head", normed_after_rope=True, bias=bias, output_bias=bias)
        router = self.router(renormalize=True)
        return self.uniform(
            attention, self.experts(self.num_experts, self.intermediate_size, router, shared=self.mlp())
        )

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        return normed_after_rope_tensors(super().mixer_tensors(block))

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig."""
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        yield from expert_tensors(f"{LAYER}.mlp", experts.experts, **names, router="gate.wg")
        if experts.shared is not None:
            yield from shared_tensors(experts.shared, f"{LAYER}.mlp.shared_mlp")


class Model(Decoder):
    """A Hunyuan with experts of the given config."""


def _same_in_all(hf: Mapping[str, Any], field: str) -> Any:
    """A field that files give as one number, or as a list with an equal number for each layer."""
    value = hf.get(field)
    if not isinstance(value, list):
        return value
    if len(value) != hf.get("num_hidden_layers") or any(other != value[0] for other in value):
        raise ModelError(f"{field} has {len(value)} numbers: one for each layer, all equal, are implemented")
    return value[0]
