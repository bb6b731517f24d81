"""Rotary position embeddings (arXiv:2104.09864) with the frequency scalings of long-context models."""

# B batch, S sequence, N heads, H head_dim, F frequencies: half of the rotated dimensions

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.attention.turning import turned

MOST = 1e15  # of any number of a rope; larger ones leave float32's range in the formulas


class _Fields(NamedTuple):
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_SCALED_FIELDS = {
    "default": _Fields(),
    "linear": _Fields(("factor",)),
    "dynamic": _Fields(("factor",), ("alpha",)),
    "proportional": _Fields((), ("factor",)),
    "llama3": _Fields(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": _Fields(
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "llama_4_scaling_beta"),
    ),
    "longrope": _Fields(
        ("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")
    ),
}


# How images and videos are positioned; every position of text is the same in all sections, so it rotates as without.
MULTIMODAL_FIELDS = ("mrope_section", "mrope_interleaved")


class Rotation(NamedTuple):
    """Cosines and sines of every token's angles, each [B, S, F] float32.

    queries_BS: an additional factor on queries (not on keys); None for 1.
    """

    cos_BSF: jax.Array
    sin_BSF: jax.Array
    queries_BS: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of one rotary embedding.

    kind: default, linear (arXiv:2306.15595), dynamic (theta grows with the length of a document beyond
    max_position_embeddings; with alpha it is theta * alpha^(d / (d - 2)) for any length, d being the rotated
    dimensions), proportional, llama3, yarn (arXiv:2309.00071) or longrope (arXiv:2402.13753).
    partial_rotary_factor: the fraction of each head's dimensions that is rotated. They are the first ones; those of a
    proportional rope are the first of each half, with the frequencies that a rotation of the whole head has there.
    llama_4_scaling_beta: beta in the factor on queries, `1 + beta log(1 + floor(position /
    original_max_position_embeddings))` (idea: arXiv:2501.19399). mrope_section, mrope_interleaved: of models that take
    images too; they change nothing for text and are only passed on.
    The other fields have transformers' names and meanings.
    """

    theta: float = 10000.0
    kind: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    alpha: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    llama_4_scaling_beta: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Rope":
        """Reads `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Raises ModelError for a kind of scaling that is not implemented, and for unknown or missing fields of a scaling.
        """
        fields = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
        fields = {name: value for name, value in fields.items() if value is not None}
        theta = fields.pop("rope_theta", hf.get("rope_theta", 10000.0))
        kind = fields.pop("rope_type", fields.pop("type", "default"))
        fields.pop("type", None)
        images = {name: fields.pop(name) for name in MULTIMODAL_FIELDS if name in fields}
        part = fields.pop("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
        if not isinstance(kind, str) or kind not in _SCALED_FIELDS:
            raise ModelError(f"rope scaling {kind!r} is not implemented; known: {', '.join(_SCALED_FIELDS)}")
        known = _SCALED_FIELDS[kind]
        context = hf.get("max_position_embeddings")
        if kind in ("yarn", "longrope"):
            # A value outside the scaling, as in Phi-3, takes precedence over the one inside.
            outside = hf.get("original_max_position_embeddings")
            fields["original_max_position_embeddings"] = (
                outside or fields.get("original_max_position_embeddings") or context
            )
        for name in set(fields) & set(hf.get("allow_unknown") or ()) - set(known.required + known.optional):
            del fields[name]
        extra = sorted(set(fields) - set(known.required + known.optional))
        missing = sorted(name for name in known.required if fields.get(name) is None)
        if extra or missing:
            raise ModelError(
                f"rope scaling {kind!r}: unknown fields {extra}, missing fields {missing}.{_mend(fields, kind, extra)}"
            )
        if kind == "dynamic":
            fields["max_position_embeddings"] = context or 2048
        if kind == "longrope":
            fields["max_position_embeddings"] = context or fields["original_max_position_embeddings"]
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        numbers = {name: _number(name, value) for name, value in fields.items()}
        return cls(
            theta=float(_number("rope_theta", theta)),
            kind=kind,
            partial_rotary_factor=float(_number("partial_rotary_factor", part)),
            **numbers,
            **_checked_sections(images),
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json in the dialect of transformers 4, which transformers 5 reads too."""
        known = _SCALED_FIELDS[self.kind]
        chosen = {name: getattr(self, name) for name in known.required + known.optional}
        chosen |= {name: getattr(self, name) for name in MULTIMODAL_FIELDS}
        scaling = {n: list(v) if isinstance(v, tuple) else v for n, v in chosen.items() if v is not None}
        part = {} if self.partial_rotary_factor == 1.0 else {"partial_rotary_factor": self.partial_rotary_factor}
        return {
            "rope_theta": self.theta,
            "rope_scaling": {"rope_type": self.kind, **scaling} if self.kind != "default" or scaling else None,
            **part,
        }

    def to_parameters(self) -> dict[str, Any]:
        """The same as `rope_parameters` of transformers 5, for one kind of layers."""
        fields = self.to_hf()
        return (fields.pop("rope_scaling") or {"rope_type": self.kind}) | fields

    def for_length(self, length: int) -> "Rope":
        """A longrope fixed to its factors for sequences of `length` tokens; any other kind unchanged."""
        if self.kind != "longrope":
            return self
        chosen = self.long_factor if length > self.original_max_position_embeddings else self.short_factor
        return dataclasses.replace(self, short_factor=chosen, long_factor=chosen)

    def rotated_dims(self, head_dim: int) -> int:
        """The number of a head's dimensions that are rotated, or are in front of the last rotated one."""
        if self.kind == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)

    def check(self, head_dim: int) -> None:
        """Raises ModelError if the rotation does not fit the heads."""
        rotated = self.rotated_dims(head_dim)
        if self.kind == "proportional" and not 0 < self.partial_rotary_factor <= 1:
            raise ModelError(f"rope partial_rotary_factor={self.partial_rotary_factor} is not a fraction of each head")
        if rotated % 2 or not 0 < rotated <= head_dim:
            raise ModelError(
                f"rotary embeddings rotate pairs of dimensions, but partial_rotary_factor={self.partial_rotary_factor} "
                f"of head_dim={head_dim} is {rotated}"
            )
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            if len(getattr(self, name)) != rotated // 2:
                raise ModelError(
                    f"rope {name} has {len(getattr(self, name))} numbers, but {rotated} rotated dimensions need "
                    f"{rotated // 2}"
                )
        try:
            with np.errstate(all="ignore"):
                numbers = [*self.frequencies(head_dim), *self.frequencies(head_dim, long=True), self.magnitude]
        except (ArithmeticError, ValueError) as error:
            raise ModelError(f"the numbers of the rope {self} have no result: {error}. Correct config.json.") from error
        if not np.all(np.isfinite(numbers)):
            raise ModelError(f"the numbers of the rope {self} give angles that are not finite. Correct config.json.")

    def frequencies(self, head_dim: int, *, long: bool = False) -> np.ndarray:
        """Radians per position, [F] float32. long: longrope's factors for sequences beyond the original length."""
        rotated = self.rotated_dims(head_dim)
        exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
        theta = self.theta if self.alpha is None else self.theta * self.alpha ** (rotated / (rotated - 2))
        freqs_F = (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)
        if self.kind == "proportional":
            freqs_F[int(self.partial_rotary_factor * head_dim // 2) :] = 0.0
        if self.kind in ("linear", "proportional"):
            freqs_F = freqs_F / np.float32(1.0 if self.factor is None else self.factor)
        if self.kind == "llama3":
            freqs_F = self._llama3(freqs_F)
        if self.kind == "yarn":
            freqs_F = self._yarn(freqs_F)
        if self.kind == "longrope":
            freqs_F = freqs_F / np.array(self.long_factor if long else self.short_factor, np.float32)
        return freqs_F.astype(np.float32)

    @property
    def magnitude(self) -> float:
        """The factor on cosines and sines, which keeps attention equally sharp over longer contexts."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            factor = self.factor or self.max_position_embeddings / self.original_max_position_embeddings
            log = math.log(factor) / math.log(self.original_max_position_embeddings)
            return math.sqrt(1 + log) if factor > 1 else 1.0
        if self.mscale and self.mscale_all_dim:
            return _sharpness(self.factor, self.mscale) / _sharpness(self.factor, self.mscale_all_dim)
        return _sharpness(self.factor, 1.0)

    @property
    def score_factor(self) -> float:
        """The factor on scores of latent attention, which keeps them equally sharp over longer contexts."""
        if self.kind != "yarn" or not self.mscale_all_dim:
            return 1.0
        return _sharpness(self.factor, self.mscale_all_dim) ** 2

    def _llama3(self, freqs_F: np.ndarray) -> np.ndarray:
        # Low frequencies are divided by `factor`, high ones kept, those between interpolated.
        # Source: Llama 3.1 reference code, `apply_scaling`.
        wavelength_F = 2 * math.pi / freqs_F
        turns_F = self.original_max_position_embeddings / wavelength_F
        smooth_F = (turns_F - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth_F = np.clip(smooth_F, 0.0, 1.0)
        return (1 - smooth_F) * freqs_F / self.factor + smooth_F * freqs_F

    def _yarn(self, freqs_F: np.ndarray) -> np.ndarray:
        # Frequencies with more than beta_fast turns in the original context are kept, those with fewer than beta_slow
        # turns are divided by `factor`, with a linear ramp over the index between them.
        def index_of(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return len(freqs_F) * math.log(wavelength) / math.log(self.theta)

        low, high = index_of(self.beta_fast or 32), index_of(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(freqs_F) - 1)
        high = high + 0.001 if low == high else high
        ramp_F = np.clip((np.arange(len(freqs_F), dtype=np.float32) - low) / (high - low), 0, 1)
        return ramp_F * freqs_F / self.factor + (1 - ramp_F) * freqs_F


def _number(name: str, value: Any) -> Any:
    """A field of a rope as a number, a tuple of numbers, or the one that is a switch. Raises ModelError for others."""
    if name == "truncate" and isinstance(value, bool):
        return value
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, tuple):
            raise ModelError(f"rope {name}={value!r} in config.json is not a list of numbers")
        return tuple(_number(f"a number in {name}", one) for one in value)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?(e\+?\d+)?", value):  # some files have rope_theta as text
        value = float(value)
    whole = name.endswith("position_embeddings")
    if type(value) not in (int, float) or not 0 <= value < MOST or (whole and value != int(value)):
        raise ModelError(f"rope {name}={value!r} in config.json is not a {'whole ' * whole}number from 0 to {MOST:.0e}")
    return int(value) if whole else value


def _checked_sections(images: dict[str, Any]) -> dict[str, Any]:
    """The fields about images of a rope. Raises ModelError for values of another kind."""
    section, interleaved = images.get("mrope_section"), images.get("mrope_interleaved")
    whole = isinstance(section, list) and all(type(one) is int and one >= 0 for one in section)
    if not (section is None or whole) or not isinstance(interleaved, bool | None):
        raise ModelError(
            f"rope mrope_section={section!r}, mrope_interleaved={interleaved!r} in config.json: the first is a list of "
            "whole numbers, the second true or false"
        )
    return {"mrope_section": None if section is None else tuple(section), "mrope_interleaved": interleaved}


def _mend(fields: Mapping[str, Any], kind: str, extra: list[str]) -> str:
    """What to do about unknown fields of a scaling, as a sentence."""
    if not extra:
        return ""
    out = ""
    if "attn_factor" in extra and kind == "yarn" and isinstance(fields.get("factor"), (int, float)):
        own = _sharpness(fields["factor"], 1.0)
        out = (
            f" attn_factor is read in two ways: vLLM and llama.cpp multiply yarn's own factor, {own:.6g}, by it, and "
            "transformers ignores it. To compute as the former, replace it in config.json by "
            f'"attention_factor": {own * float(fields["attn_factor"]):.6g}; to compute as transformers, allow it.'
        )
    flags = " ".join(f"--allow-unknown={name}" for name in extra)
    return f"{out} Fields that are to be ignored are named by {flags} (model.allow_unknown in a config)."


def _sharpness(factor: float | None, mscale: float) -> float:
    return 1.0 if factor is None or factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotation(rope: Rope, head_dim: int, positions_BS: jax.Array, segments_BS: jax.Array | None = None) -> Rotation:
    """cos and sin of every position's angles, each [B, S, F] float32.

    If a document (a segment of a row) exceeds the original length in this call, a longrope uses its long factors for
    all of its tokens, as transformers does for a batch with that document alone; see `Rope.for_length`.
    """
    freqs_F = jnp.asarray(rope.frequencies(head_dim))
    if rope.kind == "longrope" and rope.long_factor != rope.short_factor:
        last_BS1 = _last_position(positions_BS, segments_BS)[..., None]
        long_F = jnp.asarray(rope.frequencies(head_dim, long=True))
        freqs_F = jnp.where(last_BS1 >= rope.original_max_position_embeddings, long_F, freqs_F)
    if rope.kind == "dynamic" and rope.alpha is None:
        freqs_F = _grown(rope, rope.rotated_dims(head_dim), freqs_F, _last_position(positions_BS, segments_BS))
    # float32: bfloat16 rounds position 257 to 256.
    angles_BSF = positions_BS.astype(jnp.float32)[..., None] * freqs_F
    cos_BSF, sin_BSF = jnp.cos(angles_BSF), jnp.sin(angles_BSF)
    if rope.magnitude != 1.0:
        cos_BSF, sin_BSF = cos_BSF * rope.magnitude, sin_BSF * rope.magnitude
    return Rotation(cos_BSF, sin_BSF, _query_scale(rope, positions_BS))


def _grown(rope: Rope, rotated: int, freqs_F: jax.Array, last_BS: jax.Array) -> jax.Array:
    """Frequencies [B, S, F] of a dynamic rope: theta grows with the length of a document beyond the model's positions.

    transformers takes the longest row of a batch; here every document has its own length. Source: transformers,
    `_compute_dynamic_ntk_parameters`.
    """
    factor, positions = rope.factor or 1.0, rope.max_position_embeddings
    length_BS1 = jnp.maximum(last_BS + 1, positions)[..., None].astype(jnp.float32)
    growth_BS1 = factor * length_BS1 / positions - (factor - 1)
    powers_F = jnp.arange(0, rotated, 2, dtype=jnp.float32) / (rotated - 2)
    return freqs_F * growth_BS1**-powers_F


def _query_scale(rope: Rope, positions_BS: jax.Array) -> jax.Array | None:
    if rope.llama_4_scaling_beta is None:
        return None
    contexts_BS = positions_BS // rope.original_max_position_embeddings
    return 1 + rope.llama_4_scaling_beta * jnp.log1p(contexts_BS.astype(jnp.float32))


def _last_position(positions_BS: jax.Array, segments_BS: jax.Array | None) -> jax.Array:
    """The last position of each token's own document, [B, S]."""
    if segments_BS is None:
        segments_BS = jnp.ones_like(positions_BS)
    rows_B1 = jnp.arange(positions_BS.shape[0])[:, None]
    # Segments count from 1, so a row has at most as many segments as tokens.
    last = jnp.zeros((positions_BS.shape[0], positions_BS.shape[1] + 1), positions_BS.dtype)
    return last.at[rows_B1, segments_BS].max(positions_BS, mode="drop")[rows_B1, segments_BS]


def rotate(x_BSNH: jax.Array, rotation: Rotation, *, pairs: bool = False) -> jax.Array:
    """Rotates the pair (x[f], x[f + F]) by its angle, in float32: the half-split layout of most models.

    pairs: the pairs are (x[2 f], x[2 f + 1]) instead. Dimensions from 2 F on are unchanged.
    """
    if partition.platform() == "tpu" and x_BSNH.dtype == jnp.bfloat16:
        return turned(x_BSNH, rotation.cos_BSF, rotation.sin_BSF, pairs=pairs)
    cos, sin = rotation.cos_BSF[:, :, None, :], rotation.sin_BSF[:, :, None, :]
    rotated = 2 * cos.shape[-1]
    x32 = x_BSNH[..., :rotated].astype(jnp.float32)
    first, second = (x32[..., 0::2], x32[..., 1::2]) if pairs else jnp.split(x32, 2, axis=-1)
    both = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(both, axis=-1).reshape(x32.shape) if pairs else jnp.concatenate(both, axis=-1)
    out = out.astype(x_BSNH.dtype)
    return out if rotated == x_BSNH.shape[-1] else jnp.concatenate([out, x_BSNH[..., rotated:]], axis=-1)
