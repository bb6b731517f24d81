"""Families with experts, by Hugging Face's model_type."""

from jaxft.checkpoint.gguf.family import (
    ATTENTION,
    NORMS_BEFORE,
    QK_NORM,
    SINKS,
    WINDOW,
    WINDOW_PATTERN,
    Family,
)

# GGUF keeps a layer's experts as one tensor [experts, outputs, inputs]; `{e}` is the number of an expert.
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
_QWEN_EXPERTS = {
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
_EXPERT_SETTINGS = frozenset(("expert_count", "expert_used_count"))

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
        layer=NORMS_BEFORE | ATTENTION | QK_NORM | _QWEN_EXPERTS,
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
            SINKS: "self_attn.sinks",
            **ATTENTION,
            **_OSS_EXPERTS,
        },
        experts="num_local_experts",
        settings=_EXPERT_SETTINGS | {"expert_feed_forward_length", WINDOW, WINDOW_PATTERN},
    ),
)
