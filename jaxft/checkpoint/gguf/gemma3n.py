"""The settings of Gemma 3n, most of which llama.cpp takes from the architecture and not from the file."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.gguf.family import WINDOW, WINDOW_PATTERN
from jaxft.checkpoint.gguf.gemma4 import CAP, LOCAL_BASE
from jaxft.checkpoint.gguf.recurrent import INNER, by_layer
from jaxft.checkpoint.gguf.ropes import decimal_of, size_of
from jaxft.errors import ModelError
from jaxft.files.gguf.header import GGUFHeader
from jaxft.models.families.gemma.gemma3n import PERIOD, SPARSE_LAYERS, SPARSE_SHARE, Config
from jaxft.models.family import FULL, SLIDING

ARCH, SCALES = "gemma3n", "activation_sparsity_scale"
SHARED = "attention.shared_kv_layers"
WITH_KEYS, LOCAL_THETA, USUAL_CAP = 20, 1e4, 30.0  # the number of layers with keys, and the others' rope and cap there


def gemma3n_config(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json. config: the sizes of all layers. Raises ModelError for settings that llama.cpp ignores."""
    layers, metadata = config["num_hidden_layers"], header.metadata
    fields = usual_fields(layers)
    settings = {
        SHARED: fields["num_kv_shared_layers"],
        WINDOW_PATTERN: [kind == SLIDING for kind in fields["layer_types"]],
        LOCAL_BASE: LOCAL_THETA,
        CAP: USUAL_CAP,
        SCALES: sparsity_scales(fields["activation_sparsity_pattern"]),
    }
    for key, usual in settings.items():
        given = np.asarray(metadata.get(f"{ARCH}.{key}", usual), np.float64)
        if given.shape != np.shape(usual) or not np.allclose(given, usual, rtol=1e-5):
            raise ModelError(
                f"{header.path}: {ARCH}.{key} is not {usual!r}, which llama.cpp takes whatever the file says"
            )
    if len(set(by_layer(header, ARCH, INNER, layers))) > 1:
        raise ModelError(f"{header.path}: {ARCH}.{INNER} differs between layers, which llama.cpp does not have")
    return fields | {
        "sliding_window": size_of(header, ARCH, WINDOW),
        "final_logit_softcapping": USUAL_CAP,
        "vocab_size_per_layer_input": config["vocab_size"],
        "rope_local_base_freq": decimal_of(LOCAL_THETA),
    }


def usual_fields(layers: int) -> dict[str, Any]:
    """What follows from the number of layers."""
    sparse = min(SPARSE_LAYERS, layers)
    return {
        "num_kv_shared_layers": max(0, layers - WITH_KEYS),
        "layer_types": [SLIDING if (i + 1) % PERIOD else FULL for i in range(layers)],
        "activation_sparsity_pattern": [SPARSE_SHARE] * sparse + [0.0] * (layers - sparse),
    }


def sparsity_scales(shares: list[float]) -> list[float]:
    """The quantiles of a normal distribution, as llama.cpp's converter writes them."""
    return [statistics.NormalDist().inv_cdf(share) if share else -math.inf for share in shares]


def gemma3n_settings(config: Config) -> dict[str, Any]:
    """The settings of a file beyond or in place of those of other families."""
    return {
        WINDOW: config.sliding_window,
        WINDOW_PATTERN: [kind == SLIDING for kind in config.layer_types],
        LOCAL_BASE: float(config.local_rope.theta),
        SCALES: sparsity_scales(list(config.activation_sparsity_pattern)),
    }


def gemma3n_differences(config: Config) -> list[tuple[bool, str]]:
    """(whether the model differs from what llama.cpp computes, how)."""
    usual = usual_fields(config.num_hidden_layers)
    fields = [
        (list(given) != usual[name] if isinstance(usual[name], list) else given != usual[name], name, given)
        for name, given in ((name, getattr(config, name)) for name in usual)
    ]
    cap, local = config.final_logit_softcapping, config.local_rope
    return [
        *(
            (
                differs,
                f"{name}={given!r}: in a model of {config.num_hidden_layers} layers it is {usual[name]!r} there",
            )
            for differs, name, given in fields
        ),
        (
            config.rope.kind != "default" or local.kind != "default" or local.theta != LOCAL_THETA,
            f"ropes {config.rope.kind!r} and {local.kind!r} with base {local.theta}: both are 'default', and the base "
            f"of local layers is {LOCAL_THETA}",
        ),
        (cap != USUAL_CAP, f"final_logit_softcapping={cap}: it is {USUAL_CAP}"),
        (len(set(config.inner_units)) > 1, "intermediate_size differs between layers: it is one number there"),
    ]
