"""The settings of models with latent attention, DeepSeek V2 and V3 and their like.

llama.cpp attends to the latent vectors as to the keys and values of one large head.
"""

from typing import Any

from jaxft.checkpoint.gguf.family import YARN_LOG, Family
from jaxft.checkpoint.gguf.recurrent import KEY_HEADS
from jaxft.checkpoint.gguf.ropes import decimal_of, size_of
from jaxft.errors import ModelError
from jaxft.files.gguf.header import GGUFHeader
from jaxft.models.families.deepseek.deepseek_v2 import Config as DeepseekV2Config
from jaxft.models.families.deepseek.deepseek_v3 import LatentConfig

ARCH = "deepseek2"
KEYS, VALUES, QUERY_RANK = "attention.key_length", "attention.value_length", "attention.q_lora_rank"
LOG_FACTOR = 0.1  # llama.cpp divides the multiplier of this architecture by it
WITHOUT_QUERY_RANK = (26, 27)  # the layers of models whose queries have no latent vector
LITE_LAYERS, LITE_VOCAB = 48, 128256  # and of one more, with so many tokens


def latent_sizes(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    """The sizes of heads as fields of config.json. config: the other sizes. Raises ModelError for others."""
    rank, rotated = config["kv_lora_rank"], size_of(header, ARCH, "rope.dimension_count")
    for key, expected in ((KEYS, rank + rotated), (VALUES, rank)):
        if (size := size_of(header, ARCH, key)) != expected:
            raise ModelError(f"{header.path}: {ARCH}.{key}={size} is not {expected}, which other sizes make it")
    whole = size_of(header, ARCH, f"{KEYS}_mla")
    if whole <= rotated:
        raise ModelError(f"{header.path}: {ARCH}.{KEYS}_mla={whole} is not above the rotated {rotated}")
    has_rank = f"{ARCH}.{QUERY_RANK}" in header.metadata
    return {
        "head_dim": rotated,
        "num_key_value_heads": config["num_attention_heads"],
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": whole - rotated,
        "v_head_dim": size_of(header, ARCH, f"{VALUES}_mla"),
        "q_lora_rank": size_of(header, ARCH, QUERY_RANK) if has_rank else None,
    }


def latent_scaling(header: GGUFHeader, scaling: dict[str, Any]) -> dict[str, Any]:
    """A rope scaling with the two factors on scores, which are equal. Raises ModelError for yarn without them."""
    if scaling["rope_type"] != "yarn":
        return scaling
    log = header.require(f"{ARCH}.{YARN_LOG}")
    if not isinstance(log, float) or not log or "attention_factor" in scaling:
        raise ModelError(f"{header.path}: yarn of {ARCH} needs {YARN_LOG} above 0 and no other factor")
    return scaling | dict.fromkeys(("mscale", "mscale_all_dim"), decimal_of(log / LOG_FACTOR))


def latent_settings(config: LatentConfig) -> dict[str, Any]:
    """The settings of a file beyond those of other families."""
    log = config.rope.mscale_all_dim
    return {
        KEY_HEADS: 1,
        KEYS: config.kv_lora_rank + config.qk_rope_head_dim,
        VALUES: config.kv_lora_rank,
        f"{KEYS}_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        f"{VALUES}_mla": config.v_head_dim,
        **({QUERY_RANK: config.q_lora_rank} if config.q_lora_rank else {}),
        **({YARN_LOG: LOG_FACTOR * log} if config.rope.kind == "yarn" and log else {}),
    }


def latent_differences(family: Family, config: LatentConfig) -> list[tuple[bool, str]]:
    """(whether the model differs from what llama.cpp computes, how)."""
    rope, layers = config.rope, config.num_hidden_layers
    lite = layers in WITHOUT_QUERY_RANK or (layers, config.vocab_size) == (LITE_LAYERS, LITE_VOCAB)
    return [
        (not config.rope_interleave, "rope_interleave=False: neighbouring dimensions are rotated"),
        (
            rope.kind == "yarn"
            and (not rope.mscale or rope.mscale != rope.mscale_all_dim or bool(rope.attention_factor)),
            f"yarn with mscale={rope.mscale}, mscale_all_dim={rope.mscale_all_dim}: the two are equal",
        ),
        (
            lite != (config.q_lora_rank is None),
            f"q_lora_rank={config.q_lora_rank} in a model of {layers} layers: those of "
            f"{' and '.join(map(str, WITHOUT_QUERY_RANK))} layers have none, and no others",
        ),
        (
            isinstance(config, DeepseekV2Config) and config.n_group != 1,
            f"n_group={config.n_group}: groups of experts are compared by their two best there, not by the best",
        ),
    ]
