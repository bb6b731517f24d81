"""Rotary position embeddings (arXiv:2104.09864) with the frequency scaling that long-context models use."""

# B batch, S sequence, N heads, H head_dim, F = H / 2 frequencies

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import ModelError

_SCALED_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of one rotary embedding. kind: default, linear (arXiv:2306.15595) or llama3."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Rope":
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Raises ModelError for a scaling kind, or a field of one, that is not implemented.
        """
        fields = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
        theta = fields.pop("rope_theta", hf.get("rope_theta", 10000.0))
        kind = fields.pop("rope_type", fields.pop("type", "default"))
        fields.pop("type", None)
        if kind not in _SCALED_FIELDS:
            raise ModelError(f"rope scaling {kind!r} is not implemented; known: {', '.join(_SCALED_FIELDS)}")
        known = _SCALED_FIELDS[kind]
        # partial_rotary_factor 1.0 is what transformers 5 writes for an ordinary full rotation.
        if fields.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("rope partial_rotary_factor other than 1.0 is not implemented")
        extra = sorted(set(fields) - set(known))
        missing = sorted(set(known) - set(fields))
        if extra or missing:
            raise ModelError(f"rope scaling {kind!r}: unknown fields {extra}, missing fields {missing}")
        return cls(theta=float(theta), kind=kind, **fields)

    def to_hf(self) -> dict[str, Any]:
        """The same in the transformers 4 dialect, which transformers 5 reads too."""
        scaling = {name: getattr(self, name) for name in _SCALED_FIELDS[self.kind]}
        return {
            "rope_theta": self.theta,
            "rope_scaling": {"rope_type": self.kind, **scaling} if self.kind != "default" else None,
        }

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, [F] float32."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        freqs_F = (1.0 / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        if self.kind == "linear":
            freqs_F = freqs_F / np.float32(self.factor)
        if self.kind == "llama3":
            freqs_F = self._llama3(freqs_F)
        return freqs_F.astype(np.float32)

    def _llama3(self, freqs_F: np.ndarray) -> np.ndarray:
        # Long waves are slowed by `factor`, short ones kept, those between interpolated.
        # Source: Llama 3.1 reference code, `apply_scaling`.
        wavelength_F = 2 * math.pi / freqs_F
        turns_F = self.original_max_position_embeddings / wavelength_F
        smooth_F = (turns_F - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth_F = np.clip(smooth_F, 0.0, 1.0)
        return (1 - smooth_F) * freqs_F / self.factor + smooth_F * freqs_F


def rotation(rope: Rope, head_dim: int, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, each [B, S, F] float32."""
    # float32: bfloat16 rounds position 257 to 256.
    angles_BSF = positions_BS.astype(jnp.float32)[..., None] * rope.frequencies(head_dim)
    return jnp.cos(angles_BSF), jnp.sin(angles_BSF)


def rotate(x_BSNH: jax.Array, cos_BSF: jax.Array, sin_BSF: jax.Array) -> jax.Array:
    """Turns the pair (x[f], x[f + F]) by its angle, in float32: the half-split layout of Hugging Face."""
    first, second = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BSF[:, :, None, :], sin_BSF[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSNH.dtype)
