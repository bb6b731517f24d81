"""The settings of a GGUF file for a config.json, and refusal of models that llama.cpp would compute differently."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from jaxft import models
from jaxft.checkpoint.gguf.config import (
    GEMMA_PERIODS,
)
from jaxft.checkpoint.gguf.family import TEMPERATURE, WINDOW, WINDOW_PATTERN, YARN_LOG, Family
from jaxft.checkpoint.gguf.gemma3n import gemma3n_settings
from jaxft.checkpoint.gguf.gemma4 import gemma4_settings, gemma4_vector
from jaxft.checkpoint.gguf.latent import latent_settings
from jaxft.checkpoint.gguf.names import (
    FAMILIES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    WRITTEN,
    WRITTEN_AS,
    expert_count,
)
from jaxft.checkpoint.gguf.recurrent import layered_settings
from jaxft.checkpoint.gguf.refusals import refuse
from jaxft.checkpoint.gguf.ropes import ATTENTION_FACTOR, yarn_magnitude
from jaxft.errors import ExportError
from jaxft.models.families.cohere2 import Config as Cohere2Config
from jaxft.models.families.deepseek.deepseek_v3 import LatentConfig
from jaxft.models.families.ernie.ernie4_5_moe import Config as ErnieConfig
from jaxft.models.families.exaone4 import Config as Exaone4Config
from jaxft.models.families.gemma.gemma2 import GemmaConfig
from jaxft.models.families.gemma.gemma3n import Config as Gemma3nConfig
from jaxft.models.families.gemma.gemma4 import Config as Gemma4Config
from jaxft.models.families.gpt_oss import Config as GptOssConfig
from jaxft.models.families.llama4 import Config as Llama4Config
from jaxft.models.families.olmo.olmo3 import Config as Olmo3Config
from jaxft.models.families.qwen.qwen3_moe import Config as Qwen3MoEConfig
from jaxft.models.family import SLIDING, FamilyConfig
from jaxft.models.moe import RoutedConfig
from jaxft.nn.attention.rope import Rope
from jaxft.nn.experts.layer import MoEShape


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family as which a model is written. Raises ExportError if there is none."""
    given = str(hf_config.get("model_type"))
    kind = WRITTEN_AS.get(given, given)
    alike = [family for family in FAMILIES.values() if family.model_type == kind]
    if not alike:
        raise ExportError(f"model_type {given!r} is not written to GGUF; {', '.join(sorted(WRITTEN))} are")
    if len(alike) == 1:
        return alike[0]
    config = models.config_from_hf(hf_config)
    blocks = config.shape().layers
    with_experts = any(isinstance(block.mlp, MoEShape) or block.experts is not None for block in blocks)
    return next(family for family in alike if (family.experts is not None) == with_experts)


def model_metadata(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the architecture's name. Raises ExportError for settings that llama.cpp does not have."""
    family, config = family_of(hf_config), models.config_from_hf(hf_config)
    refuse(family, config)
    settings = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        family.epsilon: float(config.rms_norm_eps),
        "rope.dimension_count": config.rope.rotated_dims(config.head_dim),
        "rope.freq_base": _base(config),
        **_rope(family, config.rope),
        **{key: setting.kind(getattr(config, setting.field)) for key, setting in family.fields.items()},
        **family.fixed,
        **layered_settings(family, config),
        **(latent_settings(config) if isinstance(config, LatentConfig) else {}),
        **(gemma4_settings(config) if isinstance(config, Gemma4Config) else {}),
        **(gemma3n_settings(config) if isinstance(config, Gemma3nConfig) else {}),
    }
    if family.model_type in GEMMA_PERIODS:
        settings["attention.sliding_window"] = cast(GemmaConfig, config).sliding_window
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            settings[cap] = float(getattr(config, cap))
    if family.arch == "phi3":
        # 0, no window: a window that limits attention is refused above.
        settings |= {"attention.sliding_window": 0}
        settings.setdefault("rope.scaling.original_context_length", config.max_position_embeddings)
    if isinstance(config, ErnieConfig):
        shared = config.moe_intermediate_size * config.moe_num_shared_experts
        settings["expert_shared_feed_forward_length"] = shared
    if family.model_type == "hunyuan_v1_moe":
        settings |= dict.fromkeys(
            ("expert_feed_forward_length", "expert_shared_feed_forward_length"), config.intermediate_size
        )
    if isinstance(config, Llama4Config):
        settings["interleave_moe_layer_step"] = config.moe_layers[0] + 1
    if family.experts and "expert_used_count" not in family.fields:
        settings |= {
            "expert_count": expert_count(family, config),
            "expert_used_count": cast(RoutedConfig, config).num_experts_per_tok,
        }
    if isinstance(config, Cohere2Config):
        settings[WINDOW] = config.sliding_window
    if isinstance(config, Olmo3Config | GptOssConfig | Exaone4Config) and SLIDING in config.layer_types:
        pattern = [kind == SLIDING for kind in config.layer_types]
        settings |= {WINDOW: config.sliding_window, WINDOW_PATTERN: pattern}
    if family.arch == "qwen3moe":
        settings["expert_feed_forward_length"] = cast(Qwen3MoEConfig, config).moe_intermediate_size
    if family.arch == "gpt-oss":
        settings["expert_feed_forward_length"] = config.intermediate_size
    return {f"{family.arch}.{key}": value for key, value in settings.items()}


def _base(config: FamilyConfig) -> float:
    """The base of the rope, stretched by a fixed alpha as in llama.cpp's converter."""
    rope, rotated = config.rope, config.rope.rotated_dims(config.head_dim)
    return float(rope.theta if rope.alpha is None else rope.theta * rope.alpha ** (rotated / (rotated - 2)))


def rope_vectors(hf_config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The rotary factors that llama.cpp reads as tensors, float32."""
    config = models.config_from_hf(hf_config)
    rope = config.rope
    if isinstance(config, Gemma4Config):
        return {ROPE_FACTORS: gemma4_vector(config)}
    if rope.kind == "llama3":
        plain = dataclasses.replace(rope, kind="default")
        return {ROPE_FACTORS: plain.frequencies(config.head_dim) / rope.frequencies(config.head_dim)}
    if rope.kind == "longrope":
        both = {LONG_FACTORS: rope.long_factor, SHORT_FACTORS: rope.short_factor}
        return {name: np.array(factors, np.float32) for name, factors in both.items()}
    return {}


def _rope(family: Family, rope: Rope) -> dict[str, Any]:
    if rope.kind == "yarn":
        return _yarn(family, rope)
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor or 1.0)}
    if rope.kind == "llama3":
        return {"rope.scaling.original_context_length": int(rope.original_max_position_embeddings)}
    if rope.kind == "longrope":
        return {
            "rope.scaling.original_context_length": int(rope.original_max_position_embeddings),
            "rope.scaling.attn_factor": float(rope.magnitude),
        }
    return {}


def _yarn(family: Family, rope: Rope) -> dict[str, Any]:
    factor = float(rope.factor or 1.0)
    settings: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope.original_max_position_embeddings),
    }
    if family.latent:
        return settings
    usual = yarn_magnitude(factor)
    if family.model_type == "ministral3":
        settings[TEMPERATURE] = float(rope.llama_4_scaling_beta or 0.0)
        if rope.mscale and rope.mscale_all_dim:
            settings[YARN_LOG] = float(rope.mscale_all_dim)
            usual /= yarn_magnitude(factor, rope.mscale_all_dim)
    if not math.isclose(rope.magnitude, usual, rel_tol=1e-6):
        settings[ATTENTION_FACTOR] = rope.magnitude / usual
    return settings
