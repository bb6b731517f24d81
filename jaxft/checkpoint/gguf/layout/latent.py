"""The matrix of keys and values of latent attention, which is two tensors of a GGUF file.

Hugging Face's `kv_b_proj` has the rows of each head's keys before those of its values. GGUF keeps both by head; its
keys' matrices are transposed, as llama.cpp multiplies queries with them.
"""

# N heads, P the part of a head's keys without positions, V value size, C size of the latent vector

import functools
from collections.abc import Callable, Mapping

import numpy as np

from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.models.families.deepseek.deepseek_v3 import LatentConfig

_BOTH, _KEYS, _VALUES = ".self_attn.kv_b_proj.weight", "k_b_proj", "v_b_proj"


def split_latent(tensors: Mapping[str, LazyTensor], config: LatentConfig) -> dict[str, LazyTensor]:
    """The tensors with `k_b_proj` [N, C, P] and `v_b_proj` [N, V, C] in place of `kv_b_proj` [N (P + V), C]."""
    heads, plain, values = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    out: dict[str, LazyTensor] = {}
    for name, (spec, make) in tensors.items():
        if not name.endswith(_BOTH):
            out[name] = (spec, make)
            continue
        rank = spec.shape[1]
        for part, shape in ((_KEYS, (heads, rank, plain)), (_VALUES, (heads, values, rank))):
            one = functools.partial(_one, make, config, part)
            out[name.replace("kv_b_proj", part)] = (TensorSpec(shape, spec.dtype), one)
    return out


def _one(make: Callable[..., np.ndarray], config: LatentConfig, part: str) -> np.ndarray:
    both_NXC = make().reshape(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, -1)
    keys_NPC, values_NVC = np.split(both_NXC, (config.qk_nope_head_dim,), axis=1)
    return keys_NPC.swapaxes(1, 2) if part == _KEYS else values_NVC


class JoinedLatent:
    """A source of both tensors under the name of Hugging Face's files."""

    def __init__(self, source: TensorSource, names: Mapping[str, TensorSpec]) -> None:
        self._source, self._specs = source, dict(names)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`. Of `kv_b_proj` all rows are read."""
        if not name.endswith(_BOTH):
            return self._source.read(name, index)
        keys_NCP, values_NVC = (self._source.read(name.replace("kv_b_proj", part)) for part in (_KEYS, _VALUES))
        both = np.concatenate([keys_NCP.swapaxes(1, 2), values_NVC], axis=1).reshape(self._specs[name].shape)
        return both[tuple(slice(*cut) for cut in block_bounds(both.shape, index))]
