"""The kinds of the fields of Hugging Face's `config.json` that jaxft reads."""

from collections.abc import Mapping
from typing import Any

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
)

KINDS: dict[str, FieldKind] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
            "num_experts", "num_local_experts", "moe_intermediate_size", "sliding_window_pattern",
            "_sliding_window_pattern",
        ),
        COUNT,
    ),
    **dict.fromkeys(("max_window_layers", "num_labels"), INDEX),
    # Their families have more to say of 0 and below.
    **dict.fromkeys(("sliding_window", "num_experts_per_tok"), WHOLE),
    **dict.fromkeys(
        (
            "rms_norm_eps", "query_pre_attn_scalar", "swiglu_alpha", "swiglu_limit", "attn_logit_softcapping",
            "final_logit_softcapping", "partial_rotary_factor",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(("initializer_range", "router_aux_loss_coef"), NUMBER),
    # The bases of ropes, which some files have as text, are checked where ropes are read.
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob",
            "output_router_logits",
        ),
        FLAG,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), TEXT),
    **dict.fromkeys(("architectures", "layer_types"), TEXTS),
    **dict.fromkeys(
        ("text_config", "vision_config", "rope_scaling", "rope_parameters", "id2label", "label2id"), OBJECT
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN_IDS),
}  # fmt: skip


def check_config(hf: Mapping[str, Any], where: str = "config.json") -> None:
    """Raises ModelError for a field of the wrong kind in a config.json, or in the one of a language model inside it."""
    check_kinds(hf, KINDS, where)
    inner = hf.get("text_config")
    if inner is not None:
        check_kinds(inner, KINDS, f"text_config of {where}")
