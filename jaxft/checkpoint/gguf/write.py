"""Writing models and adapters as GGUF for llama.cpp: header first, then one tensor at a time.

The `gguf` library quantises. As in llama.cpp's own converter, matrices are stored in the requested type and vectors in
float32.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize

from jaxft import models
from jaxft.checkpoint.finite import all_finite
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.gguf.family import Family, GGUFModule
from jaxft.checkpoint.gguf.kinds import F16, F32, FILE_TYPES, FileKinds, file_kinds, kind_of, quantize
from jaxft.checkpoint.gguf.layout.arrangement import single_tensors
from jaxft.checkpoint.gguf.layout.values import adapter_half, file_shape, from_file, is_by_rows, to_file
from jaxft.checkpoint.gguf.layout.xielu import xielu_metadata
from jaxft.checkpoint.gguf.names import (
    expert_count,
    gguf_modules,
    gguf_tensor,
    require_tensor,
)
from jaxft.checkpoint.gguf.settings import family_of, model_metadata, rope_vectors
from jaxft.checkpoint.peft.folder import CONFIG, PREFIX, AdapterTensors
from jaxft.checkpoint.peft.lora import read_settings
from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.errors import ExportError, listed
from jaxft.files.paths import read_json

ADAPTER_TYPES = ("float32", "float16", "bfloat16")


def write_gguf(
    path: str,
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: str,
    tokenizer: Mapping[str, Any],
    name: str,
) -> None:
    """Writes a whole model with one tensor in memory at a time; of experts that GGUF keeps in one tensor, one expert.

    tensors: under Hugging Face names, any float dtype. dtype: a name of `kinds.KINDS`. tokenizer: metadata under
    `tokenizer.`; see `jaxft.data.tokenizers.gguf_write`. name: for general.name. Raises ExportError for a family or
    setting that llama.cpp would compute differently, and for values beyond the range of the type.
    """
    family, config = family_of(hf_config), models.config_from_hf(hf_config)
    kinds = file_kinds(dtype, family, config)
    metadata = model_metadata(hf_config) | {
        **xielu_metadata(tensors, config.num_hidden_layers),
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(LlamaFileType[FILE_TYPES[dtype]]),
        "general.quantization_version": 2,
    }
    merged = _file_tensors(kinds, tensors)
    vectors = {
        vector: _FileTensor(kind=F32, shape=values.shape, parts=(functools.partial(np.asarray, values),))
        for vector, values in rope_vectors(hf_config).items()
    }
    _write(GGUFWriter(path, family.arch), metadata | dict(tokenizer), merged | vectors)


def gguf_bytes(tensors: Mapping[str, LazyTensor], hf_config: Mapping[str, Any], dtype: str) -> int:
    """Size of the tensors in a file of that type. Raises ExportError for a family that is not written to GGUF."""
    kinds = file_kinds(dtype, family_of(hf_config), models.config_from_hf(hf_config))
    merged = _file_tensors(kinds, tensors)
    return sum(tensor.nbytes for tensor in merged.values())


def write_gguf_adapter(path: str, folder: str, hf_config: Mapping[str, Any], *, dtype: str = "float32") -> None:
    """Writes a PEFT folder's LoRA in the form that llama.cpp adds to its base (`--lora`).

    hf_config: config.json of the base. dtype: float32, float16 or bfloat16.
    Raises ExportError for tensors that name no linear layer, ModelError for settings not implemented.
    """
    kind = kind_of(dtype)
    if dtype not in ADAPTER_TYPES:
        raise ExportError(f"rows of an adapter do not fill blocks of {dtype}; use float32, float16 or bfloat16")
    peft_config = read_json(os.path.join(folder, CONFIG))
    if peft_config.get("peft_type") != "LORA":
        raise ExportError(f"{folder} has peft_type {peft_config.get('peft_type')!r}; llama.cpp reads only LoRA")
    settings = read_settings(peft_config)
    beyond = [
        name
        for name in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "trainable_token_indices",
            "lora_bias",
        )
        if peft_config.get(name)
    ]
    if beyond:
        raise ExportError(f"{folder} has {', '.join(beyond)}, which llama.cpp's adapters do not have: merge it instead")
    whole = AdapterTensors(folder).of_role("trained", "base", "plain", "rows")
    if whole:
        raise ExportError(
            f"{folder} holds tensors of its base, which llama.cpp's adapters do not have: {listed(list(whole), 3)}. "
            "Merge it instead: jaxft convert with --to=gguf"
        )
    source, family, config = AdapterTensors(folder), family_of(hf_config), models.config_from_hf(hf_config)
    names = gguf_modules(family, config.num_hidden_layers)
    # llama.cpp divides alpha by the rank; the rank-stabilised form divides by its root.
    alpha = settings.alpha * (math.sqrt(settings.r) if settings.use_rslora else 1.0)
    lazy, unknown = {}, []
    for key, spec in source.specs().items():
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not key.startswith(PREFIX) or module not in names or part not in ("A", "B") or "norm" in module:
            unknown.append(key)
            continue
        change = functools.partial(adapter_half, family, config, module, part)
        lazy[f"{names[module].name}.weight.lora_{part.lower()}"] = _FileTensor(
            kind=kind,
            shape=spec.shape,
            parts=(functools.partial(_encode, key, functools.partial(source.read, key), change, kind),),
        )
    if unknown or not lazy:
        problem = f"GGUF has no name for {listed(unknown, 3)}" if unknown else "it holds no LoRA"
        raise ExportError(f"{folder} cannot be written as a GGUF adapter: {problem}")
    _check_adapted(family, lazy)
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    _write(GGUFWriter(path, family.arch), metadata, lazy)


def _check_adapted(family: Family, tensors: Iterable[str]) -> None:
    """Raises ExportError for halves of an adapter on a tensor on which llama.cpp passes it by. tensors: their names."""
    passed_by = sorted({name.partition(".weight.")[0] for name in tensors} & set(family.unadapted))
    if passed_by:
        raise ExportError(
            f"llama.cpp's {family.arch} passes an adapter on {', '.join(passed_by)} by without a word "
            f"({', '.join(family.whole[name] for name in passed_by)}), so no GGUF adapter is written. Leave it out of "
            "adapter.target_modules, or merge the adapter: jaxft convert with --to=gguf"
        )


def check_gguf(path: str, tensors: Mapping[str, LazyTensor], *, dtype: str) -> None:
    """Reads a written model back and compares every tensor with the library's quantisation of the source, bit by bit.

    Gemma's norms are read back as (1 + w) - 1 in float32: w may differ in its last bits, and the layer multiplies by
    the same number. Raises ExportError naming the first tensor that differs.
    """
    source = GGUFFile(path)
    tensors = single_tensors(source.family, source.kinds(dtype).config, tensors)
    kinds, written = source.kinds(dtype), source.specs()
    config = kinds.config
    if set(written) != set(tensors):
        raise ExportError(f"{path} holds other tensors than the source: {sorted(set(written) ^ set(tensors))[:3]}")
    for name, (spec, make) in tensors.items():
        tensor_kind = kinds.kind(spec.shape, require_tensor(source.family, name))
        by_rows = is_by_rows(source.family, config, name, spec.shape)
        expected = make().astype(np.float32)
        # Rows are compared in the order of the source.
        expected = expected if by_rows else to_file(source.family, config, name, expected)
        if tensor_kind != F32:
            expected = dequantize(quantize(np.ascontiguousarray(expected), tensor_kind), tensor_kind)
        expected = expected if by_rows else from_file(source.family, config, name, expected, spec.shape)
        if not np.array_equal(source.read(name).view(np.uint32), expected.view(np.uint32)):
            raise ExportError(f"{path}: tensor {name!r} reads back differently. Do not use the file.")


@dataclass(frozen=True, kw_only=True)
class _FileTensor:
    """A tensor of the file, and the functions that make the bytes of its parts: one for each expert, or just one."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    parts: tuple[Callable[[], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes

    def tofile(self, file: BinaryIO) -> None:
        """The method that the library's writer calls on the array it expects here."""
        for make in self.parts:
            make().tofile(file)


def _file_tensors(kinds: FileKinds, tensors: Mapping[str, LazyTensor]) -> dict[str, _FileTensor]:
    """The tensors of the file by name, from those under Hugging Face names."""
    family, config = kinds.family, kinds.config
    tensors, count = single_tensors(family, config, tensors), expert_count(family, config)
    if config.head == "score":
        raise ExportError(
            "a reward model has a score head in place of the LM head, and jaxft has no form for it in GGUF files. "
            "Write a Hugging Face folder."
        )
    modules = {hf: gguf_tensor(family, hf) for hf in tensors}
    unknown = [hf for hf, module in modules.items() if module is None]
    if unknown:
        raise ExportError(f"{len(unknown)} tensors have no name in GGUF's {family.arch}: {listed(unknown, 3)}")
    groups: dict[str, list[tuple[int, str, GGUFModule]]] = {}
    for hf, module in modules.items():
        if module is not None:
            groups.setdefault(module.name, []).append((module.expert or 0, hf, module))
    merged = {}
    for name, members in groups.items():
        members.sort(key=lambda member: member[0])
        (_, first, gguf_module), spec = members[0], tensors[members[0][1]][0]
        tensor_kind = kinds.kind(spec.shape, gguf_module)
        merged[name] = _FileTensor(
            kind=tensor_kind,
            shape=(*(() if gguf_module.expert is None else (count,)), *file_shape(family, config, first, spec.shape)),
            parts=tuple(
                functools.partial(
                    _encode, hf, tensors[hf][1], functools.partial(to_file, family, config, hf), tensor_kind
                )
                for _, hf, _ in members
            ),
        )
        if gguf_module.expert is not None and len(members) != count:
            raise ExportError(f"only {len(members)} of {count} experts are there, among them {first!r}")
    return merged


def _encode(
    name: str,
    make: Callable[[], np.ndarray],
    change: Callable[[np.ndarray], np.ndarray],
    kind: GGMLQuantizationType,
) -> np.ndarray:
    values = change(make().astype(np.float32))
    if not all_finite(values):
        raise ExportError(f"tensor {name!r} has NaN or infinite values, and is not written: export an earlier step")
    if kind == F16 and values.size and (largest := float(np.max(np.abs(values)))) > float(np.finfo(np.float16).max):
        raise ExportError(f"tensor {name!r} has values up to {largest:.3g}, float16 ends at 65504; use bfloat16")
    return quantize(np.ascontiguousarray(values), kind)


def _write(writer: GGUFWriter, metadata: Mapping[str, Any], tensors: Mapping[str, _FileTensor]) -> None:
    add: dict[type, Callable[[str, Any], None]]
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # it calls `tofile` alone
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
    finally:
        if writer.fout is not None:
            writer.close()
