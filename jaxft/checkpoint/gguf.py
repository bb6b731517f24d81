"""GGUF files as a source of tensors under Hugging Face names, with the config.json they amount to.

Weights are dequantised to float32 by the `gguf` library as they are read. Names and the order of
rows are those of llama.cpp's converter, undone here.
"""

import math
import os
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from jaxft.checkpoint.gguf_names import FAMILIES, QK_NORM, ROPE_FACTORS, WHOLE, Family
from jaxft.checkpoint.paths import pread
from jaxft.checkpoint.tensors import TensorSpec, block_bounds
from jaxft.errors import CheckpointError, ModelError, did_you_mean
from jaxft.gguf_header import GGUFHeader, GGUFTensor, read_header

# Metadata below the architecture's name that is read here, or that repeats what is.
_KNOWN = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon "
    "rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout".split()
)
# These change what the network computes when they are not zero.
_ZERO = frozenset(("expert_count", "expert_used_count", "attention.sliding_window"))
# The original context and the two bounds by which Llama 3.1, 3.2 and 3.3 scale their frequencies.
_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0


class GGUFFile:
    """Tensors of a GGUF file under Hugging Face names and shapes, float32, dequantised on demand.

    Raises, before any weight is read: CheckpointError for a damaged or incomplete file; ModelError
    for an architecture, a tensor, a tensor type or a setting that is not understood, by name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.header = read_header(path)
        self.path = self.header.path
        self._arch: str = self.header.require("general.architecture")
        if self._arch not in FAMILIES:
            raise ModelError(
                f"{self.path}: GGUF architecture {self._arch!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        self._family = FAMILIES[self._arch]
        _check_settings(self.header, self._arch)
        _check_types(self.header)
        self._config = _hf_config(self.header, self._arch, self._family)
        self._tensors = _named_tensors(self.header, self._family, self._config)

    def hf_config(self) -> dict[str, Any]:
        """What config.json of the equivalent Hugging Face folder holds."""
        return dict(self._config)

    def specs(self) -> dict[str, TensorSpec]:
        """Shapes as Hugging Face has them ([out, in] for weights); everything reads as float32."""
        return {name: TensorSpec(tensor.shape, np.dtype(np.float32)) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it, float32; see `TensorSource.read`. Whole rows are read and then cut."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self._tensors)}")
        tensor = self._tensors[name]
        bounds = block_bounds(tensor.shape, index)
        start, stop = bounds[0]
        order = self._row_order(name, start, stop)
        if len(tensor.shape) == 1:
            values = _rows(self.path, tensor, 0, 1)[0]
            return values[start:stop] if order is None else values[order]
        if order is None or start == stop:
            rows = _rows(self.path, tensor, start, stop)
        else:
            low = int(order.min())
            rows = _rows(self.path, tensor, low, int(order.max()) + 1)[order - low]
        return rows[:, slice(*bounds[1])]

    def _row_order(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Rows in the file of Hugging Face's rows start:stop, or None where they are the same."""
        if not (self._family.interleaved and (".q_proj." in name or ".k_proj." in name)):
            return None
        head_dim = self._config["head_dim"]
        head, within = np.divmod(np.arange(start, stop), head_dim)
        half, pair = np.divmod(within, head_dim // 2)
        return head * head_dim + 2 * pair + half


def _rows(path: str, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
    """Rows start:stop as float32 [stop - start, innermost]."""
    if start == stop:
        return np.empty((0, tensor.shape[-1]), np.float32)
    raw = pread(path, [(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)])
    return dequantize(raw.reshape(stop - start, tensor.row_bytes), tensor.type)


def _check_settings(header: GGUFHeader, arch: str) -> None:
    for key, value in header.metadata.items():
        if not key.startswith(f"{arch}."):
            continue
        name = key.removeprefix(f"{arch}.")
        if name not in _KNOWN and not (name in _ZERO and value == 0):
            raise ModelError(
                f"{header.path}: {key}={value!r} is not implemented, and without it the model would compute "
                f"something else than its authors meant.{did_you_mean(name, _KNOWN)}"
            )


def _hf_config(header: GGUFHeader, arch: str, family: Family) -> dict[str, Any]:
    def size(key: str, *default: int) -> int:
        value = header.metadata.get(f"{arch}.{key}", *default) if default else header.require(f"{arch}.{key}")
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{header.path}: {arch}.{key}={value!r}; one whole number for all layers is implemented")
        return value

    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor 'token_embd.weight' is missing; is this part of a split file?")
    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", size("rope.dimension_count", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise ModelError(f"{header.path}: {arch}.{key}={size(key)} differs from the head size {head_dim}")
    rope_theta = _decimal(header.metadata.get(f"{arch}.rope.freq_base", 10000.0))
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": _decimal(header.require(f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": rope_theta,
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    scaling = _rope_scaling(header, arch, head_dim, rope_theta)
    if scaling:
        config["rope_scaling"] = scaling
    for field, ours in family.biases.items():
        config[field] = f"blk.0.{ours}.bias" in header.tensors
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[field] = token_id
    return config


def _decimal(value: float) -> float:
    """1e-05 rather than 9.999999747378752e-06, which is what float32 metadata reads as."""
    return float(str(np.float32(value)))


def _rope_scaling(header: GGUFHeader, arch: str, head_dim: int, rope_theta: float) -> dict[str, Any] | None:
    kind = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    context = header.metadata.get(f"{arch}.rope.scaling.original_context_length")
    if ROPE_FACTORS in header.tensors:
        if kind not in ("none", "llama3"):
            raise ModelError(f"{header.path}: both {ROPE_FACTORS} and {arch}.rope.scaling.type={kind!r}")
        return _llama3_scaling(header, head_dim, rope_theta, context or _LLAMA3_CONTEXT)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{header.path}: {arch}.rope.scaling.type={kind!r} is not one of none, linear, yarn")
    scaling = {"rope_type": kind, "factor": _decimal(header.require(f"{arch}.rope.scaling.factor"))}
    return scaling if context is None else scaling | {"original_max_position_embeddings": context}


def _llama3_scaling(header: GGUFHeader, head_dim: int, rope_theta: float, context: int) -> dict[str, Any]:
    """The settings that give the factors in the file, which keeps only the result of Llama 3.1's formula.

    Source: Llama 3.1's apply_scaling, https://github.com/meta-llama/llama-models.
    """
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,):
        raise CheckpointError(f"{header.path}: {ROPE_FACTORS} has shape {tensor.shape}, not ({head_dim // 2},)")
    factors = _rows(header.path, tensor, 0, 1)[0]
    factor = float(factors.max())
    wavelengths = 2 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
        raise ModelError(
            f"{header.path}: the rotary factors in {ROPE_FACTORS} are not Llama 3.1's for factor {factor}, original "
            f"context {context}, bounds {_LLAMA3_LOW} and {_LLAMA3_HIGH}. Load the original Hugging Face folder."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": context,
    }


def _shapes(family: Family, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Expected shape of each weight, by GGUF name without layer number and `.weight`."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    matrices = {
        "token_embd": (config["vocab_size"], hidden),
        "output": (config["vocab_size"], hidden),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    norms = {name: (head_dim if name in QK_NORM else hidden,) for name in {*WHOLE, *family.layer} - set(matrices)}
    return matrices | norms


def _named_tensors(header: GGUFHeader, family: Family, config: dict[str, Any]) -> dict[str, GGUFTensor]:
    """Tensors by Hugging Face name; refuses unknown, missing and misshapen ones, and types not dequantised."""
    layers = config["num_hidden_layers"]
    parts = [(ours, ours, theirs) for ours, theirs in WHOLE.items()]
    for n in range(layers):
        parts += [(f"blk.{n}.{ours}", ours, f"model.layers.{n}.{theirs}") for ours, theirs in family.layer.items()]
    shapes, names, expected = _shapes(family, config), {}, {}
    for full, ours, theirs in parts:
        names[f"{full}.weight"], expected[f"{full}.weight"] = f"{theirs}.weight", shapes[ours]
        if ours in family.layer and len(shapes[ours]) == 2:
            names[f"{full}.bias"], expected[f"{full}.bias"] = f"{theirs}.bias", shapes[ours][:1]
    found = {name: tensor for name, tensor in header.tensors.items() if name != ROPE_FACTORS}
    for name, tensor in found.items():
        if name not in names:
            raise ModelError(
                f"{header.path}: tensor {name!r} has no place in a {family.model_type} model of {layers} layers."
                f"{did_you_mean(name, names)}"
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{header.path}: tensor {name!r} has shape {tensor.shape}, not {expected[name]}")
    needed = [name for name in names if name.endswith(".weight") and name != "output.weight"]
    missing = [name for name in needed if name not in found]
    if missing:
        raise CheckpointError(f"{header.path}: {len(missing)} tensors are missing, among them {missing[:3]}")
    return {names[name]: tensor for name, tensor in found.items()}


def _check_types(header: GGUFHeader) -> None:
    for kind, name in {tensor.type: tensor.name for tensor in header.tensors.values()}.items():
        _, block_bytes = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{header.path}: tensor {name!r} has the type {kind.name}, which the gguf library does not dequantise"
            ) from error
