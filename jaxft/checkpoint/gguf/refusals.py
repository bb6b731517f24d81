"""Models that llama.cpp would compute differently, which are not written."""

import dataclasses

from jaxft.checkpoint.gguf.config import (
    COHERE_PERIOD,
    EXAONE_32B,
    EXAONE_PERIOD,
    GEMMA3_LOCAL_THETA,
    GEMMA_PERIODS,
    LLAMA4_CHUNK,
    LLAMA4_GROWTH,
    LLAMA4_MAVERICK,
    LLAMA4_PERIOD,
    gemma_scalar,
)
from jaxft.checkpoint.gguf.family import Family
from jaxft.checkpoint.gguf.gemma3n import gemma3n_differences
from jaxft.checkpoint.gguf.gemma4 import gemma4_differences
from jaxft.checkpoint.gguf.latent import latent_differences
from jaxft.checkpoint.gguf.recurrent import layered_differences
from jaxft.checkpoint.gguf.ropes import YARN_FAST, YARN_SLOW
from jaxft.errors import ExportError
from jaxft.models.families.cohere2 import Config as Cohere2Config
from jaxft.models.families.deepseek.deepseek_v3 import LatentConfig
from jaxft.models.families.ernie.ernie4_5_moe import Config as ErnieConfig
from jaxft.models.families.exaone4 import Config as Exaone4Config
from jaxft.models.families.gemma.gemma2 import GemmaConfig
from jaxft.models.families.gemma.gemma3n import Config as Gemma3nConfig
from jaxft.models.families.gemma.gemma4 import Config as Gemma4Config
from jaxft.models.families.glm.glm4_moe import Config as GlmMoeConfig
from jaxft.models.families.gpt_oss import Config as GptOssConfig
from jaxft.models.families.llama4 import CHUNKED
from jaxft.models.families.llama4 import Config as Llama4Config
from jaxft.models.families.olmo.olmo3 import Config as Olmo3Config
from jaxft.models.families.qwen.qwen3_moe import Config as Qwen3MoEConfig
from jaxft.models.families.smollm3 import Config as SmolLM3Config
from jaxft.models.families.smollm3 import default_ropes
from jaxft.models.family import FULL, SLIDING, FamilyConfig

WITH_ALPHA = ("hunyuan-dense", "hunyuan-moe")  # a fixed alpha of the rope becomes a part of its base
LEAST_SUM = 6.103515625e-05  # by which llama.cpp divides weights of experts whose sum is smaller
LAYERED = ("lfm2", "lfm2moe", "granitehybrid", "nemotron_h", "nemotron_h_moe", "qwen3next", "qwen35", "qwen35moe")
OSS_ACTIVATION = (1.702, 7.0)
# Scalings of rope that are written beyond none and linear; in other architectures yarn.
MORE_ROPES = {
    "phi3": ("longrope",),
    **dict.fromkeys(("llama", "granite", "granitemoe", "exaone4", "apertus"), ("llama3", "yarn")),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3n", "cohere2", "chatglm", "glm4", "glm4moe", *WITH_ALPHA, *LAYERED), ()
    ),
    "llama4": ("llama3",),
    "gemma4": ("proportional",),
}
# Architectures whose projections in attention may have biases.
BIASED = ("llama", "gpt-oss", "granite", "granitemoe", "granitehybrid", "seed_oss", "chatglm", "glm4", "glm4moe")
NARROW = ("phi3", "olmo2", "exaone4", "chatglm", "lfm2", "lfm2moe")  # the heads together are as wide as the model
TIED, UNTIED = ("gemma", "gemma2", "cohere2"), ("olmo2", "apertus")


def refuse(family: Family, config: FamilyConfig) -> None:
    """Raises ExportError, with the reason, for a model that llama.cpp would compute differently."""
    for differs, why in _differences(family, config):
        if differs:
            raise ExportError(
                f"{why}. llama.cpp's {family.arch} would compute something else than this model, so no GGUF is written."
            )


def _differences(family: Family, config: FamilyConfig) -> list[tuple[bool, str]]:
    """(whether the model differs, how) for everything that llama.cpp does in only one way for a family."""
    differences = _ropes(family, config) + _parts(family, config) + layered_differences(config)
    if isinstance(config, Olmo3Config):
        return differences + _olmo3(config)
    if isinstance(config, Cohere2Config):
        return differences + _periodic(config.layer_types, COHERE_PERIOD)
    if isinstance(config, Exaone4Config):
        return differences + _exaone4(config)
    if isinstance(config, Gemma4Config):
        return differences + gemma4_differences(config)
    if isinstance(config, Gemma3nConfig):
        return differences + gemma3n_differences(config)
    if isinstance(config, LatentConfig):
        return differences + latent_differences(family, config)
    if isinstance(config, Llama4Config):
        return differences + _llama4(config)
    if isinstance(config, ErnieConfig):
        return differences + _ernie(config)
    if isinstance(config, GlmMoeConfig):
        return differences + _groups(config)
    if isinstance(config, SmolLM3Config):
        return differences + _smollm3(config) + _window(config)
    if isinstance(config, GptOssConfig):
        return differences + _gpt_oss(config)
    return differences + (_gemma(family, config) if isinstance(config, GemmaConfig) else _window(config))


def _ropes(family: Family, config: FamilyConfig) -> list[tuple[bool, str]]:
    arch, rope = family.arch, config.rope
    kinds = ("default", "linear", *MORE_ROPES.get(arch, ("yarn",)))
    whole = family.partial or rope.kind == "proportional" or rope.partial_rotary_factor == 1.0
    # A fixed alpha becomes a part of the base.
    kind = "default" if arch in WITH_ALPHA and rope.alpha is not None else rope.kind
    return [
        (
            kind not in kinds or not whole,
            f"rope scaling {rope.kind!r} with partial_rotary_factor={rope.partial_rotary_factor} is not written to "
            f"GGUF; {', '.join(kinds)} of whole heads are",
        ),
        (
            rope.kind == "yarn"
            and arch != "gpt-oss"  # llama.cpp rounds the ramp of its makers' own files too
            and (rope.beta_fast or YARN_FAST, rope.beta_slow or YARN_SLOW, rope.truncate)
            != (YARN_FAST, YARN_SLOW, True),
            f"yarn with beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}, truncate={rope.truncate}: its ramp "
            f"runs from {YARN_FAST:g} to {YARN_SLOW:g} turns there, rounded to whole dimensions",
        ),
    ]


def _parts(family: Family, config: FamilyConfig) -> list[tuple[bool, str]]:
    """Biases, sizes, tied heads and routers."""
    arch, heads = family.arch, config.num_attention_heads * config.head_dim
    return [
        (
            bool(getattr(config, "attention_bias", False)) and arch not in BIASED,
            "attention_bias=True: there are no such biases",
        ),
        *(
            (getattr(config, name, False) is True, f"{name}=True: there are no such biases")
            for name, value in family.constants.items()
            if value is False
        ),
        *(
            (getattr(config, name, value) != value, f"{name}={getattr(config, name, value)}: it is {value} there")
            for name, value in family.constants.items()
        ),
        (
            arch in NARROW and heads != config.hidden_size,
            f"num_attention_heads x head_dim = {heads} is not hidden_size={config.hidden_size}",
        ),
        (
            arch in UNTIED and config.tie_word_embeddings,
            f"tie_word_embeddings=True: {arch} has an output matrix",
        ),
        (
            arch in TIED and not config.tie_word_embeddings,
            f"tie_word_embeddings=False: {arch} has no output matrix",
        ),
        (
            not getattr(config, "norm_topk_prob", True)
            and "expert_weights_norm" not in {**family.fields, **family.fixed},
            "norm_topk_prob=False: the weights of a token's experts are normalised to sum to 1",
        ),
        (
            isinstance(config, Qwen3MoEConfig) and bool(config.dense_layers()),
            "mlp_only_layers or decoder_sparse_step: all layers have experts there",
        ),
    ]


def _smollm3(config: SmolLM3Config) -> list[tuple[bool, str]]:
    default = default_ropes(config.num_hidden_layers)
    return [
        (config.no_rope_layers != default, f"no_rope_layers={list(config.no_rope_layers)}: every fourth layer is 0"),
        (config.mlp_bias, "mlp_bias=True: there are no such biases"),
    ]


def _periodic(layer_types: tuple[str, ...], period: int) -> list[tuple[bool, str]]:
    usual = tuple(SLIDING if (i + 1) % period else FULL for i in range(len(layer_types)))
    return [(layer_types != usual, f"layer_types are not {period - 1} local to one global layer in turn")]


def _exaone4(config: Exaone4Config) -> list[tuple[bool, str]]:
    layers, window = config.num_hidden_layers, config.sliding_window
    return [
        (
            (window is not None) != (layers == EXAONE_32B),
            f"sliding_window={window} in a model of {layers} layers: those of {EXAONE_32B} layers have windows, and no "
            "others",
        ),
        *(_periodic(config.layer_types, EXAONE_PERIOD) if window is not None else ()),
    ]


def _groups(config: GlmMoeConfig) -> list[tuple[bool, str]]:
    return [(config.n_group != 1, f"n_group={config.n_group}: experts are not in groups there")]


def _ernie(config: ErnieConfig) -> list[tuple[bool, str]]:
    last, least = config.num_hidden_layers - 1, config.moe_norm_min
    return [
        (
            config.moe_layer_end_index != last,
            f"moe_layer_end_index={config.moe_layer_end_index}: the layers with experts end with the last, {last}",
        ),
        (config.moe_layer_interval != 1, f"moe_layer_interval={config.moe_layer_interval}: it is 1 there"),
        (least > LEAST_SUM, f"moe_norm_min={least}: the weights of experts are divided by their sum or by {LEAST_SUM}"),
    ]


def _llama4(config: Llama4Config) -> list[tuple[bool, str]]:
    layers = range(config.num_hidden_layers)
    ropes = tuple(int((i + 1) % LLAMA4_PERIOD != 0) for i in layers)
    step = config.moe_layers[0] + 1 if config.moe_layers else 0
    growth = (config.attn_temperature_tuning, config.floor_scale, config.attn_scale)
    kinds = tuple(CHUNKED if rope else FULL for rope in ropes)
    maverick = config.num_local_experts == LLAMA4_MAVERICK
    return [
        (config.no_rope_layers != ropes, f"no_rope_layers={list(config.no_rope_layers)}: every fourth layer is 0"),
        (
            config.layer_types != kinds or config.attention_chunk_size != LLAMA4_CHUNK,
            f"attention_chunk_size={config.attention_chunk_size} and layer_types: layers with a rope have chunks of "
            f"{LLAMA4_CHUNK}, and no others",
        ),
        (
            growth != (True, LLAMA4_CHUNK, LLAMA4_GROWTH),
            f"attn_temperature_tuning, floor_scale, attn_scale={growth}: True, {LLAMA4_CHUNK}, {LLAMA4_GROWTH} there",
        ),
        (
            config.use_qk_norm == maverick,
            f"use_qk_norm={config.use_qk_norm}: models of {LLAMA4_MAVERICK} experts do without, all others do not",
        ),
        (
            not step or config.moe_layers != tuple(layers[step - 1 :: step]),
            f"moe_layers={list(config.moe_layers)}: they are every n-th layer for some n",
        ),
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
