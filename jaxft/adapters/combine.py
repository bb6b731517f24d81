"""The weighted combination of several LoRAs into one, as in PEFT's add_weighted_adapter.

`linear` sums the halves (a rough approximation), `cat` concatenates them (exact; the ranks add up), `svd` reduces that
to the best approximation of a smaller rank, and `ties` sums the halves after trimming them and electing signs
(arXiv:2306.01708, section 3).
"""

# r rank, I inputs, O outputs, R all ranks together

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.lora import LoRA, LoRASettings
from jaxft.adapters.named import AdapterModules, AdapterSet
from jaxft.errors import ConfigError, ModelError, did_you_mean
from jaxft.nn.adapter import LayerAdapter

WAYS = ("linear", "cat", "svd", "ties")
Halves = tuple[np.ndarray, np.ndarray]  # A [*stack, r, I] and B [*stack, r, O]


def combine(
    adapters: AdapterSet,
    name: str,
    weights: Mapping[str, float],
    *,
    way: str = "cat",
    rank: int | None = None,
    density: float | None = None,
) -> None:
    """Adds a new adapter, the weighted sum of others, to a set. It is not active.

    weights: by name; negative ones subtract. rank: of the result of `svd`; None: the largest of the ranks. density:
    share of numbers that `ties` keeps, 0 < density <= 1. Raises ConfigError for an unknown way or an unsuitable
    setting, and ModelError if an adapter is not LoRA, or if ranks differ and the way needs equal ones.
    """
    if way not in WAYS:
        raise ConfigError(f"way={way!r} is not one of {', '.join(WAYS)}.{did_you_mean(way, WAYS)}")
    if (density is None) == (way == "ties") or (density is not None and not 0 < density <= 1):
        raise ConfigError(
            f"density={density} is the share of numbers that way='ties' keeps: above 0, at most 1, and for no other way"
        )
    if not weights or (rank is not None and (way != "svd" or rank < 1)):
        raise ConfigError("give at least one adapter with its weight, and a rank above zero with way='svd' only")
    loras = {each: _loras(adapters[each], each) for each in weights}
    ranks = {each: max(part.settings.r for part in parts.values()) for each, parts in loras.items()}
    if way in ("linear", "ties") and len(set(ranks.values())) > 1:
        differing = ", ".join(f"{each} {r}" for each, r in ranks.items())
        raise ModelError(f"way={way!r} mixes halves of one rank, these differ ({differing}): use 'cat' or 'svd'")
    full = {"cat": sum(ranks.values()), "svd": rank or max(ranks.values())}.get(way, max(ranks.values()))
    layers: dict[str, LayerAdapter] = {}
    for path in sorted({path for parts in loras.values() for path in parts}):
        parts = [(loras[each][path], weight) for each, weight in weights.items() if path in loras[each]]
        layers[path] = _lora(parts[0][0], _pad(_combined(parts, way, full, density), full), full)
    adapters.add(name, AdapterModules(layers))


def _loras(modules: AdapterModules, name: str) -> dict[str, LoRA]:
    # Initial values that are subtracted become a part of the halves.
    parts = {path: part.plain() for path, part in modules.layers.items() if type(part) is LoRA}
    stacks = any(part.stack_settings for part in parts.values())
    if modules.virtual or not parts or len(parts) < len(modules.layers) or stacks:
        raise ModelError(
            f"adapter {name!r} is not plain LoRA of one rank and alpha throughout: only such adapters are combined"
        )
    return parts


def _lora(like: LoRA, halves: Halves, rank: int) -> LoRA:
    settings = LoRASettings(r=rank, alpha=float(rank))
    a, b = halves
    lora = LoRA(1, 1, settings, tp_side=like.tp_side, key=jax.random.key(0))
    lora.lora_a.set_value(jnp.asarray(a))
    lora.lora_b.set_value(jnp.asarray(b))
    return lora


def _combined(parts: list[tuple[LoRA, float]], way: str, rank: int, density: float | None) -> Halves:
    a_halves = [np.asarray(part.lora_a.get_value()) for part, _ in parts]
    b_halves = [np.asarray(part.lora_b.get_value()) for part, _ in parts]
    scales = [np.float32(weight * part.settings.scale) for part, weight in parts]
    if way in ("cat", "svd"):
        a = np.concatenate([a * scale for a, scale in zip(a_halves, scales, strict=True)], axis=-2)
        b = np.concatenate(b_halves, axis=-2)
        return (a, b) if way == "cat" else _best_of_rank(a, b, rank)
    roots = [np.float32(math.sqrt(abs(scale))) for scale in scales]
    signed = [root * np.sign(scale, dtype=np.float32) for root, scale in zip(roots, scales, strict=True)]
    if density is None:
        return _weighted_sum(a_halves, signed), _weighted_sum(b_halves, roots)
    return _ties(a_halves, signed, density), _ties(b_halves, roots, density)


def _weighted_sum(halves: list[np.ndarray], weights: list[np.float32]) -> np.ndarray:
    terms = (half * weight for half, weight in zip(halves, weights, strict=True))
    return sum(terms, start=np.zeros((), np.float32))


def _best_of_rank(a_RI: np.ndarray, b_RO: np.ndarray, rank: int) -> Halves:
    """The best approximation of A^T B of a smaller rank (Eckart and Young, 1936), by decomposing R x R matrices."""
    across_b, upper_b = np.linalg.qr(np.swapaxes(b_RO, -1, -2))
    across_a, upper_a = np.linalg.qr(np.swapaxes(a_RI, -1, -2))
    left, sizes, right = np.linalg.svd(upper_b @ np.swapaxes(upper_a, -1, -2))
    b_Or = (across_b @ left)[..., :rank] * sizes[..., None, :rank]
    return (right @ np.swapaxes(across_a, -1, -2))[..., :rank, :], np.swapaxes(b_Or, -1, -2)


def _ties(halves: list[np.ndarray], weights: list[np.float32], density: float) -> np.ndarray:
    trimmed = np.stack([_trim(half, density) for half in halves])
    elected = np.sign(trimmed) == np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    weighted = trimmed * np.array(weights).reshape(-1, *[1] * halves[0].ndim)
    return (weighted * elected).sum(axis=0) / np.maximum(elected.sum(axis=0), 1).astype(np.float32)


def _trim(half: np.ndarray, density: float) -> np.ndarray:
    """Each layer's matrix, in which all but the largest numbers are set to zero."""
    flat = half.reshape(-1, half.shape[-2] * half.shape[-1])
    count = int(density * flat.shape[1])
    kept = np.zeros_like(flat, dtype=bool)
    np.put_along_axis(kept, np.argsort(-np.abs(flat), axis=1, kind="stable")[:, :count], True, axis=1)
    return np.where(kept, flat, 0).reshape(half.shape)


def _pad(halves: Halves, rank: int) -> Halves:
    """The halves, filled up to the rank with zero rows, for a layer that has fewer adapters than others."""
    a, b = (np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rank - x.shape[-2]), (0, 0)]) for x in halves)
    return a, b
