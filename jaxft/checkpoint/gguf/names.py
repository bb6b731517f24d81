"""Names of the tensors of a GGUF file by family: one table for reading and for writing.

Names, the order of rows and the 1 that is added to norms are those of llama.cpp's converter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxft.models.family import FamilyConfig

# GGUF's name within `blk.N.` -> Hugging Face's within `model.layers.N.`
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_NORMS_AROUND = _NORMS_AFTER | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
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
_DENSE = _NORMS_BEFORE | _ATTENTION | _MLP
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROUTER, SINKS = "ffn_gate_inp", "attn_sinks"
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1: a divisor for each rotary frequency, [head_dim / 2]
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # Phi-3: the same, two sets


@dataclass(frozen=True, kw_only=True)
class Family:
    """How llama.cpp's converter names and arranges one family."""

    arch: str  # general.architecture
    model_type: str
    architecture: str  # Hugging Face's class
    layer: Mapping[str, str]
    activation: Mapping[str, str] = field(default_factory=lambda: {"hidden_act": "silu"})
    # llama.cpp rotates neighbouring pairs in this family, so its converter interleaves the halves of q and k heads.
    interleaved: bool = False
    # Hugging Face's norms multiply by 1 + weight, llama.cpp's by the tensor in the file.
    norm_plus_one: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)  # config field -> GGUF tensor whose bias decides it
    experts: str | None = None  # config field with their number
    settings: frozenset[str] = frozenset()  # metadata of this family beyond that of all families
    expert_biases: bool = False
    mark: str | None = None  # metadata that other families of the same architecture do not have, or have as 0


_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
TEMPERATURE, YARN_LOG = "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"
_GEMMA2_SETTINGS = frozenset((_WINDOW, WINDOW_PATTERN, "attn_logit_softcapping", "final_logit_softcapping"))
_EXPERT_SETTINGS = frozenset(("expert_count", "expert_used_count"))

# By Hugging Face's model_type. `mistral` is written as `llama` and read back as `llama`, which computes the same.
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            arch="llama",
            model_type="llama",
            architecture="LlamaForCausalLM",
            layer=_DENSE,
            interleaved=True,
            biases={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
        ),
        Family(
            arch="llama",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            layer=_NORMS_BEFORE | _ATTENTION | _MIXTRAL_EXPERTS,
            interleaved=True,
            experts="num_local_experts",
            settings=_EXPERT_SETTINGS,
            mark="expert_count",
        ),
        Family(arch="smollm3", model_type="smollm3", architecture="SmolLM3ForCausalLM", layer=_DENSE, interleaved=True),
        # Mistral Small 3.1 and its like, which llama.cpp's converter does not write as `llama`.
        Family(
            arch="mistral3", model_type="mistral", architecture="MistralForCausalLM", layer=_DENSE, interleaved=True
        ),
        Family(
            arch="mistral3",
            model_type="ministral3",
            architecture="Ministral3ForCausalLM",
            layer=_DENSE,
            interleaved=True,
            settings=frozenset((TEMPERATURE, YARN_LOG)),
            mark=TEMPERATURE,
        ),
        Family(arch="qwen2", model_type="qwen2", architecture="Qwen2ForCausalLM", layer=_DENSE),
        Family(
            arch="qwen3",
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            layer=_DENSE | _QK_NORM,
            biases={"attention_bias": "attn_q"},
        ),
        Family(
            arch="qwen3moe",
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            layer=_NORMS_BEFORE | _ATTENTION | _QK_NORM | _QWEN_EXPERTS,
            experts="num_experts",
            settings=_EXPERT_SETTINGS | {"expert_feed_forward_length"},
        ),
        Family(
            arch="gemma",
            model_type="gemma",
            architecture="GemmaForCausalLM",
            layer=_DENSE,
            activation={"hidden_act": "gelu_pytorch_tanh"},
            norm_plus_one=True,
        ),
        Family(
            arch="gemma2",
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            layer=_NORMS_AROUND | _ATTENTION | _MLP,
            activation=_GELU,
            norm_plus_one=True,
            settings=_GEMMA2_SETTINGS,
        ),
        Family(
            arch="gemma3",
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            layer=_NORMS_AROUND | _ATTENTION | _QK_NORM | _MLP,
            activation=_GELU,
            norm_plus_one=True,
            settings=(_GEMMA2_SETTINGS | {"rope.freq_base_swa"}) - {"attn_logit_softcapping"},
        ),
        Family(
            arch="phi3",
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            layer=_NORMS_BEFORE
            | {
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
            settings=frozenset((_WINDOW, "rope.scaling.attn_factor")),
        ),
        Family(
            arch="olmo2",
            model_type="olmo2",
            architecture="Olmo2ForCausalLM",
            layer=_NORMS_AFTER | _ATTENTION | _QK_NORM | _MLP,
        ),
        Family(
            arch="olmo2",
            model_type="olmo3",
            architecture="Olmo3ForCausalLM",
            layer=_NORMS_AFTER | _ATTENTION | _QK_NORM | _MLP,
            settings=frozenset((_WINDOW, WINDOW_PATTERN)),
            mark=_WINDOW,
        ),
        Family(
            arch="gpt-oss",
            model_type="gpt_oss",
            architecture="GptOssForCausalLM",
            layer={
                "attn_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                SINKS: "self_attn.sinks",
                **_ATTENTION,
                **_OSS_EXPERTS,
            },
            experts="num_local_experts",
            expert_biases=True,
            settings=_EXPERT_SETTINGS | {"expert_feed_forward_length", _WINDOW, WINDOW_PATTERN},
        ),
    )
}
WRITTEN_AS = {"mistral": "llama"}


class GGUFModule(NamedTuple):
    """The place of a module in a file.

    part: its name without layer number. layer: that number, -1 outside of the layers. expert: its row of a merged
    tensor.
    """

    name: str
    part: str
    layer: int = -1
    expert: int | None = None


def gguf_modules(family: Family, layers: int, experts: int = 0) -> dict[str, GGUFModule]:
    """Hugging Face's name of every module -> its module in GGUF, without `.weight` or `.bias`; experts in order."""
    modules = {theirs: GGUFModule(ours, ours) for ours, theirs in WHOLE.items()}
    for n in range(layers):
        for ours, theirs in family.layer.items():
            name, module = f"blk.{n}.{ours}", f"model.layers.{n}.{theirs}"
            if "{e}" not in theirs:
                modules[module] = GGUFModule(name, ours, n)
                continue
            modules |= {module.format(e=e): GGUFModule(name, ours, n, e) for e in range(experts)}
    return modules


def shapes(family: Family, config: FamilyConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by its part. config: the family's Config."""
    width, vocab = config.hidden_size, config.vocab_size
    attention = next(block.attention for block in config.shape().layers if block.attention is not None)
    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    experts = expert_count(family, config)
    matrices = {
        "token_embd": (vocab, width),
        "output": (vocab, width),
        "attn_q": (q, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_qkv": (q + 2 * kv, width),
        "attn_output": (width, q),
        "ffn_gate": (inner, width),
        "ffn_up": (2 * inner if attention.fused else inner, width),
        "ffn_down": (width, inner),
        ROUTER: (experts, width),
        "ffn_gate_exps": (experts, inner, width),
        "ffn_up_exps": (experts, inner, width),
        "ffn_down_exps": (experts, width, inner),
    }
    norms = {name: (width,) for name in {*WHOLE, *family.layer} - set(matrices)}
    each = attention.qk_norm == "head"
    norms |= {
        "attn_q_norm": (attention.head_dim if each else q,),
        "attn_k_norm": (attention.head_dim if each else kv,),
        SINKS: (attention.heads,),
    }
    return matrices | norms


def expert_count(family: Family, config: FamilyConfig) -> int:
    """Experts of a layer, 0 in a dense family. config: the family's Config."""
    return getattr(config, family.experts) if family.experts else 0


def heads_interleaved(family: Family, module: str, config: FamilyConfig) -> int:
    """Number of heads whose halves llama.cpp interleaves in the rows of a module, 0 for none."""
    if family.interleaved and module.endswith(".q_proj"):
        return config.num_attention_heads
    if family.interleaved and module.endswith(".k_proj"):
        return config.num_key_value_heads
    return 0


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: in every head (half, pair) becomes (pair, half)."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def has_shifted_norm(family: Family, tensor: str) -> bool:
    """Whether a file holds 1 + the values of this Hugging Face tensor."""
    return family.norm_plus_one and tensor.endswith("norm.weight")
