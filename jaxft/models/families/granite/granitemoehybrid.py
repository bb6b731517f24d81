"""Granite 4: layers with Mamba-2, some with attention, and dense feed-forwards or experts with a shared one."""

# Source: Granite 4.0 model cards; Mamba-2, arXiv:2405.21060

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.families.granite.granite import FACTORS
from jaxft.models.family import FULL, LAYER, FamilyConfig, no_reward_model, read_rope, read_sizes, with_defaults
from jaxft.models.hf_fields import tell_dropout
from jaxft.models.mamba import NO_BOUNDS, mamba_tensors, with_bounds
from jaxft.models.moe import PATH, check_experts
from jaxft.models.tensor_map import EACH_TRANSPOSED, TensorMap, linear
from jaxft.nn.attention.score_form import ScoreForm
from jaxft.nn.block import BlockShape
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.experts.router import RouterShape
from jaxft.nn.norm import NormShape
from jaxft.nn.recurrent.mamba import Mamba2Shape

MODEL_TYPES = ("granitemoehybrid",)
LINEAR = "linear_attention"
# transformers 4 writes the types of layers in other words, which transformers 5 reads too.
OLD_NAMES = {LINEAR: "mamba", FULL: "attention"}
DEFAULTS = {
    "max_position_embeddings": 2048, "attention_bias": False, "num_local_experts": 8, "num_experts_per_tok": 2,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "shared_intermediate_size": 1024,
    "position_embedding_type": None, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256,
    "mamba_d_head": "auto", "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False,
    **dict.fromkeys(FACTORS, 1.0),
}  # fmt: skip
OWN = (
    "attention_bias", "num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
    "shared_intermediate_size", "position_embedding_type", "mamba_n_heads", "mamba_n_groups", "mamba_d_state",
    "mamba_d_conv", "mamba_expand", "mamba_conv_bias", "mamba_proj_bias",
)  # fmt: skip
DROPOUT = ("attention_dropout",)
# In how many positions a row is cut changes no number.
USED = ("mamba_chunk_size", "mamba_d_head", "layers_block_type", "normalization_function", *DROPOUT)
ONLY = {"hidden_act": "silu", "time_step_limit": NO_BOUNDS}


@dataclass(frozen=True, kw_only=True)
class Config(FamilyConfig):
    """Sizes under Hugging Face's names. The four factors: as in Granite 3.

    layer_types: LINEAR or FULL for each layer. intermediate_size: of one expert. num_local_experts: 0 for a model
    without experts. shared_intermediate_size: of the feed-forward that every token passes. position_embedding_type:
    `rope`, or anything else for attention without positions.
    """

    layer_types: tuple[str, ...]
    attention_bias: bool
    num_local_experts: int
    num_experts_per_tok: int
    output_router_logits: bool
    router_aux_loss_coef: float
    shared_intermediate_size: int
    position_embedding_type: str | None
    mamba_n_heads: int
    mamba_n_groups: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_expand: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_bounds(with_defaults(hf, DEFAULTS))
        sizes = read_sizes(hf, cls, used=USED, must_equal=ONLY)
        tell_dropout(hf, DROPOUT)
        if hf["num_local_experts"]:
            check_experts(hf, hf["num_local_experts"])
        _check_heads(hf)
        factors: dict[str, Any] = {name: float(hf[name]) for name in FACTORS}
        own: dict[str, Any] = {name: hf[name] for name in OWN}
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), layer_types=_layer_types(hf), **own, **factors)

    def to_hf(self) -> dict[str, Any]:
        return {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            "hidden_act": "silu",
            **self.hf_fields(),
            "layer_types": [OLD_NAMES[kind] for kind in self.layer_types],
            "mamba_d_head": self.hidden_size * self.mamba_expand // self.mamba_n_heads,
        }

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("granitemoehybrid")

    def shape(self) -> DecoderShape:
        """Mamba-2 and attention in the order of `layer_types`, each before the same feed-forward."""
        norm, bias = NormShape(eps=self.rms_norm_eps), self.attention_bias
        shared = self.mlp(hidden=self.shared_intermediate_size, fused=True)
        mlp = shared if not self.num_local_experts else MoEShape(
            width=self.hidden_size, hidden=self.intermediate_size, experts=self.num_local_experts,
            router=RouterShape(chosen=self.num_experts_per_tok, renormalize=True), fused="halves", shared=shared,
        )  # fmt: skip
        mamba = Mamba2Shape(
            width=self.hidden_size, heads=self.mamba_n_heads,
            head_dim=self.hidden_size * self.mamba_expand // self.mamba_n_heads, groups=self.mamba_n_groups,
            state_dim=self.mamba_d_state, taps=self.mamba_d_conv, use_bias=self.mamba_proj_bias,
            use_conv_bias=self.mamba_conv_bias,
        )  # fmt: skip
        rope = 0 if self.position_embedding_type == "rope" else None
        form = ScoreForm(scale=self.attention_multiplier)
        attention = self.attention(form=form, bias=bias, output_bias=bias, rope=rope)
        blocks = {
            kind: BlockShape(mixer=mixer, mlp=mlp, norm=norm, residual_scale=self.residual_multiplier)
            for kind, mixer in ((LINEAR, mamba), (FULL, attention))
        }
        return DecoderShape(
            layers=tuple(blocks[kind] for kind in self.layer_types),
            ropes=(self.rope,),
            norm=norm,
            embed_scale=self.embedding_multiplier,
            logit_scale=1 / self.logits_scaling,
        )

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        if isinstance(block.mixer, Mamba2Shape):
            return mamba_tensors(block.mixer, f"{LAYER}.mamba")
        return super().mixer_tensors(block)

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig. Files keep gate and up of a feed-forward in one tensor, and all experts of a layer too."""
        names = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
        has_experts = isinstance(block.mlp, MoEShape)
        shared = f"{PATH}/shared_expert" if has_experts else PATH
        lines = [line for ours, hf in names.items() for line in linear(f"{LAYER}.shared_mlp.{hf}", f"{shared}/{ours}")]
        if has_experts:
            module = f"{LAYER}.block_sparse_moe"
            lines += linear(f"{module}.router.layer", f"{PATH}/router")
            lines += [
                TensorMap(f"{module}.{hf}.weight", f"{PATH}/{ours}/kernel", EACH_TRANSPOSED)
                for ours, hf in names.items()
            ]
        return lines


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The types of layers in transformers 5's words. Raises ModelError for others, and for a wrong number."""
    given = hf.get("layer_types") or hf.get("layers_block_type") or [LINEAR] * hf["num_hidden_layers"]
    new_names = {old: new for new, old in OLD_NAMES.items()}
    types = tuple(new_names.get(kind, kind) for kind in given)
    unknown = sorted(set(types) - set(OLD_NAMES))
    if unknown or len(types) != hf["num_hidden_layers"]:
        raise ModelError(
            f"layer_types must name mamba or attention for each of num_hidden_layers={hf['num_hidden_layers']} layers, "
            f"got {len(types)}" + (f" with {', '.join(unknown)}" if unknown else "")
        )
    return types


def _check_heads(hf: Mapping[str, Any]) -> None:
    """Raises ModelError if the sizes of Mamba-2 do not belong together."""
    inner, heads, groups = hf["mamba_expand"] * hf["hidden_size"], hf["mamba_n_heads"], hf["mamba_n_groups"]
    if inner % heads or heads % groups or hf["mamba_d_head"] not in ("auto", None, inner // heads):
        raise ModelError(
            f"mamba_n_heads={heads} of mamba_d_head={hf['mamba_d_head']!r} in mamba_n_groups={groups} do not divide "
            f"the inner width {inner} (mamba_expand x hidden_size)"
        )


class Model(Decoder):
    """A Granite 4 of the given config."""
