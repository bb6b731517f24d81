"""Families with recurrent layers or short convolutions, by Hugging Face's model_type."""

from jaxft.checkpoint.gguf.families.dense import GRANITE_FACTORS
from jaxft.checkpoint.gguf.families.experts import (
    GRANITE_EXPERTS,
    GRANITE_FUSED,
    QWEN_EXPERTS,
    SIGMOID,
    expert_fields,
)
from jaxft.checkpoint.gguf.family import ATTENTION, MLP, NORMS_BEFORE, QK_NORM, Family, Setting
from jaxft.checkpoint.gguf.layout.fused import GATE_UP, Fused

INTERVAL, SECTIONS = "full_attention_interval", "rope.dimension_sections"
SSM_INNER, SHARED_INNER = "ssm.inner_size", "expert_shared_feed_forward_length"
_LFM2 = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_LFM2_WHOLE = {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}
_LFM2_CONSTANTS = {"conv_bias": False}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_DELTA_NET = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    **ATTENTION,
    **QK_NORM,
}
_DELTA_TENSORS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_BETA_ALPHA = {"ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a"}
_DELTA_FIELDS = {
    "ssm.conv_kernel": Setting("linear_conv_kernel_dim", int),
    "ssm.state_size": Setting("linear_key_head_dim", int),
    "ssm.group_count": Setting("linear_num_key_heads", int),
    "ssm.time_step_rank": Setting("linear_num_value_heads", int),
}
_DELTA_EXPERT_FIELDS = expert_fields("num_experts") | {SHARED_INNER: Setting("shared_expert_intermediate_size", int)}
_PLAIN = {"hidden_act": "silu", "attention_bias": False}


def _mamba(module: str) -> dict[str, str]:
    names = {"ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_norm": "norm", "ssm_out": "out_proj"}
    return {ours: f"{module}.{theirs}" for ours, theirs in names.items()}


def _mamba_tensors(module: str) -> dict[str, str]:
    return {"ssm_a": f"{module}.A_log", "ssm_d": f"{module}.D", "ssm_dt.bias": f"{module}.dt_bias"}


def _granite(*, experts: bool) -> Family:
    """Granite 4: its feed-forward for all tokens is a shared expert if there are experts."""
    end = "_shexp" if experts else ""
    shared = {
        f"ffn_gate{end}": "shared_mlp.gate_proj",
        f"ffn_up{end}": "shared_mlp.up_proj",
        f"ffn_down{end}": "shared_mlp.output_linear",
    }
    gate_up = Fused(name="shared_mlp.input_linear.weight", single="shared_mlp.{part}", parts=GATE_UP)
    return Family(
        arch="granitehybrid",
        model_type="granitemoehybrid",
        variant="experts" if experts else "",
        architecture="GraniteMoeHybridForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | _mamba("mamba") | shared | (GRANITE_EXPERTS if experts else {}),
        tensors=_mamba_tensors("mamba"),
        fused=(gate_up, *(GRANITE_FUSED if experts else ())),
        interleaved=True,
        mamba="mamba_n_groups",
        by_layer=True,
        constants={"hidden_act": "silu", "mamba_proj_bias": False, "mamba_expand": 2},
        present={"attention_bias": "attn_q.bias", "mamba_conv_bias": "ssm_conv1d.bias"},
        experts="num_local_experts" if experts else None,
        mark="expert_count" if experts else None,
        fields=GRANITE_FACTORS
        | {
            "ssm.conv_kernel": Setting("mamba_d_conv", int),
            "ssm.state_size": Setting("mamba_d_state", int),
            "ssm.group_count": Setting("mamba_n_groups", int),
            "ssm.time_step_rank": Setting("mamba_n_heads", int),
        }
        | (
            {SHARED_INNER: Setting("shared_intermediate_size", int), **expert_fields("num_local_experts", inner=None)}
            if experts
            else {}
        ),
        settings=frozenset((SSM_INNER,)),
    )


def _nemotron(*, experts: bool) -> Family:
    """Nemotron-H: each layer has one part. A model with experts has no other feed-forwards."""
    routed = {
        "ffn_gate_inp": "mixer.gate",
        "ffn_up_exps": "mixer.experts.{e}.up_proj",
        "ffn_down_exps": "mixer.experts.{e}.down_proj",
        "ffn_up_shexp": "mixer.shared_experts.up_proj",
        "ffn_down_shexp": "mixer.shared_experts.down_proj",
    }
    fields = {
        "ssm.conv_kernel": Setting("conv_kernel", int),
        "ssm.state_size": Setting("ssm_state_size", int),
        "ssm.group_count": Setting("n_groups", int),
        "ssm.time_step_rank": Setting("mamba_num_heads", int),
    }
    of_experts = {
        **expert_fields("n_routed_experts"),
        SHARED_INNER: Setting("moe_shared_expert_intermediate_size", int),
        "expert_weights_norm": Setting("norm_topk_prob", bool, 0),
        "expert_weights_scale": Setting("routed_scaling_factor", default=1.0),
    }
    return Family(
        arch="nemotron_h_moe" if experts else "nemotron_h",
        model_type="nemotron_h",
        variant="experts" if experts else "",
        architecture="NemotronHForCausalLM",
        whole={"token_embd": "model.embed_tokens", "output_norm": "model.norm_f", "output": "lm_head"},
        layer={
            "attn_norm": "norm",
            "attn_q": "mixer.q_proj",
            "attn_k": "mixer.k_proj",
            "attn_v": "mixer.v_proj",
            "attn_output": "mixer.o_proj",
            **_mamba("mixer"),
            **(routed if experts else {"ffn_up": "mixer.up_proj", "ffn_down": "mixer.down_proj"}),
        },
        tensors=_mamba_tensors("mixer")
        | ({"exp_probs_b.bias": "mixer.gate.e_score_correction_bias"} if experts else {}),
        mamba="n_groups",
        by_layer=True,
        constants={
            "mamba_hidden_act": "silu",
            "mlp_hidden_act": "relu2",
            "use_bias": False,
            **({"mlp_bias": False} if experts else {}),
        },
        present={"use_conv_bias": "ssm_conv1d.bias"} | ({} if experts else {"mlp_bias": "ffn_up.bias"}),
        experts="n_routed_experts" if experts else None,
        fields=fields | (of_experts if experts else {}),
        fixed={"expert_shared_count": 1, "expert_group_count": 1} if experts else {},
        settings=frozenset((SSM_INNER,)),
    )


RECURRENT_FAMILIES = (
    Family(
        arch="lfm2",
        model_type="lfm2",
        architecture="Lfm2ForCausalLM",
        whole=_LFM2_WHOLE,
        layer=_LFM2,
        constants=_LFM2_CONSTANTS,
        by_layer=True,
        fields={"shortconv.l_cache": Setting("conv_L_cache", int)},
    ),
    Family(
        arch="lfm2moe",
        model_type="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        whole=_LFM2_WHOLE,
        layer=_LFM2
        | {
            "ffn_gate_inp": "feed_forward.gate",
            "ffn_gate_exps": "feed_forward.experts.{e}.w1",
            "ffn_up_exps": "feed_forward.experts.{e}.w3",
            "ffn_down_exps": "feed_forward.experts.{e}.w2",
        },
        tensors={"exp_probs_b.bias": "feed_forward.expert_bias"},
        constants=_LFM2_CONSTANTS | {"use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        by_layer=True,
        experts="num_experts",
        fields=expert_fields("num_experts")
        | {
            "shortconv.l_cache": Setting("conv_L_cache", int),
            "leading_dense_block_count": Setting("num_dense_layers", int, 0),
        },
        fixed={"expert_gating_func": SIGMOID},
    ),
    _granite(experts=False),
    _granite(experts=True),
    _nemotron(experts=False),
    _nemotron(experts=True),
    Family(
        arch="qwen3next",
        model_type="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        layer=_DELTA_NET | QWEN_EXPERTS | _SHARED_EXPERT | {"ssm_ba": "linear_attn.in_proj_ba"},
        tensors=_DELTA_TENSORS,
        norm_plus_one=True,
        prediction=True,
        partial=True,
        constants=_PLAIN | {"norm_topk_prob": True},
        experts="num_experts",
        fields=_DELTA_FIELDS | _DELTA_EXPERT_FIELDS,
        settings=frozenset((INTERVAL, SSM_INNER)),
    ),
    Family(
        arch="qwen35",
        model_type="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        layer=_DELTA_NET | _BETA_ALPHA | MLP,
        tensors=_DELTA_TENSORS,
        norm_plus_one=True,
        prediction=True,
        tiled_heads=True,
        partial=True,
        constants=_PLAIN,
        fields=_DELTA_FIELDS,
        settings=frozenset((INTERVAL, SSM_INNER, SECTIONS)),
    ),
    Family(
        arch="qwen35moe",
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        layer=_DELTA_NET | _BETA_ALPHA | QWEN_EXPERTS | _SHARED_EXPERT,
        tensors=_DELTA_TENSORS,
        norm_plus_one=True,
        prediction=True,
        tiled_heads=True,
        partial=True,
        constants=_PLAIN,
        experts="num_experts",
        fields=_DELTA_FIELDS | _DELTA_EXPERT_FIELDS,
        settings=frozenset((INTERVAL, SSM_INNER, SECTIONS)),
    ),
)
