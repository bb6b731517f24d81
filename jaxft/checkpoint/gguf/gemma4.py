"""The settings of Gemma 4: two kinds of layers with heads, ropes and numbers of key heads of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.checkpoint.gguf.family import WINDOW, WINDOW_PATTERN
from jaxft.checkpoint.gguf.recurrent import INNER, KEY_HEADS, by_layer
from jaxft.checkpoint.gguf.ropes import decimal_of, size_of
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.gguf.header import GGUFHeader
from jaxft.models.families.gemma.gemma4 import Config
from jaxft.models.family import FULL, SLIDING

ARCH, ROPE_FACTORS = "gemma4", "rope_freqs.weight"
LOCAL_KEYS, LOCAL_VALUES, LOCAL_ROTATED, LOCAL_BASE = (
    f"{key}_swa" for key in ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
)
CAP = "final_logit_softcapping"
NOT_ROTATED = 1e30  # divides the frequency of a dimension that is not rotated


def gemma4_config(header: GGUFHeader, config: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Fields of config.json. config: the sizes of all layers, with those of global ones. vectors: as for `read_config`.

    Raises ModelError for layers that are not of two kinds, or ropes of another form.
    """
    layers, head_dim, theta = config["num_hidden_layers"], config["head_dim"], config["rope_theta"]
    local = np.asarray(header.require(f"{ARCH}.{WINDOW_PATTERN}"), bool)
    if local.shape != (layers,):
        raise CheckpointError(f"{header.path}: {ARCH}.{WINDOW_PATTERN} has not one entry for each of {layers} layers")
    heads = by_layer(header, ARCH, KEY_HEADS, layers)
    own = {
        kind: {n for n, is_local in zip(heads, local, strict=True) if is_local == (kind == SLIDING)}
        for kind in (FULL, SLIDING)
    }
    if any(len(numbers) != 1 for numbers in own.values()):
        raise ModelError(f"{header.path}: {ARCH}.{KEY_HEADS} is not one number for each of the two kinds of layers")
    small = size_of(header, ARCH, LOCAL_KEYS)
    for key in (LOCAL_VALUES, LOCAL_ROTATED):
        if size_of(header, ARCH, key, small) != small:
            raise ModelError(f"{header.path}: {ARCH}.{key} differs from the head size {small} of local layers")
    base = header.metadata.get(f"{ARCH}.{LOCAL_BASE}", theta)
    cap = header.metadata.get(f"{ARCH}.{CAP}")
    first_global = int(np.argmin(local))
    (global_heads,), (local_heads,) = own[FULL], own[SLIDING]
    return {
        "head_dim": small,
        "global_head_dim": head_dim,
        "num_key_value_heads": local_heads,
        "num_global_key_value_heads": global_heads,
        "attention_k_eq_v": f"blk.{first_global}.attn_v.weight" not in header.tensors,
        "layer_types": [SLIDING if one else FULL for one in local],
        "sliding_window": size_of(header, ARCH, WINDOW),
        "final_logit_softcapping": None if cap is None else decimal_of(cap),
        **_inner_units(header, layers, config["num_kv_shared_layers"]),
        "vocab_size_per_layer_input": config["vocab_size"],
        "enable_moe_block": "num_experts" in config,
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "rope_theta": theta,
                "partial_rotary_factor": _rotated_part(header, vectors, head_dim),
            },
            SLIDING: {"rope_type": "default", "rope_theta": decimal_of(base)},
        },
    }


def _inner_units(header: GGUFHeader, layers: int, shared: int) -> dict[str, Any]:
    """The fields of the feed-forwards' width. shared: the number of last layers without keys."""
    units = by_layer(header, ARCH, INNER, layers)
    own, last = set(units[: layers - shared]), set(units[layers - shared :])
    if len(own) != 1 or (last and last not in (own, {2 * max(own)})):
        raise ModelError(
            f"{header.path}: {ARCH}.{INNER} is not one number for all layers, and the same or its double for the last "
            f"{shared}, which have no keys"
        )
    return {"intermediate_size": max(own), "use_double_wide_mlp": last == {2 * max(own)}}


def _rotated_part(header: GGUFHeader, vectors: Mapping[str, np.ndarray], head_dim: int) -> float:
    """The part of a global head that is rotated: of its pairs, the first ones."""
    if ROPE_FACTORS not in vectors:
        raise CheckpointError(f"{header.path}: tensor {ROPE_FACTORS!r} is missing")
    factors = vectors[ROPE_FACTORS]
    rotated = int(np.sum(factors == 1))
    if factors.shape != (head_dim // 2,) or not np.array_equal(factors, rope_factors(head_dim, rotated)):
        raise ModelError(f"{header.path}: {ROPE_FACTORS} is not a number of ones and then {NOT_ROTATED}")
    return 2 * rotated / head_dim


def rope_factors(head_dim: int, rotated: int) -> np.ndarray:
    """The divisors of the frequencies of global layers. rotated: the number of pairs."""
    factors = np.full(head_dim // 2, NOT_ROTATED, np.float32)
    factors[:rotated] = 1
    return factors


def gemma4_vector(config: Config) -> np.ndarray:
    """`rope_factors` of a model."""
    head_dim = config.global_head_dim
    return rope_factors(head_dim, int(config.rope.partial_rotary_factor * head_dim // 2))


def gemma4_settings(config: Config) -> dict[str, Any]:
    """The settings of a file beyond or in place of those of other families."""
    size, small = config.global_head_dim, config.head_dim
    numbers = {FULL: config.num_global_key_value_heads, SLIDING: config.num_key_value_heads}
    return {
        KEY_HEADS: [numbers[kind] for kind in config.layer_types],
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        LOCAL_KEYS: small,
        LOCAL_VALUES: small,
        LOCAL_ROTATED: small,
        LOCAL_BASE: float(config.local_rope.theta),
        WINDOW: config.sliding_window,
        WINDOW_PATTERN: [kind == SLIDING for kind in config.layer_types],
        **({INNER: _units_of_layers(config)} if config.use_double_wide_mlp else {}),
    }


def _units_of_layers(config: Config) -> list[int]:
    own = config.num_hidden_layers - config.num_kv_shared_layers
    return [config.intermediate_size] * own + [2 * config.intermediate_size] * config.num_kv_shared_layers


def keys_difference(layer_types: Sequence[str], shared: int) -> tuple[bool, str]:
    """Whether the last layers use other keys than llama.cpp takes, and how. shared: their number."""
    first = len(layer_types) - shared
    return (
        shared > 0 and tuple(layer_types[max(0, first - 2) : first]) != (SLIDING, FULL),
        f"num_kv_shared_layers={shared}: the last two layers with keys are not a local and a global one, which the "
        "layers without keys use there",
    )


def gemma4_differences(config: Config) -> list[tuple[bool, str]]:
    """(whether the model differs from what llama.cpp computes, how)."""
    rope, local = config.rope, config.local_rope
    return [
        (
            rope.kind != "proportional" or rope.factor not in (None, 1.0) or local.kind != "default",
            f"ropes {rope.kind!r} with factor {rope.factor} and {local.kind!r}: they are 'proportional' without a "
            "factor and 'default'",
        ),
        keys_difference(config.layer_types, config.num_kv_shared_layers),
        (len(set(config.layer_types)) < 2, "layer_types of one kind: there are both local and global layers"),
    ]
