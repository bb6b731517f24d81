"""The settings of models whose layers differ: their order, recurrent layers and short convolutions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.gguf.families.recurrent import INTERVAL, SECTIONS, SSM_INNER
from jaxft.checkpoint.gguf.family import LAYER_EPSILON, Family
from jaxft.checkpoint.gguf.ropes import size_of
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.gguf.header import GGUFHeader
from jaxft.models.families.granite.granitemoehybrid import OLD_NAMES
from jaxft.models.families.granite.granitemoehybrid import Config as GraniteConfig
from jaxft.models.families.lfm.lfm2 import CONV, ConvConfig
from jaxft.models.families.nemotron_h import LINEAR, MLP, MOE
from jaxft.models.families.nemotron_h import Config as NemotronConfig
from jaxft.models.families.qwen.qwen3_5 import DeltaNetConfig
from jaxft.models.families.qwen.qwen3_next import Config as Qwen3NextConfig
from jaxft.models.family import FULL, FamilyConfig
from jaxft.nn.mlp import MLPShape
from jaxft.nn.recurrent.delta_net import LENGTH_EPS

KEY_HEADS, INNER = "attention.head_count_kv", "feed_forward_length"
FINETUNED = "rope.scaling.finetuned"  # of Granite: whether attention has a rope
DEFAULT_INTERVAL = 4
MROPE = [11, 11, 10, 0]  # required of Qwen3.5; the positions of a text are one number, so that any would do
LEAST_STEP = 0.001  # of published models of Nemotron-H: files have no such setting


def by_layer(header: GGUFHeader, arch: str, key: str, layers: int) -> list[int]:
    """A whole number for each layer, of a list or of one number for all. Raises ModelError for other values."""
    name = f"{arch}.{key}"
    values = np.asarray(header.require(name))
    if values.dtype.kind not in "iu" or values.ndim > 1 or np.any(values < 0) or not np.any(values):
        raise ModelError(f"{header.path}: {name} is not one whole number, or one for each layer")
    if values.ndim and len(values) != layers:
        raise CheckpointError(f"{header.path}: {name} has {len(values)} entries for {layers} layers")
    return [int(value) for value in np.broadcast_to(values, (layers,))]


def layered_config(header: GGUFHeader, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json of families whose layers differ; none for others. config: its sizes."""
    arch, layers = family.arch, config["num_hidden_layers"]
    if family.model_type in ("lfm2", "lfm2_moe"):
        heads = by_layer(header, arch, KEY_HEADS, layers)
        fields = {"layer_types": [FULL if n else CONV for n in heads], "norm_eps": config.pop("rms_norm_eps")}
        return fields | ({"block_auto_adjust_ff_dim": False} if family.model_type == "lfm2" else {})
    if family.model_type == "granitemoehybrid":
        heads = by_layer(header, arch, KEY_HEADS, layers)
        _check_inner(header, arch, 2 * config["hidden_size"])
        return {
            "layer_types": [OLD_NAMES[FULL if n else LINEAR] for n in heads],
            "position_embedding_type": "rope" if header.metadata.get(f"{arch}.{FINETUNED}", True) else "nope",
            **(
                {}
                if family.experts
                else {"num_local_experts": 0, "shared_intermediate_size": size_of(header, arch, INNER)}
            ),
        }
    if family.model_type == "nemotron_h":
        return _nemotron(header, family, config)
    if INTERVAL in family.settings:
        size = config["linear_key_head_dim"]
        _check_inner(header, arch, size * config["linear_num_value_heads"])
        return {
            "full_attention_interval": size_of(header, arch, INTERVAL, DEFAULT_INTERVAL),
            "linear_value_head_dim": size,
        }
    return {}


def _nemotron(header: GGUFHeader, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    arch, layers, heads = family.arch, config["num_hidden_layers"], config["mamba_num_heads"]
    inner = size_of(header, arch, SSM_INNER)
    if inner % heads:
        raise ModelError(f"{header.path}: {arch}.{SSM_INNER}={inner} is not a multiple of the {heads} heads")
    kinds = zip(by_layer(header, arch, KEY_HEADS, layers), by_layer(header, arch, INNER, layers), strict=True)
    feed_forward = MOE if family.experts else MLP
    return {
        "layers_block_type": [feed_forward if units else FULL if keys else LINEAR for keys, units in kinds],
        "mamba_head_dim": inner // heads,
        "layer_norm_epsilon": config["rms_norm_eps"],
    }


def _check_inner(header: GGUFHeader, arch: str, expected: int) -> None:
    if (inner := size_of(header, arch, SSM_INNER)) != expected:
        raise ModelError(f"{header.path}: {arch}.{SSM_INNER}={inner} is not {expected}, which other sizes make it")


def layered_settings(family: Family, config: FamilyConfig) -> Mapping[str, Any]:
    """The settings of a file beyond those that all families have; none for a family whose layers do not differ."""
    heads = config.num_key_value_heads
    if isinstance(config, ConvConfig):
        first = config.shape().layers[0].mlp
        return {
            KEY_HEADS: [0 if kind == CONV else heads for kind in config.layer_types],
            INNER: first.hidden if isinstance(first, MLPShape) else config.intermediate_size,
        }
    if isinstance(config, GraniteConfig):
        return {
            KEY_HEADS: [heads if kind == FULL else 0 for kind in config.layer_types],
            INNER: config.intermediate_size if family.experts else config.shared_intermediate_size,
            SSM_INNER: config.mamba_expand * config.hidden_size,
            FINETUNED: config.position_embedding_type == "rope",
        }
    if isinstance(config, NemotronConfig):
        inner = {MLP: config.intermediate_size, MOE: config.moe_intermediate_size}
        return {
            KEY_HEADS: [heads if kind == FULL else 0 for kind in config.layers_block_type],
            INNER: [inner.get(kind, 0) for kind in config.layers_block_type],
            SSM_INNER: config.mamba_num_heads * config.mamba_head_dim,
            LAYER_EPSILON: float(config.rms_norm_eps),  # required beside the other one, which alone is used
        }
    if isinstance(config, DeltaNetConfig):
        sections = [*config.rope.mrope_section, 0] if config.rope.mrope_section else MROPE
        return {
            INTERVAL: _interval(config),
            SSM_INNER: config.linear_value_head_dim * config.linear_num_value_heads,
            **({SECTIONS: sections} if SECTIONS in family.settings else {}),
        }
    return {}


def _interval(config: DeltaNetConfig) -> int:
    """The number of layers from one with attention to the next."""
    return config.layer_types.index(FULL) + 1 if FULL in config.layer_types else len(config.layer_types) + 1


def layered_differences(config: FamilyConfig) -> list[tuple[bool, str]]:
    """(whether the model differs from what llama.cpp computes, how)."""
    if isinstance(config, GraniteConfig):
        return [(len(set(config.layer_types)) < 2, "layer_types of one kind: there are both Mamba-2 and attention")]
    if isinstance(config, NemotronConfig):
        kinds = set(config.layers_block_type)
        return [
            ({MLP, MOE} <= kinds, "layers_block_type with both mlp and moe: feed-forwards are all of one kind"),
            (
                not {FULL, LINEAR} <= kinds or not {MLP, MOE} & kinds,
                f"layers_block_type has only {', '.join(sorted(kinds))}: there is a layer of each kind",
            ),
            (config.n_group != 1, f"n_group={config.n_group}: experts are not in groups there"),
            (config.time_step_min != LEAST_STEP, f"time_step_min={config.time_step_min}: it is {LEAST_STEP}"),
        ]
    if isinstance(config, DeltaNetConfig):
        period, (keys, values) = _interval(config), (config.linear_key_head_dim, config.linear_value_head_dim)
        usual = tuple((i + 1) % period == 0 for i in range(config.num_hidden_layers))
        dense = isinstance(config, Qwen3NextConfig) and (config.mlp_only_layers or config.decoder_sparse_step != 1)
        return [
            (tuple(kind == FULL for kind in config.layer_types) != usual, "layer_types are not periodic"),
            (
                config.rms_norm_eps != LENGTH_EPS,
                f"rms_norm_eps={config.rms_norm_eps}: queries and keys of delta-nets get the same epsilon there, which "
                f"is {LENGTH_EPS}",
            ),
            (keys != values, f"linear_value_head_dim={values} is not linear_key_head_dim={keys}"),
            (bool(dense), "mlp_only_layers or decoder_sparse_step: all layers have experts there"),
        ]
    return []
