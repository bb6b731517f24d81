"""The settings of a GGUF file as the equivalent config.json.

Settings that no file holds are added here: llama.cpp takes them from the architecture and the number of layers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.gguf.names import FAMILIES, LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, Family
from jaxft.checkpoint.gguf.neutral import is_neutral
from jaxft.errors import CheckpointError, ModelError, did_you_mean
from jaxft.files.gguf_header import GGUFHeader
from jaxft.models.family import FULL, SLIDING

# Metadata under the architecture's name that is read here, or that repeats such metadata.
_KNOWN = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
    "rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout".split()
)
# The original context and the two bounds by which Llama 3.1, 3.2 and 3.3 scale their frequencies.
_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
# Gemma: one of this many layers is global; the number of layers of the 27B models, which scale scores differently.
GEMMA_PERIODS = {"gemma2": 2, "gemma3_text": 6}
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
GEMMA3_LOCAL_THETA = 10000.0


def read_family(header: GGUFHeader) -> Family:
    """The family of a file. Raises ModelError for an architecture or a setting that is not implemented."""
    arch = header.require("general.architecture")
    known = {family.arch for family in FAMILIES.values()}
    if arch not in known:
        raise ModelError(
            f"{header.path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(known))}"
        )
    alike = [family for family in FAMILIES.values() if family.arch == arch]
    sparse = [family for family in alike if family.experts and header.metadata.get(f"{arch}.expert_count")]
    family = (sparse or alike)[0]
    prefix = f"{arch}."
    settings = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    for name, value in settings.items():
        if name not in _KNOWN and name not in family.settings and not is_neutral(name, value, settings):
            raise ModelError(
                f"{header.path}: {prefix}{name}={value!r} is not implemented, and without it the model would compute "
                f"something else than its authors meant.{did_you_mean(name, _KNOWN | family.settings)}"
            )
    return family


def read_config(header: GGUFHeader, family: Family, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """config.json of the equivalent Hugging Face folder.

    vectors: the rotary factors among the file's tensors. Raises CheckpointError for missing metadata or tensors,
    ModelError for settings that are not implemented.
    """
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor 'token_embd.weight' is missing")
    config = _sizes(header, family)
    scaling = _rope_scaling(header, family, config, vectors)
    if scaling:
        config["rope_scaling"] = scaling
    if family.model_type in GEMMA_PERIODS:
        config |= _gemma(header, family, config)
    if family.model_type == "phi3":
        config |= _phi3(header, config)
    if family.experts:
        config |= _experts(header, family)
    for field, ours in family.biases.items():
        config[field] = f"blk.0.{ours}.bias" in header.tensors
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[field] = token_id
    return config


def _sizes(header: GGUFHeader, family: Family) -> dict[str, Any]:
    arch = family.arch
    hidden, heads = _size(header, arch, "embedding_length"), _size(header, arch, "attention.head_count")
    rotated = _size(header, arch, "rope.dimension_count", 0)
    # Phi-3 rotates a part of each head only, so its rotary dimension does not give the size of a head.
    default = rotated if rotated and arch != "phi3" else hidden // heads
    head_dim = _size(header, arch, "attention.key_length", default)
    for key in ("attention.value_length", *(() if arch == "phi3" else ("rope.dimension_count",))):
        if (size := _size(header, arch, key, head_dim)) != head_dim:
            raise ModelError(f"{header.path}: {arch}.{key}={size} differs from the head size {head_dim}")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _size(header, arch, "feed_forward_length"),
        "num_hidden_layers": _size(header, arch, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(header, arch, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        **family.activation,
        "max_position_embeddings": _size(header, arch, "context_length"),
        "rms_norm_eps": _decimal(header.require(f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(header.metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _size(header: GGUFHeader, arch: str, key: str, default: int | None = None) -> int:
    value = header.metadata.get(f"{arch}.{key}", default)
    if value is None:
        value = header.require(f"{arch}.{key}")
    if f"{arch}.{key}" in header.metadata and (not isinstance(value, int) or value < 1):
        raise ModelError(f"{header.path}: {arch}.{key}={value!r}; one whole number for all layers is implemented")
    return value


def _decimal(value: float) -> float:
    """A float32 value as its shortest decimal: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _gemma(header: GGUFHeader, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, scale of the scores and soft caps, with llama.cpp's defaults for older files that lack them."""
    arch, kind, layers = family.arch, family.model_type, config["num_hidden_layers"]
    period = _size(header, arch, "attention.sliding_window_pattern", GEMMA_PERIODS[kind])
    shared = {
        "sliding_window": _size(header, arch, "attention.sliding_window"),
        "layer_types": [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)],
        "query_pre_attn_scalar": gemma_scalar(kind, layers, config),
        "attention_bias": False,
    }

    def cap(name: str, default: float | None) -> float | None:
        value = header.metadata.get(f"{arch}.{name}", default)
        return None if value is None else _decimal(value)

    if kind == "gemma2":
        names = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return shared | {name: cap(name, default) for name, default in names.items()}
    local = header.metadata.get(f"{arch}.rope.freq_base_swa", GEMMA3_LOCAL_THETA)
    return shared | {
        "final_logit_softcapping": cap("final_logit_softcapping", None),
        "rope_local_base_freq": _decimal(local),
    }


def gemma_scalar(kind: str, layers: int, sizes: Mapping[str, Any]) -> int:
    """query_pre_attn_scalar, which llama.cpp derives from the number of layers."""
    if layers == GEMMA_27B[kind]:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _phi3(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim, context = config["head_dim"], config["max_position_embeddings"]
    window = header.metadata.get("phi3.attention.sliding_window") or None  # 0: no window
    return {
        "sliding_window": window,
        "partial_rotary_factor": _size(header, "phi3", "rope.dimension_count", head_dim) / head_dim,
        "original_max_position_embeddings": _size(header, "phi3", "rope.scaling.original_context_length", context),
    }


def _experts(header: GGUFHeader, family: Family) -> dict[str, Any]:
    """llama.cpp's router renormalises the chosen weights in both families."""
    sizes = {
        str(family.experts): _size(header, family.arch, "expert_count"),
        "num_experts_per_tok": _size(header, family.arch, "expert_used_count"),
    }
    if family.model_type != "qwen3_moe":
        return sizes | {"sliding_window": None}
    inner = _size(header, family.arch, "expert_feed_forward_length")
    return sizes | {"moe_intermediate_size": inner, "norm_topk_prob": True}


def _rope_scaling(
    header: GGUFHeader, family: Family, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    arch = family.arch
    kind = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    context = header.metadata.get(f"{arch}.rope.scaling.original_context_length")
    if arch == "phi3":
        return _longrope(header, kind, config, vectors)
    if ROPE_FACTORS in vectors:
        if kind not in ("none", "llama3"):
            raise ModelError(f"{header.path}: both {ROPE_FACTORS} and {arch}.rope.scaling.type={kind!r}")
        return _llama3_scaling(header.path, config, vectors[ROPE_FACTORS], context or _LLAMA3_CONTEXT)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{header.path}: {arch}.rope.scaling.type={kind!r} is not one of none, linear, yarn")
    scaling = {"rope_type": kind, "factor": _decimal(header.require(f"{arch}.rope.scaling.factor"))}
    return scaling if context is None else scaling | {"original_max_position_embeddings": context}


def _longrope(
    header: GGUFHeader, kind: str, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    if kind not in ("none", "longrope"):
        raise ModelError(f"{header.path}: phi3.rope.scaling.type={kind!r} is not one of none, longrope")
    if LONG_FACTORS not in vectors:
        return None
    if SHORT_FACTORS not in vectors:
        raise CheckpointError(f"{header.path}: {LONG_FACTORS} is there without {SHORT_FACTORS}")
    original = _size(header, "phi3", "rope.scaling.original_context_length")
    scaling = {
        "rope_type": "longrope",
        "long_factor": [_decimal(x) for x in vectors[LONG_FACTORS]],
        "short_factor": [_decimal(x) for x in vectors[SHORT_FACTORS]],
    }
    scale = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    # The file rounds it to float32. If it is the value that transformers computes, config.json leaves it out.
    attention = header.metadata.get("phi3.rope.scaling.attn_factor", 1.0)
    return scaling if np.float32(usual) == np.float32(attention) else scaling | {"attention_factor": attention}


def _llama3_scaling(path: str, config: Mapping[str, Any], factors: np.ndarray, context: int) -> dict[str, Any]:
    """The settings behind the factors in the file, which keeps only the result of Llama 3.1's formula.

    Source: Llama 3.1's apply_scaling, https://github.com/meta-llama/llama-models.
    """
    head_dim, factor = config["head_dim"], float(factors.max())
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(f"{path}: {ROPE_FACTORS} has shape {factors.shape}, not ({head_dim // 2},)")
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
        raise ModelError(
            f"{path}: the rotary factors in {ROPE_FACTORS} are not Llama 3.1's for factor {factor}, original "
            f"context {context}, bounds {_LLAMA3_LOW} and {_LLAMA3_HIGH}. Load the original Hugging Face folder."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": context,
    }
