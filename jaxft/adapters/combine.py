"""One LoRA out of several with weights, as PEFT's add_weighted_adapter makes it.

`linear` mixes the halves (a rough approximation), `cat` lays them side by side (exact, the ranks add up), `svd` brings
that back to a smaller rank in the best way, and `ties` mixes halves after trimming them and electing signs
(arXiv:2306.01708, section 3).
"""

# r rank, I inputs, O outputs, R all ranks together

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.lora import LoRA, LoRASettings
from jaxft.adapters.named import AdapterSet, Taken
from jaxft.errors import ConfigError, ModelError, did_you_mean

WAYS = ("linear", "cat", "svd", "ties")
Halves = tuple[np.ndarray, np.ndarray]  # A [*stack, r, I] and B [*stack, r, O]


def combine(
    held: AdapterSet,
    name: str,
    weights: Mapping[str, float],
    *,
    way: str = "cat",
    rank: int | None = None,
    density: float | None = None,
) -> None:
    """Holds a new adapter: the weighted sum of others.

    weights: by name; negative ones take away. rank: of the result of `svd`, the largest there is where None. density:
    share of numbers that `ties` keeps, 0 < density <= 1. Raises ConfigError for a way or setting that does not fit, and
    ModelError for adapters that are not LoRA, and for other ranks where the way wants equal ones.
    """
    if way not in WAYS:
        raise ConfigError(f"way={way!r} is not one of {', '.join(WAYS)}.{did_you_mean(way, WAYS)}")
    if (density is None) == (way == "ties") or (density is not None and not 0 < density <= 1):
        raise ConfigError(f"density={density} is the share of numbers that way='ties' keeps: above 0, at most 1")
    if not weights or (rank is not None and (way != "svd" or rank < 1)):
        raise ConfigError("give at least one adapter with its weight, and a rank above zero with way='svd' only")
    loras = {each: _loras(held[each], each) for each in weights}
    ranks = {each: max(part.settings.r for part in parts.values()) for each, parts in loras.items()}
    if way in ("linear", "ties") and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{each} {r}" for each, r in ranks.items())
        raise ModelError(f"way={way!r} mixes halves of one rank, these differ ({listed}): use 'cat' or 'svd'")
    full = {"cat": sum(ranks.values()), "svd": rank or max(ranks.values())}.get(way, max(ranks.values()))
    layers = {}
    for path in sorted({path for parts in loras.values() for path in parts}):
        parts = [(loras[each][path], weight) for each, weight in weights.items() if path in loras[each]]
        layers[path] = _lora(parts[0][0], _padded(_mixed(parts, way, full, density), full), full)
    held.hold(name, Taken(layers))


def _loras(taken: Taken, name: str) -> dict[str, LoRA]:
    # A start of its own is a part of the halves from here on.
    parts = {path: part.plain() for path, part in taken.layers.items() if type(part) is LoRA}
    if taken.virtual or not parts or len(parts) < len(taken.layers) or any(p.places for p in parts.values()):
        raise ModelError(
            f"adapter {name!r} is not plain LoRA of one rank and alpha throughout: only such adapters are combined"
        )
    return parts


def _lora(like: LoRA, halves: Halves, rank: int) -> LoRA:
    settings = LoRASettings(r=rank, alpha=float(rank))
    a, b = halves
    made = LoRA(1, 1, settings, tp_side=like.tp_side, key=jax.random.key(0))
    made.lora_a.set_value(jnp.asarray(a))
    made.lora_b.set_value(jnp.asarray(b))
    return made


def _mixed(parts: list[tuple[LoRA, float]], way: str, rank: int, density: float | None) -> Halves:
    halves = [(np.asarray(part.lora_a.get_value()), np.asarray(part.lora_b.get_value())) for part, _ in parts]
    scales = [np.float32(weight * part.settings.scale) for part, weight in parts]
    if way in ("cat", "svd"):
        a = np.concatenate([a * scale for (a, _), scale in zip(halves, scales, strict=True)], axis=-2)
        b = np.concatenate([b for _, b in halves], axis=-2)
        return (a, b) if way == "cat" else _recompressed(a, b, rank)
    roots = [np.float32(math.sqrt(abs(scale))) for scale in scales]
    signed = [root * np.sign(scale, dtype=np.float32) for root, scale in zip(roots, scales, strict=True)]
    sides = ([a for a, _ in halves], signed), ([b for _, b in halves], roots)
    if way == "linear":
        return tuple(sum(half * w for half, w in zip(side, ws, strict=True)) for side, ws in sides)
    return tuple(_ties(side, ws, density) for side, ws in sides)


def _recompressed(a_RI: np.ndarray, b_RO: np.ndarray, rank: int) -> Halves:
    """The best approximation of A^T B of a smaller rank (Eckart and Young, 1936), by way of R x R matrices."""
    across_b, upper_b = np.linalg.qr(np.swapaxes(b_RO, -1, -2))
    across_a, upper_a = np.linalg.qr(np.swapaxes(a_RI, -1, -2))
    left, sizes, right = np.linalg.svd(upper_b @ np.swapaxes(upper_a, -1, -2))
    b_Or = (across_b @ left)[..., :rank] * sizes[..., None, :rank]
    return (right @ np.swapaxes(across_a, -1, -2))[..., :rank, :], np.swapaxes(b_Or, -1, -2)


def _ties(halves: list[np.ndarray], weights: list[np.float32], density: float) -> np.ndarray:
    trimmed = np.stack([_trimmed(half, density) for half in halves])
    elected = np.sign(trimmed) == np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    weighted = trimmed * np.array(weights).reshape(-1, *[1] * halves[0].ndim)
    return (weighted * elected).sum(axis=0) / np.maximum(elected.sum(axis=0), 1).astype(np.float32)


def _trimmed(half: np.ndarray, density: float) -> np.ndarray:
    """Each layer's matrix with but the largest numbers left."""
    flat = half.reshape(-1, half.shape[-2] * half.shape[-1])
    count = int(density * flat.shape[1])
    kept = np.zeros_like(flat, dtype=bool)
    np.put_along_axis(kept, np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :count], True, axis=1)
    return np.where(kept, flat, 0).reshape(half.shape)


def _padded(halves: Halves, rank: int) -> Halves:
    """With zero rows up to the rank, where a layer had fewer adapters than others."""
    return tuple(np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rank - x.shape[-2]), (0, 0)]) for x in halves)
