"""The formats that a conversion writes, and the comparison of each with its source afterwards."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import models
from jaxft.checkpoint import hf, manifest, orbax_folder
from jaxft.checkpoint.gguf import write as gguf_write
from jaxft.checkpoint.gguf.names import WRITTEN
from jaxft.checkpoint.hub.base import base_facts
from jaxft.checkpoint.hub.card import Card, write_card
from jaxft.checkpoint.load import is_adapter, load_model, shardings_by_path
from jaxft.checkpoint.safetensors_writer import LazyTensor, blocks, make_block, write_sharded
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource, TensorSpec
from jaxft.checkpoint.verify import check_export
from jaxft.config import MeshConfig
from jaxft.data.tokenizers.end_tokens import with_end_tokens
from jaxft.data.tokenizers.gguf_write import check_tokenizer, tokenizer_metadata
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ExportError, listed
from jaxft.files.companions import copy_companions
from jaxft.models.hf_fields import ALLOWED
from jaxft.models.score_model import is_score_model
from jaxft.sharding.mesh import make_mesh_plan

GGUF_NAME = "model.gguf"
# Parameters up to which the logits are compared as well: the model is then in memory three times in float32.
LOGITS_LIMIT = 300_000_000


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a conversion writes besides the tensors, and how.

    folder: the unfinished one. name: for general.name. base: the folder with the weights, whose license goes with them.
    """

    folder: Path
    hf_config: dict[str, Any]
    generation: dict[str, Any] | None
    tokenizer: Tokenizer | None
    dtype: str
    max_shard_bytes: int
    name: str
    base: str


def write_hf(target: Target, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a Hugging Face folder; files that an interrupted call finished are kept."""
    write_sharded(
        target.folder,
        _in_files(target, tensors),
        max_bytes=target.max_shard_bytes,
        metadata={"format": "pt"},
        keep_finished=True,
    )
    _write_companions(target)


def check_hf(target: Target, tensors: Mapping[str, LazyTensor], source: str) -> dict[str, Any]:
    """Compares every tensor bit by bit, and if the model is small enough its logits with those of the source."""
    _compare(SafetensorsFolder(target.folder), _in_files(target, tensors))
    size = sum(spec.size for spec, _ in tensors.values())
    if size > LOGITS_LIMIT:
        return {"tensors": "bitwise", "logits": f"not compared: {size / 1e9:.1f} billion parameters"}
    # float16 rounds finer than bfloat16, whose tolerance is known.
    dtype = "float32" if target.dtype == "float32" else "bfloat16"
    base, allowed = target.base if is_adapter(source) else None, target.hf_config.get(ALLOWED, ())
    checks = check_export(load_model(source, base=base, allow_unknown=allowed), str(target.folder), dtype=dtype)
    return {"tensors": "bitwise", "logits": {check.reader: check.difference for check in checks}}


def write_gguf(target: Target, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a GGUF file with its tokenizer. Raises ExportError if the source has no tokenizer."""
    tokenizer = _require_tokenizer(target)
    gguf_write.write_gguf(
        str(target.folder / GGUF_NAME),
        target.hf_config,
        tensors,
        dtype=target.dtype,
        tokenizer=tokenizer_metadata(tokenizer, target.hf_config["vocab_size"]),
        name=target.name,
    )


def check_gguf(target: Target, tensors: Mapping[str, LazyTensor], source: str) -> dict[str, Any]:
    """Compares every tensor with the library's quantisation of the source, and the tokenizer on difficult texts."""
    path = str(target.folder / GGUF_NAME)
    gguf_write.check_gguf(path, tensors, dtype=target.dtype)
    check_tokenizer(path, _require_tokenizer(target))
    return {"tensors": "bitwise" if target.dtype == "float32" else "equal to the library's quantisation"}


def _require_tokenizer(target: Target) -> Tokenizer:
    if target.tokenizer is None:
        raise ExportError("a GGUF file needs a tokenizer, and the source has none: copy its tokenizer files there")
    return target.tokenizer


def write_gguf_adapter(adapter: str, hf_config: dict[str, Any], folder: Path, dtype: str) -> dict[str, Any]:
    """Writes a LoRA adapter alone as GGUF. Returns its size in bytes."""
    path = folder / GGUF_NAME
    gguf_write.write_gguf_adapter(str(path), adapter, hf_config, dtype=dtype)
    return {"bytes": path.stat().st_size}


def write_orbax(target: Target, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes an Orbax folder. Meanwhile the parameters are on the devices, split over all of them."""
    config = models.config_from_hf(target.hf_config)
    model = models.abstract_model(config, dtype=target.dtype, param_dtype=target.dtype)
    mesh = make_mesh_plan(MeshConfig()) if jax.device_count() > 1 else None
    module = hf.load_weights(model, _LazySource(tensors), None if mesh is None else shardings_by_path(model, mesh))
    orbax_folder.write_params(module, target.folder)
    _write_companions(target)
    manifest.write(target.folder)


def check_orbax(target: Target, tensors: Mapping[str, LazyTensor], source: str) -> dict[str, Any]:
    """Compares every tensor bit by bit, and every file with the manifest that later shows damage."""
    _compare(orbax_folder.OrbaxFolder(target.folder), tensors)
    return {"tensors": "bitwise"}


def write_hf_card(folder: Path, origin: str, base: str, hf_config: Mapping[str, Any], *, chats: bool) -> None:
    """Writes the model card of a Hugging Face folder. origin: path of the source. base: of its weights."""
    known = base_facts(base)
    card = Card(
        title=(known.name or os.path.abspath(origin)).rpartition("/")[2],
        form="merged",
        base=known,
        classifies=is_score_model(hf_config),
        chats=chats,
        gguf=hf_config.get("model_type") in WRITTEN and not is_score_model(hf_config),
        trained=is_adapter(origin),
        sections=(("Checks", "Every tensor was compared with the one that it was made of, after it was written."),),
    )
    write_card(folder, card)


class _LazySource:
    """Lazy tensors as a `TensorSource`."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def specs(self) -> dict[str, TensorSpec]:
        return {name: spec for name, (spec, _) in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._tensors[name][1](index)


def _in_files(target: Target, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    config = models.config_from_hf(target.hf_config)
    return {config.in_files(name): tensor for name, tensor in tensors.items()}


def _write_companions(target: Target) -> None:
    if target.tokenizer is not None:
        target.tokenizer.save(target.folder)
    hf.write_config(str(target.folder), target.hf_config, dtype=target.dtype, generation=_generation(target))
    copy_companions(target.base, str(target.folder))


def _generation(target: Target) -> dict[str, Any]:
    if target.tokenizer is None:
        return with_end_tokens(target.generation, target.hf_config)
    return target.tokenizer.generation_config(target.generation)


def _compare(written: TensorSource, tensors: Mapping[str, LazyTensor]) -> None:
    specs = written.specs()
    if set(specs) != set(tensors):
        differing = listed(sorted(set(specs) ^ set(tensors)), 3)
        raise ExportError(f"other tensors were written than the source has: {differing}")
    for name, (spec, make) in tensors.items():
        bits = np.dtype(f"u{spec.dtype.itemsize}")
        same = specs[name] == spec and all(
            np.array_equal(
                np.ascontiguousarray(written.read(name, index)).view(bits),
                np.ascontiguousarray(make_block(make, index)).view(bits),
            )
            for index in blocks(spec)
        )
        if not same:
            raise ExportError(f"tensor {name!r} reads back differently from the source. Do not use what was written.")
