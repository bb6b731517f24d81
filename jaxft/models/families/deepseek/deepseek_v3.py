"""DeepSeek V3 and R1, and Kimi K2: latent attention, and many experts beside a shared one (arXiv:2412.19437)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import LAYER, read_rope, read_sizes, with_defaults
from jaxft.models.moe import BalancedConfig, read_balanced
from jaxft.models.tensor_map import TensorMap, linear
from jaxft.nn.attention.latent import LatentShape
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.router import RouterShape

MODEL_TYPES = ("deepseek_v3",)
# For all families with latent attention; what differs is in the DEFAULTS of each.
LATENT_DEFAULTS = {
    "attention_bias": False, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "output_router_logits": False, "rope_interleave": True,
}  # fmt: skip
DEFAULTS = LATENT_DEFAULTS | {
    "max_position_embeddings": 4096, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True,
}  # fmt: skip
OWN = (
    "attention_bias", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "rope_interleave",
)  # fmt: skip
# The layers that predict several tokens at once are left out. The weights of the balancing losses are for pretraining.
USED = (
    "num_local_experts", "num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim", "ep_size", "seq_aux",
    "aux_loss_alpha",
)  # fmt: skip
ONLY = {"hidden_act": "silu", "moe_layer_freq": 1}
V3_ONLY = ONLY | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


@dataclass(frozen=True, kw_only=True)
class LatentConfig(BalancedConfig):
    """What the families with latent attention share. head_dim: of the rotated part of queries and keys."""

    attention_bias: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool

    def latent_layers(self, router: RouterShape) -> DecoderShape:
        """Pre-norm layers with latent attention, the first ones dense."""
        query_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        attention = LatentShape(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            query_rank=self.q_lora_rank,
            rank=self.kv_lora_rank,
            plain_dim=self.qk_nope_head_dim,
            rotated_dim=self.qk_rope_head_dim,
            value_dim=self.v_head_dim,
            scale=query_dim**-0.5 * self.rope.score_factor,
            pairs=self.rope_interleave,
            use_bias=self.attention_bias,
        )
        return self.sparse(attention, self.shared_and_routed(router), range(self.first_k_dense_replace))

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        return latent_tensors(block.mixer) if isinstance(block.mixer, LatentShape) else ()


def latent_tensors(shape: LatentShape) -> Iterator[TensorMap]:
    """The table's lines for a layer with latent attention."""
    module, path, bias = f"{LAYER}.self_attn", "layers/*/self_attn", shape.use_bias
    queries = {"q_proj": False} if shape.query_rank is None else {"q_a_proj": bias, "q_b_proj": False}
    for name, has_bias in (queries | {"kv_a_proj_with_mqa": bias, "kv_b_proj": False, "o_proj": bias}).items():
        yield from linear(f"{module}.{name}", f"{path}/{name}", bias=has_bias)
    for name in ("kv_a_layernorm",) if shape.query_rank is None else ("q_a_layernorm", "kv_a_layernorm"):
        yield TensorMap(f"{module}.{name}.weight", f"{path}/{name}/scale")


def read_latent(
    hf: Mapping[str, Any], family: type[LatentConfig], *, experts: int, must_equal: Mapping[str, Any],
    group_best: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a LatentConfig. experts: their number by default. Raises ModelError as `read_sizes` does."""
    query_dim = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    if hf.get("qk_head_dim") not in (None, query_dim):
        raise ModelError(
            f"qk_head_dim={hf['qk_head_dim']} is not {query_dim}, the sum of qk_nope_ and qk_rope_head_dim"
        )
    hf = {**hf, "head_dim": hf["qk_rope_head_dim"]}
    sizes = read_sizes(hf, family, used=USED, must_equal=must_equal)
    return {
        **sizes,
        "rope": read_rope(hf, hf["qk_rope_head_dim"]),
        **read_balanced(hf, experts=experts, group_best=group_best),
        **{name: hf[name] for name in OWN},
    }


@dataclass(frozen=True, kw_only=True)
class Config(LatentConfig):
    """Sizes under Hugging Face's names."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return cls(**read_latent(with_defaults(hf, DEFAULTS), cls, experts=256, must_equal=V3_ONLY))

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "num_nextn_predict_layers": 0,
            **self.hf_fields(),
        }

    def shape(self) -> DecoderShape:
        """Latent attention, and experts after the first layers."""
        return self.latent_layers(self.balanced_router())


class Model(Decoder):
    """A DeepSeek V3 of the given config."""
