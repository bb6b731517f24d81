"""ERNIE 4.5 21B-A3B and 300B-A47B, the text models: shared experts, and a bias for the choice of the others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import LAYER, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.moe import PATH, RoutedConfig, check_experts, expert_tensors, read_count, shared_tensors
from jaxft.models.tensor_map import ONE_ROW, TensorMap
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("ernie4_5_moe",)
DEFAULTS = {
    "num_key_value_heads": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
OWN = (
    "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_interval",
    "moe_norm_min", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
# With use_bias the LM head has a bias too; no published model has it. transformers does not read the last two.
ONLY = {"hidden_act": "silu", "use_bias": False, "moe_gate": "topk", "moe_use_aux_free": True}
USED = ("moe_k", "num_experts", "moe_capacity", "num_nextn_predict_layers")


@dataclass(frozen=True, kw_only=True)
class Config(RoutedConfig):
    """Sizes under Hugging Face's names; num_experts_per_tok is moe_k in files.

    Every moe_layer_interval-th layer from moe_layer_start_index to moe_layer_end_index has experts. intermediate_size:
    of the others. moe_norm_min: the least number by which the weights of a token's experts are divided.
    """

    moe_intermediate_size: int
    moe_num_experts: int
    moe_num_shared_experts: int
    moe_layer_start_index: int
    moe_layer_end_index: int
    moe_layer_interval: int
    moe_norm_min: float
    router_aux_loss_coef: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=USED, must_equal=ONLY)
        experts = read_count(hf, ("moe_num_experts", "num_experts"), 64)
        chosen = read_count(hf, ("moe_k", "num_experts_per_tok"), 6)
        check_experts({"moe_k": chosen}, experts, "moe_k")
        end = hf["moe_layer_end_index"]
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            num_experts_per_tok=chosen,
            moe_num_experts=experts,
            moe_layer_end_index=hf["num_hidden_layers"] - 1 if end == -1 else end,
            **{name: hf[name] for name in OWN},
        )

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        return {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "hidden_act": "silu",
            "moe_k": fields.pop("num_experts_per_tok"),
            **fields,
        }

    def score_architecture(self) -> str:
        raise no_reward_model("ernie4_5_moe")

    def is_for_prediction(self, name: str) -> bool:
        """See FamilyConfig: `model.mtp_block.0.*` and others."""
        return name.startswith(("mtp_", "model.mtp_"))

    def shape(self) -> DecoderShape:
        """Pre-norm layers with neighbouring pairs rotated, with experts or without."""
        router = self.router(renormalize=True, choice_bias=True, least_sum=self.moe_norm_min)
        inner, shared = self.moe_intermediate_size, self.moe_num_shared_experts
        experts = self.experts(
            self.moe_num_experts,
            inner,
            router,
            shared=self.mlp(hidden=inner * shared) if shared else None,
        )
        return self.sparse(self.attention(pairs=True), experts, self.dense_layers())

    def dense_layers(self) -> frozenset[int]:
        """The numbers of the layers without experts."""
        first, last, interval = self.moe_layer_start_index, self.moe_layer_end_index, self.moe_layer_interval
        layers = range(self.num_hidden_layers)
        return frozenset(i for i in layers if (i + 1) % interval or not first <= i <= last)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig."""
        module = f"{LAYER}.mlp"
        yield from expert_tensors(module, experts.experts, gate="gate_proj", up="up_proj", down="down_proj")
        bias = f"{module}.moe_statics.e_score_correction_bias"
        yield TensorMap(bias, f"{PATH}/router/choice_bias", ONE_ROW)
        if experts.shared is not None:
            yield from shared_tensors(experts.shared, f"{module}.shared_experts")


class Model(Decoder):
    """An ERNIE 4.5 with experts of the given config."""
