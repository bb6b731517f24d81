"""The order of rows and columns in layers with a delta-net.

Qwen3-Next keeps queries, keys, values and gates of a key head side by side, GGUF each kind by itself. In Qwen3.5 the
values of a key head are side by side in Hugging Face's files; in GGUF its first value heads come first, then all second
ones.
"""

# H key heads, R value heads of a key head, K key size, V value size

import functools
from collections.abc import Callable, Mapping

import numpy as np

from jaxft.checkpoint.safetensors_writer import LazyTensor
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.models.families.qwen.qwen3_5 import DeltaNetConfig

_GROUPED, _PARTS = ".linear_attn.in_proj_qkvz.weight", ("in_proj_qkv", "in_proj_z")


def grouped_rows(config: DeltaNetConfig) -> tuple[np.ndarray, np.ndarray]:
    """(rows of queries, keys and values, rows of gates) in Qwen3-Next's `in_proj_qkvz`, in GGUF's order."""
    key, values = config.linear_key_head_dim, _values_of_key_head(config)
    rows = np.arange(config.linear_num_key_heads * 2 * (key + values)).reshape(config.linear_num_key_heads, -1)
    q, k, v, z = np.split(rows, (key, 2 * key, 2 * key + values), axis=1)
    return np.concatenate([q.ravel(), k.ravel(), v.ravel()]), z.ravel()


def tiled_order(config: DeltaNetConfig, part: str) -> np.ndarray | None:
    """Hugging Face's rows of a part of Qwen3.5 (columns of `ssm_out`) in GGUF's order; None if it is the same."""
    heads = config.linear_num_key_heads
    ratio = config.linear_num_value_heads // heads
    if ratio == 1:
        return None
    size = config.linear_value_head_dim if part in ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_out") else 1
    values = np.arange(heads * ratio * size).reshape(heads, ratio, size).swapaxes(0, 1).ravel()
    if part in ("attn_gate", "ssm_out", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"):
        return values
    if part in ("attn_qkv", "ssm_conv1d"):
        before = 2 * heads * config.linear_key_head_dim
        return np.concatenate([np.arange(before), before + values])
    return None


def split_grouped(tensors: Mapping[str, LazyTensor], config: DeltaNetConfig) -> dict[str, LazyTensor]:
    """Qwen3-Next's tensors with `in_proj_qkv` and `in_proj_z` in place of `in_proj_qkvz`."""
    out: dict[str, LazyTensor] = {}
    for name, (spec, make) in tensors.items():
        if not name.endswith(_GROUPED):
            out[name] = (spec, make)
            continue
        for part, rows in zip(_PARTS, grouped_rows(config), strict=True):
            single = name.replace("in_proj_qkvz", part)
            out[single] = (TensorSpec((len(rows), *spec.shape[1:]), spec.dtype), functools.partial(_take, make, rows))
    return out


def _take(make: Callable[..., np.ndarray], rows: np.ndarray) -> np.ndarray:
    values: np.ndarray = make()[rows]
    return values


class GroupedRows:
    """A source of `in_proj_qkv` and `in_proj_z` under the names of Hugging Face's files of Qwen3-Next."""

    def __init__(self, source: TensorSource, names: Mapping[str, TensorSpec], config: DeltaNetConfig) -> None:
        self._source, self._specs, self._config = source, dict(names), config

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, without reading one."""
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """As `TensorSource.read`. Of `in_proj_qkvz` all rows are read."""
        if not name.endswith(_GROUPED):
            return self._source.read(name, index)
        spec = self._specs[name]
        (start, stop), columns = block_bounds(spec.shape, index)
        out = np.empty((spec.shape[0], columns[1] - columns[0]), spec.dtype)
        for part, rows in zip(_PARTS, grouped_rows(self._config), strict=True):
            out[rows] = self._source.read(name.replace("in_proj_qkvz", part), (slice(None), slice(*columns)))
        return out[start:stop]


def _values_of_key_head(config: DeltaNetConfig) -> int:
    return config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
