"""Families with experts, by Hugging Face's model_type."""

from jaxft.checkpoint.gguf.families.dense import GRANITE_FACTORS, HUNYUAN_NORMS
from jaxft.checkpoint.gguf.family import (
    ATTENTION,
    DENSE,
    MLP,
    NORMS_AROUND,
    NORMS_BEFORE,
    PER_LAYER,
    PER_LAYER_WHOLE,
    QK_NORM,
    WINDOW,
    WINDOW_PATTERN,
    YARN_LOG,
    Family,
    Setting,
)
from jaxft.checkpoint.gguf.layout.fused import Fused, fused_experts

# GGUF keeps a layer's experts as one tensor [experts, outputs, inputs]; `{e}` is the number of an expert.
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_OSS_EXPERTS = {
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_HUNYUAN_EXPERTS = QWEN_EXPERTS | {
    "ffn_gate_inp": "mlp.gate.wg",
    "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
    "ffn_up_shexp": "mlp.shared_mlp.up_proj",
    "ffn_down_shexp": "mlp.shared_mlp.down_proj",
}
_LLAMA4_MLP = {
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_exps": "feed_forward.experts.{e}.gate_proj",
    "ffn_up_exps": "feed_forward.experts.{e}.up_proj",
    "ffn_down_exps": "feed_forward.experts.{e}.down_proj",
    "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
    "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
    "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
}
GRANITE_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.down_proj",
}
GRANITE_FUSED = fused_experts(
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.experts.{e}.{part}",
)
_LATENT = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_output": "self_attn.o_proj",
}
_V2 = {"norm_topk_prob": False, "topk_method": "greedy"}
# Settings of latent attention, which are read and written by functions.
LATENT_SETTINGS = frozenset(
    ("attention.key_length_mla", "attention.value_length_mla", "attention.q_lora_rank", YARN_LOG)
)
_LOCAL = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
# Settings of Gemma 4, which are read and written by functions.
GEMMA4_SETTINGS = frozenset((WINDOW, WINDOW_PATTERN, "final_logit_softcapping", *(f"{key}_swa" for key in _LOCAL)))
PER_LAYER_FIELDS = {
    "embedding_length_per_layer_input": Setting("hidden_size_per_layer_input", int, 0),
    "attention.shared_kv_layers": Setting("num_kv_shared_layers", int, 0),
}
SOFTMAX, SIGMOID = 1, 2  # of expert_gating_func


def expert_fields(count: str, *, inner: str | None = "moe_intermediate_size") -> dict[str, Setting]:
    """Keys of experts. count, inner: the config fields with their number and with the inner units of one."""
    fields = {"expert_count": Setting(count, int), "expert_used_count": Setting("num_experts_per_tok", int)}
    return fields | ({"expert_feed_forward_length": Setting(inner, int)} if inner else {})


_EXPERT_SETTINGS = frozenset(("expert_count", "expert_used_count"))


def _gemma4(*, experts: bool) -> Family:
    """Gemma 4, whose experts are beside the feed-forward."""
    norms = {
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
    }
    routed = {
        "ffn_gate_inp": "router.proj",
        "ffn_gate_up_exps": "experts.{e}.gate_up_proj",
        "ffn_down_exps": "experts.{e}.down_proj",
    }
    scales = {"ffn_gate_inp.scale": "router.scale", "ffn_down_exps.scale": "router.per_expert_scale"}
    names = ("gate_up_proj", "down_proj") if experts else ()
    of_experts = expert_fields("num_experts") | {"expert_used_count": Setting("top_k_experts", int)}
    return Family(
        arch="gemma4",
        model_type="gemma4_text",
        variant="experts" if experts else "",
        architecture="Gemma4ForCausalLM",
        layer=NORMS_AROUND | ATTENTION | QK_NORM | MLP | PER_LAYER | (norms | routed if experts else {}),
        whole=PER_LAYER_WHOLE,
        unadapted=("per_layer_model_proj", "per_layer_token_embd"),
        tensors={"layer_output_scale.weight": "layer_scalar"} | (scales if experts else {}),
        fused=tuple(Fused(name=f"experts.{name}", single="experts.{e}.{part}", parts=(name,)) for name in names),
        constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        by_layer=True,
        experts="num_experts" if experts else None,
        mark="expert_count" if experts else None,
        fields=PER_LAYER_FIELDS | (of_experts if experts else {}),
        settings=GEMMA4_SETTINGS,
    )


def _deepseek(*, version: int) -> Family:
    """DeepSeek V2 and V3 have one architecture, and other routers."""
    fields = {
        "expert_shared_count": Setting("n_shared_experts", int),
        "leading_dense_block_count": Setting("first_k_dense_replace", int, 0),
        "expert_weights_scale": Setting("routed_scaling_factor", default=1.0),
        "attention.kv_lora_rank": Setting("kv_lora_rank", int),
    }
    of_v3 = {
        "expert_weights_norm": Setting("norm_topk_prob", bool, 0),
        "expert_group_count": Setting("n_group", int, 1),
        "expert_group_used_count": Setting("topk_group", int, 1),
    }
    new = version == 3
    return Family(
        arch="deepseek2",
        model_type=f"deepseek_v{version}",
        architecture=f"DeepseekV{version}ForCausalLM",
        layer=NORMS_BEFORE | _LATENT | MLP | QWEN_EXPERTS | _SHARED,
        tensors={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"} if new else {},
        constants={"hidden_act": "silu", "attention_bias": False, **({} if new else _V2)},
        latent=True,
        prediction=new,
        experts="n_routed_experts",
        fields=fields | expert_fields("n_routed_experts") | (of_v3 if new else {}),
        fixed={"expert_gating_func": SIGMOID} if new else {"expert_gating_func": SOFTMAX, "expert_weights_norm": False},
        settings=LATENT_SETTINGS,
        mark="expert_gating_func" if new else None,
        mark_value=SIGMOID if new else None,
    )


EXPERT_FAMILIES = (
    Family(
        arch="llama",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | _MIXTRAL_EXPERTS,
        interleaved=True,
        experts="num_local_experts",
        settings=_EXPERT_SETTINGS,
        mark="expert_count",
    ),
    Family(
        arch="qwen3moe",
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | QK_NORM | QWEN_EXPERTS,
        experts="num_experts",
        settings=_EXPERT_SETTINGS | {"expert_feed_forward_length"},
    ),
    Family(
        arch="gpt-oss",
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        layer={
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            **ATTENTION,
            **_OSS_EXPERTS,
        },
        tensors={"attn_sinks.weight": "self_attn.sinks"},
        fused=fused_experts(
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "mlp.experts.{e}.{part}",
            biases=True,
            alternate=True,
            outputs_first=False,
        ),
        experts="num_local_experts",
        settings=_EXPERT_SETTINGS | {"expert_feed_forward_length", WINDOW, WINDOW_PATTERN},
    ),
    Family(
        arch="granitemoe",
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | GRANITE_EXPERTS,
        fused=GRANITE_FUSED,
        interleaved=True,
        present={"attention_bias": "attn_q.bias"},
        experts="num_local_experts",
        fields=GRANITE_FACTORS | expert_fields("num_local_experts", inner=None),
    ),
    Family(
        arch="glm4moe",
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        layer={
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            **ATTENTION,
            **QK_NORM,
            **MLP,
            **QWEN_EXPERTS,
            **_SHARED,
        },
        tensors={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
        present={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
        partial=True,
        prediction=True,
        experts="n_routed_experts",
        fields=expert_fields("n_routed_experts")
        | {
            "expert_shared_count": Setting("n_shared_experts", int),
            "leading_dense_block_count": Setting("first_k_dense_replace", int, 0),
            "expert_weights_scale": Setting("routed_scaling_factor", default=1.0),
            "expert_weights_norm": Setting("norm_topk_prob", bool, 0),
        },
        fixed={"expert_gating_func": SIGMOID},
    ),
    Family(
        arch="ernie4_5-moe",
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        layer=DENSE | QWEN_EXPERTS | _SHARED,
        tensors={"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
        experts="moe_num_experts",
        fields=expert_fields("moe_num_experts")
        | {
            "expert_shared_count": Setting("moe_num_shared_experts", int, 0),
            "leading_dense_block_count": Setting("moe_layer_start_index", int, 0),
            "interleave_moe_layer_step": Setting("moe_layer_interval", int),
        },
        settings=frozenset(("expert_shared_feed_forward_length",)),
    ),
    Family(
        arch="hunyuan-moe",
        model_type="hunyuan_v1_moe",
        architecture="HunYuanMoEV1ForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | HUNYUAN_NORMS | _HUNYUAN_EXPERTS,
        constants={"hidden_act": "silu", "attention_bias": False},
        experts="num_experts",
        fields=expert_fields("num_experts", inner=None),
        fixed={"expert_shared_count": 1},
        settings=frozenset(("expert_feed_forward_length", "expert_shared_feed_forward_length")),
    ),
    # The layers with experts and those without a rope follow from two numbers.
    Family(
        arch="llama4",
        model_type="llama4_text",
        architecture="Llama4ForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | _LLAMA4_MLP,
        fused=fused_experts(
            "feed_forward.experts.gate_up_proj",
            "feed_forward.experts.down_proj",
            "feed_forward.experts.{e}.{part}",
            outputs_first=False,
        ),
        constants={"hidden_act": "silu", "attention_bias": False},
        experts="num_local_experts",
        fields=expert_fields("num_local_experts", inner="intermediate_size")
        | {"feed_forward_length": Setting("intermediate_size_mlp", int)},
        settings=frozenset(("interleave_moe_layer_step", WINDOW, WINDOW_PATTERN)),
    ),
    _deepseek(version=2),
    _deepseek(version=3),
    _gemma4(experts=False),
    _gemma4(experts=True),
)
