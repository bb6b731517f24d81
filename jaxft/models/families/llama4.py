"""Llama 4 Scout and Maverick, text only: attention within chunks, layers without positions, one expert of many a token.

Source: the model cards of Llama 4; for layers without positions arXiv:2501.18795.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.models.families.smollm3 import read_ropes
from jaxft.models.family import (
    FULL,
    LAYER,
    dense_tensors,
    no_reward_model,
    read_layer_types,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.models.hf_fields import tell_dropout
from jaxft.models.moe import PATH, RoutedConfig, check_experts, shared_tensors
from jaxft.models.tensor_map import TensorMap, linear
from jaxft.nn.attention.shape import AttentionShape, QueryGrowth
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape

MODEL_TYPES = ("llama4_text",)
CHUNKED = "chunked_attention"
DEFAULTS = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_experts_per_tok": 1,
    "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True, "output_router_logits": False,
    "router_aux_loss_coef": 0.001, "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192,
    "attn_scale": 0.1, "attention_bias": False,
}  # fmt: skip
OWN = (
    "intermediate_size_mlp", "num_experts_per_tok", "num_local_experts", "use_qk_norm", "output_router_logits",
    "router_aux_loss_coef", "attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale",
    "attention_bias",
)  # fmt: skip
DROPOUT = ("attention_dropout",)
USED = ("no_rope_layer_interval", "interleave_moe_layer_step", "for_llm_compressor", *DROPOUT)
ONLY = {"hidden_act": "silu", "router_jitter_noise": 0.0, "num_experts_per_tok": 1}


@dataclass(frozen=True, kw_only=True)
class Config(RoutedConfig):
    """Sizes under Hugging Face's names.

    intermediate_size: of one expert and of the shared one; intermediate_size_mlp: of layers without experts, which are
    those not in moe_layers. no_rope_layers: 1 for a layer with a rope, 0 for one without. use_qk_norm: whether layers
    with a rope normalise queries and keys. attention_chunk_size: of CHUNKED layers in layer_types.
    attn_temperature_tuning: whether queries of layers without a rope grow with their position.
    """

    intermediate_size_mlp: int
    num_local_experts: int
    moe_layers: tuple[int, ...]
    no_rope_layers: tuple[int, ...]
    layer_types: tuple[str, ...]
    use_qk_norm: bool
    router_aux_loss_coef: float
    attention_chunk_size: int | None
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_defaults(hf, DEFAULTS)
        sizes = read_sizes(hf, cls, used=USED, must_equal=ONLY)
        tell_dropout(hf, DROPOUT)
        check_experts(hf, hf["num_local_experts"])
        count, step, ropes = hf["num_hidden_layers"], hf["interleave_moe_layer_step"], read_ropes(hf)
        chunks = hf["attention_chunk_size"] is not None
        return cls(
            **sizes,
            rope=read_rope(hf, sizes["head_dim"]),
            moe_layers=tuple(hf.get("moe_layers", range(step - 1, count, step))),
            no_rope_layers=ropes,
            layer_types=read_layer_types(
                hf, [CHUNKED if rope and chunks else FULL for rope in ropes], (CHUNKED, FULL) if chunks else (FULL,)
            ),
            **{name: hf[name] for name in OWN},
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "hidden_act": "silu",
            **self.hf_fields(),
        }

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("llama4_text")

    def shape(self) -> DecoderShape:
        """Pre-norm layers with and without a rope, with and without experts."""
        norm, router = NormShape(eps=self.rms_norm_eps), self.router(renormalize=False, scores="sigmoid", on_input=True)
        experts = self.experts(
            self.num_local_experts, self.intermediate_size, router, fused="halves", shared=self.mlp()
        )
        dense, sparse = self.mlp(hidden=self.intermediate_size_mlp), set(self.moe_layers)
        layers = tuple(
            BlockShape(mixer=self._attention(rope, kind), mlp=experts if number in sparse else dense, norm=norm)
            for number, (rope, kind) in enumerate(zip(self.no_rope_layers, self.layer_types, strict=True))
        )
        return DecoderShape(layers=layers, ropes=(self.rope,), norm=norm)

    def _attention(self, has_rope: int, kind: str) -> AttentionShape:
        grows = self.attn_temperature_tuning and not has_rope
        normed = self.use_qk_norm and bool(has_rope)
        return self.attention(
            bias=self.attention_bias, output_bias=self.attention_bias, rope=0 if has_rope else None, pairs=True,
            qk_norm="head" if normed else None, normed_after_rope=normed, unscaled_qk=normed,
            chunk=self.attention_chunk_size if kind == CHUNKED else None,
            growth=QueryGrowth(self.floor_scale, self.attn_scale) if grows else None,
        )  # fmt: skip

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        if isinstance(block.mlp, MLPShape):
            return dense_tensors(block.mlp, f"{LAYER}.feed_forward")
        return super().mlp_tensors(block)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig. Files store all experts in one tensor, inputs first, as we do."""
        module = f"{LAYER}.feed_forward"
        yield from linear(f"{module}.router", f"{PATH}/router")
        for name in ("gate_up_proj", "down_proj"):
            yield TensorMap(f"{module}.experts.{name}", f"{PATH}/{name}/kernel")
        if experts.shared is not None:
            yield from shared_tensors(experts.shared, f"{module}.shared_expert")


class Model(Decoder):
    """A Llama 4 of the given config."""
