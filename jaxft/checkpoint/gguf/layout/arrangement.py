"""Which tensors a file of a model has, and how those of Hugging Face's files are made of them.

Hugging Face's tensors become single ones first: tensors that are each one tensor of the file, or one expert of it.
"""

# E experts, F inner units of an expert, D model

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft import models
from jaxft.checkpoint.gguf.family import Family, GGUFModule
from jaxft.checkpoint.gguf.layout.delta_rows import GroupedRows, split_grouped
from jaxft.checkpoint.gguf.layout.fused import JoinedTensors, split_tensors
from jaxft.checkpoint.gguf.layout.latent import JoinedLatent, split_latent
from jaxft.checkpoint.gguf.layout.streams import SingleProjections, split_streams
from jaxft.checkpoint.gguf.layout.values import file_shape
from jaxft.checkpoint.gguf.layout.xielu import WithNumbers, without_numbers
from jaxft.checkpoint.gguf.names import require_tensor
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.files.gguf.header import GGUFHeader
from jaxft.models.families.deepseek.deepseek_v3 import LatentConfig
from jaxft.models.families.gemma.gemma3n import Config as Gemma3nConfig
from jaxft.models.families.qwen.qwen3_next import Config as Qwen3NextConfig
from jaxft.models.family import FamilyConfig


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor of the file. shape: in the file. members: the single tensors that it holds, one for each expert."""

    shape: tuple[int, ...]
    module: GGUFModule
    members: tuple[str, ...]

    @property
    def merged(self) -> bool:
        """Whether it holds experts."""
        return self.module.expert is not None


def single_tensors(family: Family, config: FamilyConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Hugging Face's tensors as single ones, whose values are read when they are needed."""
    if family.model_type == "apertus":
        return without_numbers(tensors)
    if isinstance(config, Qwen3NextConfig):
        return split_grouped(tensors, config)
    if isinstance(config, LatentConfig):
        return split_latent(tensors, config)
    if isinstance(config, Gemma3nConfig):
        return split_streams(tensors, config)
    return split_tensors(tensors, family.fused)


def joined_tensors(family: Family, config: FamilyConfig, header: GGUFHeader, source: TensorSource) -> TensorSource:
    """The inverse of `single_tensors`: Hugging Face's tensors from the single ones and the metadata."""
    if family.model_type == "apertus":
        return WithNumbers(source, header, config.num_hidden_layers)
    if isinstance(config, Qwen3NextConfig):
        return GroupedRows(source, _specs(config), config)
    if isinstance(config, LatentConfig):
        return JoinedLatent(source, _specs(config))
    if isinstance(config, Gemma3nConfig):
        return SingleProjections(source, _specs(config))
    return JoinedTensors(source, _specs(config), family.fused) if family.fused else source


def file_tensors(family: Family, config: FamilyConfig) -> dict[str, FileTensor]:
    """The tensors of a file by name."""
    members: dict[str, list[str]] = {}
    first: dict[str, tuple[GGUFModule, tuple[int, ...]]] = {}
    for name, shape in single_shapes(family, config).items():
        module = require_tensor(family, name)
        members.setdefault(module.name, []).append(name)
        first.setdefault(module.name, (module, file_shape(family, config, name, shape)))
    return {
        name: FileTensor(
            shape=shape if module.expert is None else (len(members[name]), *shape),
            module=module,
            members=tuple(members[name]),
        )
        for name, (module, shape) in first.items()
    }


def single_shapes(family: Family, config: FamilyConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every single tensor of a model by its Hugging Face name."""
    tensors = {name: (spec, _not_read) for name, spec in _specs(config).items()}
    return {name: spec.shape for name, (spec, _) in single_tensors(family, config, tensors).items()}


def _not_read(index: Any = None) -> np.ndarray:
    raise NotImplementedError("shapes alone are known")


@functools.lru_cache(maxsize=8)
def _specs(config: FamilyConfig) -> Mapping[str, TensorSpec]:
    """The tensors of Hugging Face's files of a model, float32."""
    return {name: spec for name, (spec, _) in hf_tensors(models.abstract_model(config)).items()}
