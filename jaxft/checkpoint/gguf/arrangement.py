"""Which tensors a file of a model has, and how those of Hugging Face's files are made of them.

Hugging Face's tensors become single ones first: tensors that are each one tensor of the file, or one expert of it.
"""

# E experts, F inner units of an expert, D model

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft import models
from jaxft.checkpoint.gguf.family import Family, GGUFModule
from jaxft.checkpoint.gguf.names import FAMILIES, expert_count, require_tensor
from jaxft.checkpoint.gguf.oss_experts import FusedExperts, single_experts
from jaxft.checkpoint.gguf.xielu import WithNumbers, without_numbers
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import TensorSource
from jaxft.files.gguf.header import GGUFHeader
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


def single_tensors(family: Family, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Hugging Face's tensors as single ones, whose values are read when they are needed."""
    if family.model_type == "gpt_oss":
        return single_experts(tensors)
    if family.model_type == "apertus":
        return without_numbers(tensors)
    return dict(tensors)


def joined_tensors(family: Family, config: FamilyConfig, header: GGUFHeader, source: TensorSource) -> TensorSource:
    """The inverse of `single_tensors`: Hugging Face's tensors from the single ones and the metadata."""
    if family.model_type == "gpt_oss":
        return FusedExperts(source, expert_count(family, config))
    if family.model_type == "apertus":
        return WithNumbers(source, header, config.num_hidden_layers)
    return source


def file_tensors(family: Family, config: FamilyConfig) -> dict[str, FileTensor]:
    """The tensors of a file by name."""
    out: dict[str, FileTensor] = {}
    members: dict[str, list[str]] = {}
    for name, shape in single_shapes(family.model_type, config):
        module = require_tensor(family, name)
        members.setdefault(module.name, []).append(name)
        out.setdefault(module.name, FileTensor(shape=shape, module=module, members=()))
    for name, tensor in out.items():
        hf = tuple(members[name])
        out[name] = FileTensor(
            shape=(len(hf), *tensor.shape) if tensor.merged else tensor.shape, module=tensor.module, members=hf
        )
    return out


@functools.lru_cache(maxsize=8)
def single_shapes(model_type: str, config: FamilyConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of every single tensor of a model."""
    tensors = single_tensors(FAMILIES[model_type], hf_tensors(models.abstract_model(config)))
    return tuple((name, spec.shape) for name, (spec, _) in tensors.items())
