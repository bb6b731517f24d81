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
)

# A model is described layer by layer and expert by expert before its tensors are looked at.
MOST_LAYERS, MOST_EXPERTS, MOST_IN_ALL = 1_000, 10_000, 200_000
MOST_WIDTH = 2**20


def _at_most(most: int, of_what: str) -> FieldKind:
    return FieldKind(
        text=f"a whole number from 1 to {most:,}, which no known model comes near in {of_what}",
        fits=lambda value: COUNT.fits(value) and value <= most,
    )


KINDS: dict[str, FieldKind] = {
    **dict.fromkeys(
        (
            "vocab_size", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings",
            "sliding_window_pattern", "_sliding_window_pattern",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"), _at_most(MOST_WIDTH, "width")
    ),
    "num_hidden_layers": _at_most(MOST_LAYERS, "layers"),
    **dict.fromkeys(("num_experts", "num_local_experts"), _at_most(MOST_EXPERTS, "experts")),
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
    _check_one(hf, where)
    inner = hf.get("text_config")
    if inner is not None:
        _check_one(inner, f"text_config of {where}")


def _check_one(hf: Mapping[str, Any], where: str) -> None:
    check_kinds(hf, KINDS, where)
    layers, experts = hf.get("num_hidden_layers") or 1, hf.get("num_experts") or hf.get("num_local_experts") or 1
    if layers * experts > MOST_IN_ALL:
        raise ModelError(
            f"{where} claims {experts:,} experts in {layers:,} layers, {layers * experts:,} in all; at most "
            f"{MOST_IN_ALL:,} are read, which no known model comes near. Take the file again from where the model "
            "was published."
        )
