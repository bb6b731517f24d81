"""The rotary embedding of a GGUF file as the fields of a config.json, and single settings of the file."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.gguf.family import Family
from jaxft.checkpoint.gguf.names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.gguf.header import GGUFHeader

# The original context and the two bounds by which Llama 3.1, 3.2 and 3.3 scale their frequencies.
_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
YARN_FAST, YARN_SLOW = 32.0, 1.0  # the turns between which yarn's ramp runs, in llama.cpp and by default elsewhere
ATTENTION_FACTOR = "rope.scaling.attn_factor"


def size_of(header: GGUFHeader, arch: str, key: str, default: int | None = None) -> int:
    """A whole number above 0 under the architecture's name. Raises CheckpointError if it is absent without a default,
    and ModelError for another value.
    """
    value = header.metadata.get(f"{arch}.{key}", default)
    if value is None:
        value = header.require(f"{arch}.{key}")
    if f"{arch}.{key}" in header.metadata and (not isinstance(value, int) or value < 1):
        raise ModelError(f"{header.path}: {arch}.{key}={value!r}; one whole number for all layers is implemented")
    return value


def decimal_of(value: float) -> float:
    """A float32 value as its shortest decimal: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(
    header: GGUFHeader, family: Family, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json; None if there is none. config: its sizes. vectors: the rotary factors.

    Raises ModelError for a kind that is not implemented, CheckpointError for factors that are missing or misshapen.
    """
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
    scaling = {"rope_type": kind, "factor": decimal_of(header.require(f"{arch}.rope.scaling.factor"))}
    attention = header.metadata.get(f"{arch}.{ATTENTION_FACTOR}", 1.0)
    if kind == "yarn" and attention != 1:
        # llama.cpp multiplies its own factor with it.
        scaling["attention_factor"] = decimal_of(attention * yarn_magnitude(scaling["factor"]))
    return scaling if context is None else scaling | {"original_max_position_embeddings": context}


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """The factor on cosines and sines that belongs to yarn. Source: arXiv:2309.00071, eq. 22."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(
    header: GGUFHeader, kind: str, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    if kind not in ("none", "longrope"):
        raise ModelError(f"{header.path}: phi3.rope.scaling.type={kind!r} is not one of none, longrope")
    if LONG_FACTORS not in vectors:
        return None
    if SHORT_FACTORS not in vectors:
        raise CheckpointError(f"{header.path}: {LONG_FACTORS} is there without {SHORT_FACTORS}")
    original = size_of(header, "phi3", "rope.scaling.original_context_length")
    if original == 1:
        raise ModelError(f"{header.path}: phi3.rope.scaling.original_context_length=1 is no context to scale")
    scaling = {
        "rope_type": "longrope",
        "long_factor": [decimal_of(x) for x in vectors[LONG_FACTORS]],
        "short_factor": [decimal_of(x) for x in vectors[SHORT_FACTORS]],
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
