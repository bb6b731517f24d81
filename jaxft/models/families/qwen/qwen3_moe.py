"""Qwen3 30B-A3B and 235B-A22B: Qwen3 whose feed-forward layers are many small experts (arXiv:2505.09388)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.family import read_rope, read_sizes, with_defaults
from jaxft.models.moe import MUST_EQUAL, MoEConfig, check_experts, expert_tensors, read_count, read_window
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape

MODEL_TYPES = ("qwen3_moe",)
DEFAULTS = {
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "attention_bias": False, "use_sliding_window": False,
    "sliding_window": 4096, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001, "output_router_logits": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(MoEConfig):
    """Sizes under Hugging Face's names.

    Every decoder_sparse_step-th layer has experts, except those numbered in mlp_only_layers. The others have a
    feed-forward of intermediate_size.
    """

    attention_bias: bool
    num_experts: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        # transformers does not read max_window_layers here: a window is on all layers.
        used = ("use_sliding_window", "max_window_layers", "num_local_experts")
        sizes = read_sizes(hf, cls, used=used, must_equal=MUST_EQUAL | {"use_qk_norm": True})
        experts = read_count(hf, ("num_experts", "num_local_experts"), 128)
        check_experts(hf, experts)
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            sliding_window=read_window(hf["sliding_window"] if hf["use_sliding_window"] else None),
            attention_bias=hf["attention_bias"],
            num_experts=experts,
            **{name: hf[name] for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")},
            router_aux_loss_coef=hf["router_aux_loss_coef"],
            output_router_logits=hf["output_router_logits"],
            decoder_sparse_step=hf["decoder_sparse_step"],
            mlp_only_layers=tuple(hf["mlp_only_layers"]),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_act": "silu",
            "use_sliding_window": self.sliding_window is not None,
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Pre-norm layers with q and k norms of single heads, with experts or without."""
        bias = self.attention_bias
        form = ScoreForm(window=self.sliding_window)
        attention = self.attention(form=form, qk_norm="head", bias=bias, output_bias=bias)
        router = self.router(renormalize=self.norm_topk_prob)
        experts = self.experts(self.num_experts, self.moe_intermediate_size, router)
        return self.sparse(attention, experts, self.dense_layers())

    def dense_layers(self) -> frozenset[int]:
        """The numbers of the layers without experts."""
        step, layers = self.decoder_sparse_step, range(self.num_hidden_layers)
        return frozenset(i for i in layers if i in self.mlp_only_layers or (i + 1) % step)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        return expert_tensors("model.layers.{i}.mlp", self.num_experts, **names)


class Model(Decoder):
    """A Qwen3 with experts of the given config."""
