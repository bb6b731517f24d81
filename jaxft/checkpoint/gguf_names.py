"""What the tensors of a GGUF file are called, family by family: one table for reading and for writing.

Names and the order of rows are those of llama.cpp's converter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# GGUF's name within `blk.N.` -> Hugging Face's within `model.layers.N.`
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1: a divisor for each rotary frequency, [head_dim / 2]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the converter does to one architecture. `llama` is also Mistral's."""

    model_type: str
    architecture: str  # Hugging Face's class
    layer: Mapping[str, str]
    # llama.cpp rotates neighbouring pairs in this family, so its converter interleaves the halves of q and k heads.
    interleaved: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)  # config field -> GGUF tensor whose bias decides it


FAMILIES = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        layer=_LAYER,
        interleaved=True,
        biases={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
    ),
    "qwen2": Family(model_type="qwen2", architecture="Qwen2ForCausalLM", layer=_LAYER),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        layer=_LAYER | QK_NORM,
        biases={"attention_bias": "attn_q"},
    ),
}
# Hugging Face's model_type -> GGUF's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def module_names(family: Family, layers: int) -> dict[str, str]:
    """Hugging Face's name of every module -> GGUF's, both without `.weight` or `.bias`."""
    names = {theirs: ours for ours, theirs in WHOLE.items()}
    for n in range(layers):
        names |= {f"model.layers.{n}.{theirs}": f"blk.{n}.{ours}" for ours, theirs in family.layer.items()}
    return names


def heads_interleaved(family: Family, module: str, config: Mapping[str, Any]) -> int:
    """Number of heads whose halves llama.cpp interleaves in the rows of a module, 0 for none."""
    if family.interleaved and module.endswith(".q_proj"):
        return config["num_attention_heads"]
    if family.interleaved and module.endswith(".k_proj"):
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: in every head (half, pair) becomes (pair, half)."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
