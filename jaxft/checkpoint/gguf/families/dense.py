"""Families without experts, by Hugging Face's model_type."""

from jaxft.checkpoint.gguf.family import (
    ATTENTION,
    DENSE,
    LAYER_EPSILON,
    MLP,
    NORMS_AFTER,
    NORMS_AROUND,
    NORMS_BEFORE,
    PER_LAYER,
    PER_LAYER_WHOLE,
    QK_NORM,
    TEMPERATURE,
    WINDOW,
    WINDOW_PATTERN,
    YARN_LOG,
    Family,
    Setting,
)

# AltUp and LAuReL of Gemma 3n.
_STREAMS = {
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_GEMMA2_SETTINGS = frozenset((WINDOW, WINDOW_PATTERN, "attn_logit_softcapping", "final_logit_softcapping"))
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
HUNYUAN_NORMS = {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
GRANITE_FACTORS = {
    "embedding_scale": Setting("embedding_multiplier", default=1.0),
    "residual_scale": Setting("residual_multiplier", default=1.0),
    "attention.scale": Setting("attention_multiplier"),
    "logit_scale": Setting("logits_scaling"),
}

DENSE_FAMILIES = (
    Family(
        arch="llama",
        model_type="llama",
        architecture="LlamaForCausalLM",
        layer=DENSE,
        interleaved=True,
        present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
    ),
    Family(
        arch="gemma3n",
        model_type="gemma3n_text",
        architecture="Gemma3nForCausalLM",
        layer=NORMS_AROUND | ATTENTION | QK_NORM | MLP | PER_LAYER | _STREAMS,
        tensors={"altup_correct_scale.weight": "altup.correct_output_scale"},
        whole=PER_LAYER_WHOLE
        | {"altup_proj": "model.altup_projections", "altup_unembd_proj": "model.altup_unembed_projections"},
        unadapted=("per_layer_model_proj", "per_layer_token_embd", "altup_proj", "altup_unembd_proj"),
        # llama.cpp has these sizes, whatever a file says.
        constants=_GELU
        | {
            "attention_bias": False,
            "altup_num_inputs": 4,
            "altup_active_idx": 0,
            "altup_correct_scale": True,
            "laurel_rank": 64,
            "hidden_size_per_layer_input": 256,
        },
        by_layer=True,
        fields={"attention.shared_kv_layers": Setting("num_kv_shared_layers", int, 0)},
        fixed={"altup.num_inputs": 4, "altup.active_idx": 0, "embedding_length_per_layer_input": 256},
        settings=frozenset(
            (WINDOW, WINDOW_PATTERN, "rope.freq_base_swa", "activation_sparsity_scale", "final_logit_softcapping")
        ),
    ),
    Family(arch="smollm3", model_type="smollm3", architecture="SmolLM3ForCausalLM", layer=DENSE, interleaved=True),
    # Mistral Small 3.1 and its like, which llama.cpp's converter does not write as `llama`.
    Family(arch="mistral3", model_type="mistral", architecture="MistralForCausalLM", layer=DENSE, interleaved=True),
    Family(
        arch="mistral3",
        model_type="ministral3",
        architecture="Ministral3ForCausalLM",
        layer=DENSE,
        interleaved=True,
        settings=frozenset((TEMPERATURE, YARN_LOG)),
        mark=TEMPERATURE,
    ),
    Family(arch="qwen2", model_type="qwen2", architecture="Qwen2ForCausalLM", layer=DENSE),
    Family(
        arch="qwen3",
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        layer=DENSE | QK_NORM,
        present={"attention_bias": "attn_q.bias"},
    ),
    Family(
        arch="gemma",
        model_type="gemma",
        architecture="GemmaForCausalLM",
        layer=DENSE,
        constants={"hidden_act": "gelu_pytorch_tanh"},
        norm_plus_one=True,
    ),
    Family(
        arch="gemma2",
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        layer=NORMS_AROUND | ATTENTION | MLP,
        constants=_GELU,
        norm_plus_one=True,
        settings=_GEMMA2_SETTINGS,
    ),
    Family(
        arch="gemma3",
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        layer=NORMS_AROUND | ATTENTION | QK_NORM | MLP,
        constants=_GELU,
        norm_plus_one=True,
        settings=(_GEMMA2_SETTINGS | {"rope.freq_base_swa"}) - {"attn_logit_softcapping"},
    ),
    Family(
        arch="phi3",
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        layer=NORMS_BEFORE
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        settings=frozenset((WINDOW, "rope.scaling.attn_factor")),
        partial=True,
    ),
    Family(
        arch="olmo2",
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        layer=NORMS_AFTER | ATTENTION | QK_NORM | MLP,
    ),
    Family(
        arch="olmo2",
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        layer=NORMS_AFTER | ATTENTION | QK_NORM | MLP,
        settings=frozenset((WINDOW, WINDOW_PATTERN)),
        mark=WINDOW,
    ),
    # The factors of Granite 3 are in the file, each under a name of its own.
    Family(
        arch="granite",
        model_type="granite",
        architecture="GraniteForCausalLM",
        layer=DENSE,
        interleaved=True,
        present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
        fields=GRANITE_FACTORS,
    ),
    Family(
        arch="seed_oss",
        model_type="seed_oss",
        architecture="SeedOssForCausalLM",
        layer={
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            **ATTENTION,
            **MLP,
        },
        constants={"hidden_act": "silu", "attention_out_bias": False, "mlp_bias": False},
        present={"attention_bias": "attn_q.bias"},
    ),
    Family(
        arch="exaone4",
        model_type="exaone4",
        architecture="Exaone4ForCausalLM",
        layer=NORMS_AFTER | ATTENTION | QK_NORM | MLP,
        settings=frozenset((WINDOW, WINDOW_PATTERN)),
    ),
    Family(
        arch="cohere2",
        model_type="cohere2",
        architecture="Cohere2ForCausalLM",
        layer={"attn_norm": "input_layernorm", **ATTENTION, **MLP},
        constants={"hidden_act": "silu", "attention_bias": False},
        settings=frozenset((WINDOW, WINDOW_PATTERN)),
        fields={"logit_scale": Setting("logit_scale")},
        epsilon=LAYER_EPSILON,
    ),
    Family(
        arch="chatglm",
        model_type="glm",
        architecture="GlmForCausalLM",
        layer=NORMS_BEFORE | ATTENTION | _FUSED_MLP,
        present={"attention_bias": "attn_q.bias"},
        partial=True,
    ),
    Family(
        arch="glm4",
        model_type="glm4",
        architecture="Glm4ForCausalLM",
        layer={
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            **ATTENTION,
            **_FUSED_MLP,
        },
        present={"attention_bias": "attn_q.bias"},
        partial=True,
    ),
    Family(
        arch="ernie4_5",
        model_type="ernie4_5",
        architecture="Ernie4_5ForCausalLM",
        layer=DENSE,
        constants={"hidden_act": "silu", "use_bias": False},
    ),
    Family(
        arch="hunyuan-dense",
        model_type="hunyuan_v1_dense",
        architecture="HunYuanDenseV1ForCausalLM",
        layer=DENSE | HUNYUAN_NORMS,
        constants={"hidden_act": "silu", "attention_bias": False},
    ),
    Family(
        arch="apertus",
        model_type="apertus",
        architecture="ApertusForCausalLM",
        layer={
            "attn_norm": "attention_layernorm",
            "ffn_norm": "feedforward_layernorm",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
            **ATTENTION,
            **QK_NORM,
        },
        constants={"hidden_act": "xielu", "attention_bias": False},
    ),
)
