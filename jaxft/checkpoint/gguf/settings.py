"""The settings of a GGUF file for a config.json, and refusal of models that llama.cpp would compute differently."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from jaxft import models
from jaxft.checkpoint.gguf.config import GEMMA3_LOCAL_THETA, GEMMA_PERIODS, gemma_scalar
from jaxft.checkpoint.gguf.names import (
    FAMILIES,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    TEMPERATURE,
    WINDOW_PATTERN,
    WRITTEN_AS,
    YARN_LOG,
    Family,
    expert_count,
)
from jaxft.checkpoint.gguf.ropes import ATTENTION_FACTOR, YARN_FAST, YARN_SLOW, yarn_magnitude
from jaxft.errors import ExportError
from jaxft.models.families.gemma.gemma2 import GemmaConfig
from jaxft.models.families.gpt_oss import Config as GptOssConfig
from jaxft.models.families.olmo.olmo3 import Config as Olmo3Config
from jaxft.models.families.qwen.qwen3_moe import Config as Qwen3MoEConfig
from jaxft.models.families.smollm3 import Config as SmolLM3Config
from jaxft.models.families.smollm3 import default_ropes
from jaxft.models.family import FULL, SLIDING, FamilyConfig
from jaxft.models.moe import RoutedConfig
from jaxft.nn.attention.rope import Rope

OSS_ACTIVATION = (1.702, 7.0)
# Scalings of rope that are written beyond none and linear; in other architectures yarn.
MORE_ROPES = {"phi3": ("longrope",), "llama": ("llama3", "yarn"), "gemma": (), "gemma2": (), "gemma3": ()}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family as which a model is written. Raises ExportError if there is none."""
    kind = str(hf_config.get("model_type"))
    if WRITTEN_AS.get(kind, kind) not in FAMILIES:
        raise ExportError(
            f"model_type {kind!r} is not written to GGUF; {', '.join(sorted({*FAMILIES, *WRITTEN_AS}))} are"
        )
    return FAMILIES[WRITTEN_AS.get(kind, kind)]


def model_metadata(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the architecture's name. Raises ExportError for settings that llama.cpp does not have."""
    family, config = family_of(hf_config), models.config_from_hf(hf_config)
    _refuse(family, config)
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
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rope.rotated_dims(config.head_dim),
        "rope.freq_base": float(config.rope.theta),
        **_rope(family, config.rope),
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
    if family.experts:
        settings |= {
            "expert_count": expert_count(family, config),
            "expert_used_count": cast(RoutedConfig, config).num_experts_per_tok,
        }
    if isinstance(config, Olmo3Config | GptOssConfig) and SLIDING in config.layer_types:
        pattern = [kind == SLIDING for kind in config.layer_types]
        settings |= {"attention.sliding_window": config.sliding_window, WINDOW_PATTERN: pattern}
    if family.arch == "qwen3moe":
        settings["expert_feed_forward_length"] = cast(Qwen3MoEConfig, config).moe_intermediate_size
    if family.arch == "gpt-oss":
        settings["expert_feed_forward_length"] = config.intermediate_size
    return {f"{family.arch}.{key}": value for key, value in settings.items()}


def rope_vectors(hf_config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The rotary factors that llama.cpp reads as tensors, float32."""
    config = models.config_from_hf(hf_config)
    rope = config.rope
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
    usual = yarn_magnitude(factor)
    if family.model_type == "ministral3":
        settings[TEMPERATURE] = float(rope.llama_4_scaling_beta or 0.0)
        if rope.mscale and rope.mscale_all_dim:
            settings[YARN_LOG] = float(rope.mscale_all_dim)
            usual /= yarn_magnitude(factor, rope.mscale_all_dim)
    if not math.isclose(rope.magnitude, usual, rel_tol=1e-6):
        settings[ATTENTION_FACTOR] = rope.magnitude / usual
    return settings


def _refuse(family: Family, config: FamilyConfig) -> None:
    for differs, why in _differences(family, config):
        if differs:
            raise ExportError(
                f"{why}. llama.cpp's {family.arch} would compute something else than this model, so no GGUF is written."
            )


def _differences(family: Family, config: FamilyConfig) -> list[tuple[bool, str]]:
    """(whether the model differs, how) for everything that llama.cpp does in only one way for a family."""
    arch, rope, heads = family.arch, config.rope, config.num_attention_heads * config.head_dim
    kinds = ("default", "linear", *MORE_ROPES.get(arch, ("yarn",)))
    whole = arch == "phi3" or rope.partial_rotary_factor == 1.0
    differences = [
        (
            rope.kind not in kinds or not whole,
            f"rope scaling {rope.kind!r} with partial_rotary_factor={rope.partial_rotary_factor} is not written to "
            f"GGUF; {', '.join(kinds)} of whole heads are",
        ),
        (
            bool(getattr(config, "attention_bias", False)) and arch not in ("llama", "gpt-oss"),
            "attention_bias=True: there are no such biases",
        ),
        (
            arch in ("phi3", "olmo2") and heads != config.hidden_size,
            f"num_attention_heads x head_dim = {heads} is not hidden_size={config.hidden_size}",
        ),
        (
            rope.kind == "yarn"
            and arch != "gpt-oss"  # llama.cpp rounds the ramp of its makers' own files too
            and (rope.beta_fast or YARN_FAST, rope.beta_slow or YARN_SLOW, rope.truncate)
            != (YARN_FAST, YARN_SLOW, True),
            f"yarn with beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}, truncate={rope.truncate}: its ramp "
            f"runs from {YARN_FAST:g} to {YARN_SLOW:g} turns there, rounded to whole dimensions",
        ),
        (arch == "olmo2" and config.tie_word_embeddings, "tie_word_embeddings=True: olmo2 has an output matrix"),
        (
            arch in ("gemma", "gemma2") and not config.tie_word_embeddings,
            f"tie_word_embeddings=False: {arch} has no output matrix",
        ),
        (
            not getattr(config, "norm_topk_prob", True),
            "norm_topk_prob=False: the weights of a token's experts are normalised to sum to 1",
        ),
        (
            isinstance(config, Qwen3MoEConfig) and bool(config.dense_layers()),
            "mlp_only_layers or decoder_sparse_step: all layers have experts there",
        ),
    ]
    if isinstance(config, Olmo3Config):
        return differences + _olmo3(config)
    if isinstance(config, SmolLM3Config):
        return differences + _smollm3(config) + _window(config)
    if isinstance(config, GptOssConfig):
        return differences + _gpt_oss(config)
    return differences + (_gemma(family, config) if isinstance(config, GemmaConfig) else _window(config))


def _smollm3(config: SmolLM3Config) -> list[tuple[bool, str]]:
    default = default_ropes(config.num_hidden_layers)
    return [
        (config.no_rope_layers != default, f"no_rope_layers={list(config.no_rope_layers)}: every fourth layer is 0"),
        (config.mlp_bias, "mlp_bias=True: there are no such biases"),
    ]


def _olmo3(config: Olmo3Config) -> list[tuple[bool, str]]:
    local = config.local_rope
    return [
        (
            SLIDING in config.layer_types and (local.kind != "default" or local.theta != config.rope.theta),
            f"rope of local layers {local.kind!r} with base {local.theta}: it is 'default' with the base of global "
            f"layers, {config.rope.theta}",
        )
    ]


def _gpt_oss(config: GptOssConfig) -> list[tuple[bool, str]]:
    activation = (config.swiglu_alpha, config.swiglu_limit)
    return [
        (not config.attention_bias, "attention_bias=False: every projection has a bias"),
        (config.tie_word_embeddings, "tie_word_embeddings=True: gpt-oss has an output matrix"),
        (activation != OSS_ACTIVATION, f"swiglu_alpha, swiglu_limit={activation}: they are {OSS_ACTIVATION}"),
        (SLIDING not in config.layer_types, "no layer has a window: some have in gpt-oss"),
    ]


def _window(config: FamilyConfig) -> list[tuple[bool, str]]:
    context = config.max_position_embeddings
    forms = [layer.attention.form for layer in config.shape().layers if layer.attention is not None]
    window = min((form.window for form in forms if form.window), default=context)
    return [
        (
            window < context,
            f"sliding_window={window} is below max_position_embeddings={context}, but the architecture has no window "
            "and would attend further. Set sliding_window to null, or max_position_embeddings to the window",
        )
    ]


def _gemma(family: Family, config: GemmaConfig) -> list[tuple[bool, str]]:
    kind, layers = family.model_type, config.num_hidden_layers
    period = GEMMA_PERIODS[kind]
    usual = tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
    scalar = gemma_scalar(kind, layers, dataclasses.asdict(config))
    caps = ("attn_logit_softcapping", "final_logit_softcapping") if kind == "gemma2" else ()
    local = getattr(config, "local_rope", None)
    return [
        (config.layer_types != usual, f"layer_types are not {period - 1} local to one global layer in turn"),
        (
            config.query_pre_attn_scalar != scalar,
            f"query_pre_attn_scalar={config.query_pre_attn_scalar}: in a model of {layers} layers it is {scalar}",
        ),
        *((getattr(config, cap) is None, f"{cap}=None: the architecture always caps its logits") for cap in caps),
        (
            kind == "gemma3_text" and config.final_logit_softcapping is not None,
            f"final_logit_softcapping={config.final_logit_softcapping}: some versions leave it out",
        ),
        (
            local is not None and (local.kind != "default" or local.theta != GEMMA3_LOCAL_THETA),
            f"rope of local layers {getattr(local, 'kind', None)!r} with base {getattr(local, 'theta', None)}: it is "
            f"'default' with {GEMMA3_LOCAL_THETA}",
        ),
    ]
