"""Metadata under the architecture's name that changes nothing that the model computes, by the value that it has.

The names are those of llama.cpp's table of keys. A value is neutral if llama.cpp's own graph is the same as without the
key; any other value would be another model.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxft.checkpoint.gguf.ropes import ATTENTION_FACTOR, yarn_magnitude

# Keys that no graph of a loaded architecture reads: of embeddings, of other kinds of norms, of an encoder.
UNREAD = frozenset(
    "pooling_type embedding_length_out decoder_start_token_id attention.layer_norm_epsilon "
    "attention.group_norm_epsilon attention.group_norm_groups".split()
)
# Keys of experts, which a dense model does not read.
OF_EXPERTS = frozenset(
    "expert_used_count expert_feed_forward_length expert_shared_feed_forward_length expert_shared_count "
    "expert_group_count expert_group_used_count expert_weights_scale expert_weights_norm expert_gating_func "
    "leading_dense_block_count interleave_moe_layer_step moe_every_n_layers".split()
)
SOFTMAX = 1  # of expert_gating_func
# The values that are neutral, by key.
VALUES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(
        (
            "expert_count", "expert_shared_count", "leading_dense_block_count", "nextn_predict_layers",
            "attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias",
            "attention.shared_kv_layers", "attn_logit_softcapping", "final_logit_softcapping",
            "router_logit_softcapping", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier",
            "rescale_every_n_layers", "use_parallel_residual", "swin_norm",
        ),
        (0,),
    ),
    **dict.fromkeys(
        (
            "logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "attention.value_scale",
            "expert_group_count", "expert_group_used_count", "expert_weights_scale", "num_loops",
            "interleave_moe_layer_step", "moe_every_n_layers", "rope.scale_linear", "rope.scaling.attn_factor",
        ),
        (0, 1),
    ),
    "attention.causal": (1,),
    "expert_weights_norm": (1,),
    "expert_gating_func": (0, SOFTMAX),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
}  # fmt: skip


def is_neutral(name: str, value: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a setting changes nothing. name: without the architecture. settings: all of them, by such names."""
    if name in UNREAD or (name in OF_EXPERTS and not settings.get("expert_count")):
        return True
    if name == ATTENTION_FACTOR and settings.get("rope.scaling.type") == "yarn":
        return True  # it is read with the scaling
    if not isinstance(value, int | float):
        return False
    if any(math.isclose(value, neutral, rel_tol=1e-6) for neutral in VALUES.get(name, ())):
        return True
    equal = _equal_settings(settings).get(name)
    if name == "attention.sliding_window":
        return equal is not None and value >= equal
    return equal is not None and math.isclose(value, equal, rel_tol=1e-6)


def _equal_settings(settings: Mapping[str, Any]) -> dict[str, float]:
    """The value with which a key repeats what other keys say; a window is neutral from the context's length on."""
    heads, width = settings.get("attention.head_count"), settings.get("embedding_length")
    size, factor = settings.get("attention.key_length"), settings.get("rope.scaling.factor")
    if size is None and isinstance(heads, int) and isinstance(width, int) and heads:
        size = width // heads
    out = {
        "attention.key_length_swa": size,
        "attention.value_length_swa": size,
        "attention.scale": size**-0.5 if isinstance(size, int) and size > 0 else None,
        "rope.dimension_count_swa": settings.get("rope.dimension_count", size),
        "rope.freq_base_swa": settings.get("rope.freq_base"),
        # llama.cpp computes it from the factor, whatever the file says.
        "rope.scaling.yarn_attn_factor": yarn_magnitude(factor) if isinstance(factor, int | float) else None,
        "attention.sliding_window": settings.get("context_length"),
    }
    return {name: value for name, value in out.items() if isinstance(value, int | float)}
