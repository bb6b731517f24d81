"""The kinds of the fields of Hugging Face's `config.json` that jaxft reads."""

from collections.abc import Mapping
from typing import Any

from jaxft.errors import ModelError
from jaxft.files.json_fields import (
    COUNT,
    FLAG,
    INDEX,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    TEXTS,
    TOKEN_IDS,
    WHOLE,
    FieldKind,
    check_kinds,
    listing,
)

# A model is described layer by layer and expert by expert before its tensors are looked at.
MOST_LAYERS, MOST_EXPERTS, MOST_IN_ALL = 1_000, 10_000, 200_000
MOST_WIDTH = 2**20
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Fields of some families that may be lists with a number for each layer.
LISTED = {
    "hunyuan_v1_moe": ("moe_topk", "moe_intermediate_size", "num_shared_expert"),
    "gemma3n_text": ("intermediate_size",),
}


def _at_most(most: int, of_what: str, *, least: int = 1) -> FieldKind:
    return FieldKind(
        text=f"a whole number from {least} to {most:,}, which no known model comes near in {of_what}",
        fits=lambda value: INDEX.fits(value) and least <= value <= most,
    )


KINDS: dict[str, FieldKind] = {
    **dict.fromkeys(
        (
            "vocab_size", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings",
            "_sliding_window_pattern", "no_rope_layer_interval", "linear_num_key_heads", "linear_num_value_heads",
            "linear_conv_kernel_dim", "full_attention_interval", "decoder_sparse_step", "num_global_key_value_heads",
            "vocab_size_per_layer_input", "n_group", "topk_group",
            "moe_layer_interval", "interleave_moe_layer_step", "attention_chunk_size", "floor_scale",
            "altup_num_inputs", "laurel_rank",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "linear_key_head_dim",
            "linear_value_head_dim", "global_head_dim",
        ),
        _at_most(MOST_WIDTH, "width"),
    ),
    # EXAONE 4.0 has letters beside its layer_types, or 0.
    "sliding_window_pattern": INDEX | TEXT,
    "no_rope_layers": listing(INDEX, "a list of whole numbers"),
    "num_hidden_layers": _at_most(MOST_LAYERS, "layers"),
    **dict.fromkeys(EXPERT_COUNTS, _at_most(MOST_EXPERTS, "experts")),
    "num_local_experts": _at_most(MOST_EXPERTS, "experts", least=0),  # Granite 4 has models without
    **dict.fromkeys(
        (
            "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_expand",
            "shared_intermediate_size", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel",
            "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "conv_L_cache", "block_ff_dim",
            "block_multiple_of",
        ),
        _at_most(MOST_WIDTH, "width"),
    ),
    **dict.fromkeys(
        (
            "max_window_layers", "num_labels", "shared_expert_intermediate_size", "num_kv_shared_layers",
            "hidden_size_per_layer_input", "n_shared_experts", "num_shared_expert", "moe_num_shared_experts",
            "first_k_dense_replace", "num_nextn_predict_layers", "moe_layer_start_index", "num_dense_layers",
            "altup_active_idx",
        ),
        INDEX,
    ),
    "activation_sparsity_pattern": listing(NUMBER, "a list of numbers"),
    **dict.fromkeys(("mlp_only_layers", "full_attn_idxs", "moe_layers"), listing(INDEX, "a list of whole numbers")),
    # Their families have more to say of 0 and below.
    **dict.fromkeys(
        ("sliding_window", "num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_layer_end_index"), WHOLE
    ),
    **dict.fromkeys(
        (
            "rms_norm_eps", "query_pre_attn_scalar", "swiglu_alpha", "swiglu_limit", "attn_logit_softcapping",
            "final_logit_softcapping", "partial_rotary_factor", "layer_norm_eps", "logit_scale",
            "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
            "routed_scaling_factor", "moe_norm_min", "layer_norm_epsilon", "norm_eps", "block_ffn_dim_multiplier",
            "altup_coef_clip",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("initializer_range", "router_aux_loss_coef", "time_step_min", "attn_scale"), NUMBER),
    # The bases of ropes, which some files have as text, are checked where ropes are read.
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob",
            "output_router_logits", "attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp",
            "attention_out_bias", "qkv_bias", "bias", "use_bias", "use_qk_norm", "mamba_proj_bias", "mamba_conv_bias",
            "rope_interleave", "use_conv_bias", "conv_bias", "block_auto_adjust_ff_dim", "use_expert_bias",
            "tie_embedding", "attn_temperature_tuning", "altup_correct_scale",
        ),
        FLAG,
    ),
    **dict.fromkeys(
        (
            "model_type", "hidden_act", "hidden_activation", "topk_method", "scoring_func", "position_embedding_type",
            "hybrid_override_pattern",
        ),
        TEXT,
    ),
    **dict.fromkeys(("architectures", "layer_types", "layers_block_type", "mlp_layer_types"), TEXTS),
    **dict.fromkeys(
        (
            "text_config", "vision_config", "audio_config", "rope_scaling", "rope_parameters", "per_layer_config",
            "id2label", "label2id",
        ),
        OBJECT,
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN_IDS),
}  # fmt: skip


def check_config(hf: Mapping[str, Any], where: str = "config.json") -> None:
    """Raises ModelError for a field of the wrong kind in a config.json, or in the one of a language model inside it."""
    _check_one(hf, where)
    inner = hf.get("text_config")
    if inner is not None:
        _check_one(inner, f"text_config of {where}")


def _check_one(hf: Mapping[str, Any], where: str) -> None:
    lists = [name for name in LISTED.get(str(hf.get("model_type")), ()) if isinstance(hf.get(name), list)]
    check_kinds({name: value for name, value in hf.items() if name not in lists}, KINDS, where)
    for name in lists:
        for value in hf[name]:
            check_kinds({name: value}, KINDS, where)
    layers = hf.get("num_hidden_layers") or 1
    experts = max(hf.get(name) or 1 for name in EXPERT_COUNTS)
    if layers * experts > MOST_IN_ALL:
        raise ModelError(
            f"{where} claims {experts:,} experts in {layers:,} layers, {layers * experts:,} in all; at most "
            f"{MOST_IN_ALL:,} are read, which no known model comes near. Take the file again from where the model "
            "was published."
        )
