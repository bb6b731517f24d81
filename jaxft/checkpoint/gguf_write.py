"""Models and adapters in GGUF, as llama.cpp reads them: header first, then one tensor at a time.

Quantisation is the `gguf` library's. Matrices are stored in the wanted type, vectors in float32, as
llama.cpp's own converter does.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize

from jaxft import models
from jaxft.checkpoint import peft
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.gguf_names import (
    ARCHITECTURES,
    FAMILIES,
    ROPE_FACTORS,
    heads_interleaved,
    interleave,
    module_names,
)
from jaxft.checkpoint.paths import read_json
from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSpec
from jaxft.errors import ExportError

F32, F16, BF16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
KINDS = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0}
FILE_TYPES = {F32: "ALL_F32", F16: "MOSTLY_F16", BF16: "MOSTLY_BF16", Q8_0: "MOSTLY_Q8_0"}


def write_gguf(
    path: str,
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: str,
    tokenizer: Mapping[str, Any],
    name: str,
) -> None:
    """Writes a whole model; one tensor is in memory at a time.

    tensors: under Hugging Face names, any float type. dtype: one of KINDS. tokenizer: metadata under
    `tokenizer.`; see `jaxft.data.gguf_tokenizer_write`. name: what general.name says.
    Raises ExportError for a family or setting that llama.cpp would compute differently, and for values
    that the wanted type cannot hold.
    """
    kind = _kind(dtype)
    arch, metadata = model_metadata(hf_config)
    writer = GGUFWriter(path, arch)
    metadata |= {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(LlamaFileType[FILE_TYPES[kind]]),
        "general.quantization_version": 2,
    }
    names = _gguf_names(arch, hf_config, tensors)
    lazy = {
        names[hf]: (_kind_of(spec, kind), spec.shape, _encoder(hf, make, arch, hf_config, _kind_of(spec, kind)))
        for hf, (spec, make) in tensors.items()
    }
    factors = _rope_factors(hf_config)
    if factors is not None:
        lazy[ROPE_FACTORS] = (F32, factors.shape, lambda: factors)
    _write(writer, metadata | dict(tokenizer), lazy)


def write_gguf_adapter(path: str, folder: str, hf_config: Mapping[str, Any], *, dtype: str = "float32") -> None:
    """Writes a PEFT folder's LoRA in the form that llama.cpp adds to its base (`--lora`).

    hf_config: config.json of the base. dtype: float32, float16 or bfloat16.
    Raises ExportError for tensors that name no linear layer, ModelError for settings not implemented.
    """
    kind = _kind(dtype)
    if kind == Q8_0:
        raise ExportError("an adapter's ranks do not fill blocks of q8_0; use float32, float16 or bfloat16")
    settings = peft.read_settings(read_json(os.path.join(folder, peft.CONFIG)))
    source, arch = SafetensorsFolder(folder, peft.WEIGHTS), _architecture(hf_config)
    family, names = FAMILIES[arch], module_names(FAMILIES[arch], hf_config["num_hidden_layers"])
    # llama.cpp divides alpha by the rank; the rank-stabilised form divides by its root.
    alpha = settings.alpha * (math.sqrt(settings.r) if settings.use_rslora else 1.0)
    lazy, unknown = {}, []
    for key, spec in source.specs().items():
        module, _, part = key.removeprefix(peft.PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not key.startswith(peft.PREFIX) or module not in names or part not in ("A", "B") or "norm" in module:
            unknown.append(key)
            continue
        heads = heads_interleaved(family, module, hf_config) if part == "B" else 0
        lazy[f"{names[module]}.weight.lora_{part.lower()}"] = (
            kind,
            spec.shape,
            lambda key=key, heads=heads: _encode(key, source.read(key), heads, kind),
        )
    if unknown or not lazy:
        raise ExportError(f"{folder}: tensors that GGUF has no place for, among them {unknown[:3]}")
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    _write(GGUFWriter(path, arch), metadata, lazy)


def check_gguf(path: str, tensors: Mapping[str, LazyTensor], *, dtype: str) -> None:
    """Reads a written model again, tensor by tensor: each is exactly what the library makes of the source.

    Raises ExportError naming the first that differs.
    """
    source, kind = GGUFFile(path), _kind(dtype)
    written = source.specs()
    if set(written) != set(tensors):
        raise ExportError(f"{path} holds other tensors than the source: {sorted(set(written) ^ set(tensors))[:3]}")
    for name, (spec, make) in tensors.items():
        each = _kind_of(spec, kind)
        expected = make().astype(np.float32)
        if each != F32:
            expected = dequantize(quantize(expected, each), each)
        if not np.array_equal(source.read(name).view(np.uint32), expected.view(np.uint32)):
            raise ExportError(f"{path}: tensor {name!r} reads back differently. Do not use the file.")


def model_metadata(hf_config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(architecture, settings under its name) of a config.json. Raises ExportError for what llama.cpp lacks."""
    arch, config = _architecture(hf_config), models.config_from_hf(hf_config)
    context, rope = config.max_position_embeddings, config.rope
    window = min((w for layer in config.shape().layers if (w := layer.attention.form.window)), default=context)
    if window < context:
        raise ExportError(
            f"sliding_window={window} is below max_position_embeddings={context}: llama.cpp has no window in "
            f"{arch} and would attend further. Set sliding_window to null, or max_position_embeddings to the window."
        )
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope.theta),
    }
    if rope.kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    elif rope.kind == "llama3":
        settings["rope.scaling.original_context_length"] = int(rope.original_max_position_embeddings)
    if rope.kind not in ("default", "linear", "llama3") or rope.partial_rotary_factor != 1.0:
        raise ExportError(
            f"rope scaling {rope.kind!r} with partial_rotary_factor={rope.partial_rotary_factor} is not written to "
            "GGUF; default, linear and llama3 of whole heads are"
        )
    return arch, {f"{arch}.{key}": value for key, value in settings.items()}


def _architecture(hf_config: Mapping[str, Any]) -> str:
    kind = hf_config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(f"model_type {kind!r} is not written to GGUF; {', '.join(ARCHITECTURES)} are")
    return ARCHITECTURES[kind]


def _rope_factors(hf_config: Mapping[str, Any]) -> np.ndarray | None:
    config = models.config_from_hf(hf_config)
    if config.rope.kind != "llama3":
        return None
    plain = dataclasses.replace(config.rope, kind="default")
    return plain.frequencies(config.head_dim) / config.rope.frequencies(config.head_dim)


def _kind(dtype: str) -> GGMLQuantizationType:
    if dtype not in KINDS:
        raise ExportError(f"GGUF files are written as {', '.join(KINDS)}, not {dtype!r}")
    return KINDS[dtype]


def _kind_of(spec: TensorSpec, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay float32; rows that do not fill blocks fall back to float16, as in llama.cpp."""
    if len(spec.shape) == 1:
        return F32
    return kind if spec.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else F16


def _gguf_names(arch: str, hf_config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    names = module_names(FAMILIES[arch], hf_config["num_hidden_layers"])
    out, unknown = {}, []
    for hf in tensors:
        module, _, suffix = hf.rpartition(".")
        if module in names:
            out[hf] = f"{names[module]}.{suffix}"
        else:
            unknown.append(hf)
    if unknown:
        raise ExportError(f"{len(unknown)} tensors have no name in GGUF's {arch}, among them {unknown[:3]}")
    return out


def _encoder(
    hf: str, make: Callable[[], np.ndarray], arch: str, hf_config: Mapping[str, Any], kind: GGMLQuantizationType
) -> Callable[[], np.ndarray]:
    heads = heads_interleaved(FAMILIES[arch], hf.rpartition(".")[0], hf_config)
    return lambda: _encode(hf, make(), heads, kind)


def _encode(name: str, array: np.ndarray, heads: int, kind: GGMLQuantizationType) -> np.ndarray:
    values = array.astype(np.float32)
    if heads:
        values = interleave(values, heads)
    if kind == F16 and values.size and (largest := float(np.max(np.abs(values)))) > float(np.finfo(np.float16).max):
        raise ExportError(f"tensor {name!r} has values up to {largest:.3g}, float16 ends at 65504; use bfloat16")
    return quantize(np.ascontiguousarray(values), kind)


def _write(
    writer: GGUFWriter,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...], Callable[[], np.ndarray]]],
) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, (kind, shape, _) in tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, make in tensors.values():
            writer.write_tensor_data(make())
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
    finally:
        if writer.fout is not None:
            writer.close()
