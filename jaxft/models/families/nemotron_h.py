"""Nemotron Nano 9B and 12B v2, Nemotron 3 Nano: Mamba-2, attention without positions, and feed-forwards or experts.

Each layer has one of them. Source: arXiv:2504.03624 and arXiv:2512.20848.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.family import (
    FULL,
    LAYER,
    attention_tensors,
    dense_tensors,
    no_reward_model,
    read_rope,
    read_sizes,
    with_defaults,
)
from jaxft.models.field_kinds import check_config
from jaxft.models.hf_fields import tell_dropout
from jaxft.models.mamba import NO_BOUNDS, mamba_tensors, with_bounds
from jaxft.models.moe import EPSILON, PATH, RoutedConfig, check_experts, check_groups, expert_tensors, shared_tensors
from jaxft.models.tensor_map import TensorMap
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.block import BlockShape, NormNames
from jaxft.nn.decoder import Decoder, DecoderShape
from jaxft.nn.experts.layer import MoEShape
from jaxft.nn.mlp import MLPShape
from jaxft.nn.norm import NormShape
from jaxft.nn.recurrent.mamba import Mamba2Shape

MODEL_TYPES = ("nemotron_h",)
LINEAR, MLP, MOE = "linear_attention", "mlp", "moe"
# The letters of hybrid_override_pattern, and transformers 4's words in layers_block_type.
LETTERS = {"M": LINEAR, "*": FULL, "-": MLP, "E": MOE}
OLD_NAMES = {"mamba": LINEAR, "attention": FULL}
DEFAULTS = {
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096, "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-5, "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
    "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
    "time_step_min": 0.001, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "output_router_logits": False,
}  # fmt: skip
# Fields of Config that are read as they are.
OWN = (
    "mlp_bias", "use_bias", "use_conv_bias", "mamba_num_heads", "mamba_head_dim", "n_groups",
    "ssm_state_size", "conv_kernel", "time_step_min", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "moe_shared_expert_intermediate_size", "routed_scaling_factor", "n_group", "topk_group",
    "norm_topk_prob", "output_router_logits",
)  # fmt: skip
DROPOUT = ("attention_dropout", "hidden_dropout")
# How a state is computed and stored, how weights were drawn, and layers that predict several tokens at once. `expand`
# says nothing beside mamba_num_heads and mamba_head_dim; an attention without positions has no partial rotation.
USED = (
    "layer_types", "hybrid_override_pattern", "norm_eps", "expand", "chunk_size", "mamba_ssm_cache_dtype",
    "use_mamba_kernels", "moe_shared_expert_overlap", "num_logits_to_keep", "rescale_prenorm_residual",
    "time_step_max", "time_step_floor", "num_nextn_predict_layers", "mtp_layers_block_type",
    "mtp_hybrid_override_pattern", "partial_rotary_factor", "num_local_experts", *DROPOUT,
)  # fmt: skip
ONLY = {
    "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "mamba_proj_bias": False, "sliding_window": None,
    "residual_in_fp32": False, "moe_latent_size": None, "n_shared_experts": 1, "time_step_limit": NO_BOUNDS,
}  # fmt: skip
BEFORE_MIXER: NormNames = ("norm", None, None, None)
BEFORE_MLP: NormNames = (None, None, "norm", None)


@dataclass(frozen=True, kw_only=True)
class Config(RoutedConfig):
    """Sizes under Hugging Face's names.

    layers_block_type: LINEAR, FULL, MLP or MOE for each layer. rms_norm_eps: called layer_norm_epsilon in files.
    intermediate_size: of MLP layers; moe_intermediate_size: of one expert. time_step_min: the least time step.
    """

    final_norm = "model.norm_f"
    names_in_files = (("model.embed_tokens.", "backbone.embeddings."), ("model.", "backbone."))

    layers_block_type: tuple[str, ...]
    mlp_bias: bool
    use_bias: bool
    use_conv_bias: bool
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    time_step_min: float
    n_routed_experts: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    norm_topk_prob: bool

    def is_for_prediction(self, name: str) -> bool:
        """See FamilyConfig."""
        return name.startswith("mtp.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        hf = with_bounds(with_defaults(hf, DEFAULTS))
        types = _layer_types(hf)
        hf |= {"num_hidden_layers": len(types), "rms_norm_eps": _eps(hf)}
        check_config(hf)  # the number of layers too
        sizes = read_sizes(hf, cls, used=("layer_norm_epsilon", *USED), must_equal=ONLY)
        tell_dropout(hf, DROPOUT)
        _check_mamba(hf)
        if MOE in types:
            check_experts(hf, hf["n_routed_experts"])
            check_groups(hf, hf["n_routed_experts"], group_best=2)
        own: dict[str, Any] = {name: hf[name] for name in OWN}
        return cls(**sizes, rope=read_rope(hf, sizes["head_dim"]), layers_block_type=types, **own)

    def to_hf(self) -> dict[str, Any]:
        fields = self.hf_fields()
        letters = {kind: letter for letter, kind in LETTERS.items()}
        return {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "mamba_hidden_act": "silu",
            "mlp_hidden_act": "relu2",
            "n_shared_experts": 1,
            "layer_norm_epsilon": fields.pop("rms_norm_eps"),
            "hybrid_override_pattern": "".join(letters[kind] for kind in self.layers_block_type),
            **fields,
        }

    def score_architecture(self) -> str:
        """See FamilyConfig."""
        raise no_reward_model("nemotron_h")

    def shape(self) -> DecoderShape:
        """Layers of one part each, after a norm."""
        norm = NormShape(eps=self.rms_norm_eps)
        mamba = Mamba2Shape(
            width=self.hidden_size, heads=self.mamba_num_heads, head_dim=self.mamba_head_dim, groups=self.n_groups,
            state_dim=self.ssm_state_size, taps=self.conv_kernel, shortest=self.time_step_min, use_bias=self.use_bias,
            use_conv_bias=self.use_conv_bias, adapt_output=False,  # PEFT refuses adapters there
        )  # fmt: skip
        blocks = {
            LINEAR: BlockShape(mixer=mamba, mlp=None, norm=norm, norms=BEFORE_MIXER),
            FULL: BlockShape(mixer=self.attention(rope=None), mlp=None, norm=norm, norms=BEFORE_MIXER),
            MLP: BlockShape(mixer=None, mlp=self._plain(self.intermediate_size), norm=norm, norms=BEFORE_MLP),
            MOE: BlockShape(mixer=None, mlp=self._experts(), norm=norm, norms=BEFORE_MLP),
        }
        return DecoderShape(layers=tuple(map(blocks.__getitem__, self.layers_block_type)), ropes=(), norm=norm)

    def _plain(self, hidden: int) -> MLPShape:
        return self.mlp(activation="relu2", gated=False, bias=self.mlp_bias, hidden=hidden)

    def _experts(self) -> MoEShape:
        router = self.router(
            renormalize=self.norm_topk_prob, scores="sigmoid", choice_bias=True, groups=self.n_group,
            chosen_groups=self.topk_group, group_best=2, epsilon=EPSILON, scale=self.routed_scaling_factor,
        )  # fmt: skip
        shared = self._plain(self.moe_shared_expert_intermediate_size)
        return self.experts(
            self.n_routed_experts, self.moe_intermediate_size, router, activation="relu2", gated=False, shared=shared
        )

    def mixer_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        module = f"{LAYER}.mixer"
        if isinstance(block.mixer, Mamba2Shape):
            return mamba_tensors(block.mixer, module)
        return attention_tensors(block.mixer, module) if isinstance(block.mixer, AttentionShape) else ()

    def mlp_tensors(self, block: BlockShape) -> Iterable[TensorMap]:
        """See FamilyConfig."""
        module = f"{LAYER}.mixer"
        return dense_tensors(block.mlp, module) if isinstance(block.mlp, MLPShape) else super().mlp_tensors(block)

    def moe_tensors(self, experts: MoEShape) -> Iterable[TensorMap]:
        """See RoutedConfig."""
        module = f"{LAYER}.mixer"
        yield from expert_tensors(module, experts.experts, gate=None, up="up_proj", down="down_proj")
        yield TensorMap(f"{module}.gate.e_score_correction_bias", f"{PATH}/router/choice_bias")
        if experts.shared is not None:
            yield from shared_tensors(experts.shared, f"{module}.shared_experts")


class Model(Decoder):
    """A Nemotron-H of the given config."""


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The types of layers in transformers 5's words. Raises ModelError for others, and for a wrong number."""
    pattern = hf.get("hybrid_override_pattern") or ""
    given = hf.get("layers_block_type") or hf.get("layer_types") or [LETTERS.get(letter, letter) for letter in pattern]
    if not given:
        raise ModelError("a config.json of model_type 'nemotron_h' needs layers_block_type or hybrid_override_pattern")
    types = tuple(OLD_NAMES.get(kind, kind) for kind in given)
    unknown = sorted(set(types) - set(LETTERS.values()))
    if unknown:
        raise ModelError(
            f"the layers of model_type 'nemotron_h' are {', '.join(LETTERS.values())} (in hybrid_override_pattern "
            f"{' '.join(LETTERS)}), got {', '.join(unknown)}"
        )
    if hf.get("num_hidden_layers") not in (None, len(types)):
        raise ModelError(f"num_hidden_layers={hf['num_hidden_layers']}, but the types of {len(types)} layers are given")
    return types


def _eps(hf: Mapping[str, Any]) -> float:
    """The eps of norms. Raises ModelError if its names in config.json differ: transformers reads the first alone."""
    eps = hf["layer_norm_epsilon"]
    for name in ("norm_eps", "rms_norm_eps"):
        if hf.get(name, eps) != eps:
            raise ModelError(f"layer_norm_epsilon={eps} and {name}={hf[name]} must be equal: both are of the norms")
    return float(eps)


def _check_mamba(hf: Mapping[str, Any]) -> None:
    """Raises ModelError if the sizes of Mamba-2 do not belong together."""
    heads, groups = hf["mamba_num_heads"], hf["n_groups"]
    if heads % groups:
        raise ModelError(f"mamba_num_heads={heads} is not a multiple of n_groups={groups}")
