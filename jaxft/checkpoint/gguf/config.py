"""The settings of a GGUF file as the equivalent config.json.

Settings that no file holds are added here: llama.cpp takes them from the architecture and the number of layers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.checkpoint.gguf.family import PREDICTION, TEMPERATURE, WINDOW, WINDOW_PATTERN, YARN_LOG, Family
from jaxft.checkpoint.gguf.gemma3n import gemma3n_config
from jaxft.checkpoint.gguf.gemma4 import gemma4_config
from jaxft.checkpoint.gguf.latent import latent_scaling, latent_sizes
from jaxft.checkpoint.gguf.names import FAMILIES
from jaxft.checkpoint.gguf.neutral import is_neutral
from jaxft.checkpoint.gguf.recurrent import FINETUNED, INNER, KEY_HEADS, by_layer, layered_config
from jaxft.checkpoint.gguf.ropes import YARN_FAST, YARN_SLOW, decimal_of, rope_scaling, size_of, yarn_magnitude
from jaxft.errors import CheckpointError, ModelError, did_you_mean
from jaxft.files.gguf.header import GGUFHeader
from jaxft.models.family import FULL, SLIDING
from jaxft.models.field_kinds import check_config

# Metadata under the architecture's name that is read here, or that repeats such metadata.
_KNOWN = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length "
    "rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor "
    "rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout".split()
)
# Gemma: one of this many layers is global; the number of layers of the 27B models, which scale scores differently.
GEMMA_PERIODS = {"gemma2": 2, "gemma3_text": 6}
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
GEMMA3_LOCAL_THETA = 10000.0
OLMO3_PERIOD, OSS_PERIOD = 4, 2  # by default every fourth layer is global, or every second
ALWAYS_ROPE = ("granite", "granitemoe")
EXAONE_PERIOD, COHERE_PERIOD = 4, 4
LLAMA4_CHUNK, LLAMA4_GROWTH, LLAMA4_PERIOD = 8192, 0.1, 4
LLAMA4_MAVERICK = 128  # the number of experts of the model without norms of q and k
EXAONE_32B, EXAONE_WINDOW = 64, 4096  # the layers of the EXAONE 4 with windows, and its window


def read_family(header: GGUFHeader) -> Family:
    """The family of a file. Raises ModelError for an architecture or a setting that is not implemented."""
    arch = header.require("general.architecture")
    known = {family.arch for family in FAMILIES.values()}
    if arch not in known:
        raise ModelError(
            f"{header.path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(known))}"
        )
    alike = [family for family in FAMILIES.values() if family.arch == arch]
    marked = [family for family in alike if family.mark and _is_marked(header, family)]
    family = (marked or [family for family in alike if not family.mark] or alike)[0]
    prefix = f"{arch}."
    settings = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    for name, value in settings.items():
        if name not in _KNOWN and name not in family.known() and not is_neutral(name, value, settings):
            raise ModelError(
                f"{header.path}: {prefix}{name}={value!r} is not implemented, and without it the model would compute "
                f"something else than its authors meant.{did_you_mean(name, _KNOWN | family.known())}"
            )
    return family


def _is_marked(header: GGUFHeader, family: Family) -> bool:
    value = header.metadata.get(f"{family.arch}.{family.mark}")
    return bool(value) if family.mark_value is None else value == family.mark_value


def read_config(header: GGUFHeader, family: Family, vectors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """config.json of the equivalent Hugging Face folder.

    vectors: the rotary factors among the file's tensors. Raises CheckpointError for missing metadata or tensors,
    ModelError for settings that are not implemented.
    """
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor 'token_embd.weight' is missing")
    config = _sizes(header, family) | _fields(header, family)
    check_config(config, header.path)  # before work in proportion to the number of layers
    config |= layered_config(header, family, config)
    if family.latent:
        config |= latent_sizes(header, config)
    if family.model_type == "gemma4_text":
        config |= gemma4_config(header, config, vectors)
        del config["rope_theta"]
    if family.model_type == "gemma3n_text":
        config |= gemma3n_config(header, config)
    scaling = None if "rope_parameters" in config else rope_scaling(header, family, config, vectors)
    if scaling:
        config["rope_scaling"] = latent_scaling(header, scaling) if family.latent else scaling
    if family.model_type in GEMMA_PERIODS:
        config |= _gemma(header, family, config)
    if family.model_type == "phi3":
        config |= _phi3(header, config)
    if family.model_type == "mistral":
        config |= {"sliding_window": None}
    if family.model_type == "ministral3":
        config |= {"sliding_window": None, **_ministral3(header, config)}
    if family.model_type == "olmo3":
        config |= _olmo3(header, config)
    if family.model_type == "exaone4":
        config |= _exaone4(header, config)
    if family.model_type == "cohere2":
        config |= {**_cohere2(header, config), "layer_norm_eps": config.pop("rms_norm_eps")}
    if family.model_type == "gpt_oss":
        config |= _gpt_oss(header, config)
    if family.model_type == "llama4_text":
        config |= _llama4(header, config)
    if family.model_type in ("mixtral", "qwen3_moe"):
        config |= _experts(header, family)
    for field, ours in family.present.items():
        config[field] = any(name.endswith(f".{ours}") for name in header.tensors)
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[field] = token_id
    return config


def _sizes(header: GGUFHeader, family: Family) -> dict[str, Any]:
    arch = family.arch
    hidden, heads = size_of(header, arch, "embedding_length"), size_of(header, arch, "attention.head_count")
    rotated = size_of(header, arch, "rope.dimension_count", 0)
    # Where a part of each head is rotated, the rotary dimension does not give the size of a head.
    default = rotated if rotated and not family.partial else hidden // heads
    head_dim = size_of(header, arch, "attention.key_length", default)
    for key in ("attention.value_length", *(() if family.partial else ("rope.dimension_count",))):
        if not family.latent and (size := size_of(header, arch, key, head_dim)) != head_dim:
            raise ModelError(f"{header.path}: {arch}.{key}={size} differs from the head size {head_dim}")
    layers = size_of(header, arch, "block_count")
    if arch in ALWAYS_ROPE and header.metadata.get(f"{arch}.{FINETUNED}") is False:
        raise ModelError(f"{header.path}: {arch}.{FINETUNED}=False, attention without positions, is not implemented")
    if layers > len(header.tensors):
        raise ModelError(
            f"{header.path}: {arch}.block_count={layers:,}, but the file has only {len(header.tensors):,} tensors: "
            "it is damaged or hostile. Fetch it again."
        )
    layers -= prediction_layers(header, family, layers)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _largest(header, family, INNER, layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _largest(header, family, KEY_HEADS, layers, heads),
        "head_dim": head_dim,
        **family.constants,
        "max_position_embeddings": size_of(header, arch, "context_length"),
        "rms_norm_eps": decimal_of(header.require(f"{arch}.{family.epsilon}")),
        "rope_theta": decimal_of(header.metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **({"partial_rotary_factor": (rotated or head_dim) / head_dim} if family.partial else {}),
    }


def prediction_layers(header: GGUFHeader, family: Family, layers: int) -> int:
    """How many of the file's last layers predict several tokens at once. Raises ModelError for an impossible number."""
    number = header.metadata.get(f"{family.arch}.{PREDICTION}", 0) if family.prediction else 0
    if not isinstance(number, int) or not 0 <= number < layers:
        raise ModelError(f"{header.path}: {family.arch}.{PREDICTION}={number!r} of {layers} layers")
    return number


def _largest(header: GGUFHeader, family: Family, key: str, layers: int, default: int | None = None) -> int:
    """A size of all layers that have it."""
    if family.by_layer:
        return max(by_layer(header, family.arch, key, layers))
    return size_of(header, family.arch, key, default)


def _fields(header: GGUFHeader, family: Family) -> dict[str, Any]:
    """The fields that the family's table gives to keys of the metadata."""
    out: dict[str, Any] = {}
    for key, setting in family.fields.items():
        name = f"{family.arch}.{key}"
        value = header.metadata.get(name, setting.default)
        if value is None:
            value = header.require(name)
        if not isinstance(value, int | float) or (setting.kind is int and not (isinstance(value, int) and value >= 0)):
            raise ModelError(f"{header.path}: {name}={value!r} is not a {'whole ' * (setting.kind is int)}number")
        out[setting.field] = decimal_of(value) if setting.kind is float else setting.kind(value)
    for key, only in family.fixed.items():
        value = header.metadata.get(f"{family.arch}.{key}", only)
        if value != only:
            raise ModelError(f"{header.path}: {family.arch}.{key}={value!r} is not implemented; {only!r} is")
    return out


def _exaone4(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp knows the model with windows by its layers, and takes 4096 if the file names no window."""
    layers = config["num_hidden_layers"]
    if layers != EXAONE_32B and f"exaone4.{WINDOW}" not in header.metadata:
        return {"sliding_window": None}
    return {
        "sliding_window": size_of(header, "exaone4", WINDOW, EXAONE_WINDOW),
        "layer_types": _layer_types(header, "exaone4", layers, EXAONE_PERIOD),
    }


def _llama4(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp has one size of chunks and one growth of queries, and knows Maverick by its experts."""
    if header.metadata.get(f"llama4.{WINDOW}", LLAMA4_CHUNK) != LLAMA4_CHUNK:
        raise ModelError(f"{header.path}: llama4.{WINDOW} other than {LLAMA4_CHUNK} is not implemented")
    layers = config["num_hidden_layers"]
    return {
        "interleave_moe_layer_step": size_of(header, "llama4", "interleave_moe_layer_step"),
        "no_rope_layers": [int((i + 1) % LLAMA4_PERIOD != 0) for i in range(layers)],
        "attention_chunk_size": LLAMA4_CHUNK,
        "floor_scale": LLAMA4_CHUNK,
        "attn_scale": LLAMA4_GROWTH,
        "attn_temperature_tuning": True,
        "use_qk_norm": config["num_local_experts"] != LLAMA4_MAVERICK,
    }


def _cohere2(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": size_of(header, "cohere2", WINDOW),
        "layer_types": _layer_types(header, "cohere2", config["num_hidden_layers"], COHERE_PERIOD),
    }


def _gemma(header: GGUFHeader, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, scale of the scores and soft caps, with llama.cpp's defaults for older files that lack them."""
    arch, kind, layers = family.arch, family.model_type, config["num_hidden_layers"]
    period = size_of(header, arch, "attention.sliding_window_pattern", GEMMA_PERIODS[kind])
    shared = {
        "sliding_window": size_of(header, arch, "attention.sliding_window"),
        "layer_types": [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)],
        "query_pre_attn_scalar": gemma_scalar(kind, layers, config),
        "attention_bias": False,
    }

    def cap(name: str, default: float | None) -> float | None:
        value = header.metadata.get(f"{arch}.{name}", default)
        return None if value is None else decimal_of(value)

    if kind == "gemma2":
        names = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return shared | {name: cap(name, default) for name, default in names.items()}
    local = header.metadata.get(f"{arch}.rope.freq_base_swa", GEMMA3_LOCAL_THETA)
    return shared | {
        "final_logit_softcapping": cap("final_logit_softcapping", None),
        "rope_local_base_freq": decimal_of(local),
    }


def gemma_scalar(kind: str, layers: int, sizes: Mapping[str, Any]) -> int:
    """query_pre_attn_scalar, which llama.cpp derives from the number of layers."""
    if layers == GEMMA_27B[kind]:
        return sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["head_dim"]


def _phi3(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    context = config["max_position_embeddings"]
    window = header.metadata.get("phi3.attention.sliding_window") or None  # 0: no window
    return {
        "sliding_window": window,
        "original_max_position_embeddings": size_of(header, "phi3", "rope.scaling.original_context_length", context),
    }


def _ministral3(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters, in place of the fields that other families have. llama.cpp's mscale is always 1."""
    scaling = config.pop("rope_scaling", None) or {"rope_type": "none"}
    if scaling["rope_type"] != "yarn":
        raise ModelError(f"{header.path}: mistral3.{TEMPERATURE} needs yarn, and rope is {scaling['rope_type']!r}")
    log = header.metadata.get(f"mistral3.{YARN_LOG}")
    scales = {"mscale": 1.0, "mscale_all_dim": decimal_of(log)} if log else {}
    if scaling.get("attention_factor") and log:
        scaling["attention_factor"] /= yarn_magnitude(scaling["factor"], log)
    beta = decimal_of(header.require(f"mistral3.{TEMPERATURE}"))
    fields = scaling | {"rope_theta": config.pop("rope_theta"), "llama_4_scaling_beta": beta, **scales}
    return {"rope_parameters": fields | {"beta_fast": YARN_FAST, "beta_slow": YARN_SLOW}}


def _olmo3(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's local layers have the same base and no scaling."""
    theta = config["rope_theta"]
    ropes = {
        FULL: (config.pop("rope_scaling", None) or {"rope_type": "default"}) | {"rope_theta": theta},
        SLIDING: {"rope_type": "default", "rope_theta": theta},
    }
    return {
        "sliding_window": size_of(header, "olmo2", "attention.sliding_window"),
        "layer_types": _layer_types(header, "olmo2", config["num_hidden_layers"], OLMO3_PERIOD),
        "attention_bias": False,
        "rope_parameters": ropes,
    }


def _gpt_oss(header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if scaling["rope_type"] == "yarn":
        # As its makers compute it. llama.cpp rounds the ends of the ramp to whole dimensions.
        scaling = scaling | {"beta_fast": YARN_FAST, "beta_slow": YARN_SLOW, "truncate": False}
    return {
        "rope_scaling": scaling,
        "sliding_window": size_of(header, "gpt-oss", "attention.sliding_window"),
        "layer_types": _layer_types(header, "gpt-oss", config["num_hidden_layers"], OSS_PERIOD),
        "intermediate_size": size_of(header, "gpt-oss", "expert_feed_forward_length"),
        "num_local_experts": size_of(header, "gpt-oss", "expert_count"),
        "num_experts_per_tok": size_of(header, "gpt-oss", "expert_used_count"),
        "attention_bias": True,
    }


def _layer_types(header: GGUFHeader, arch: str, layers: int, period: int) -> list[str]:
    """The kinds of the layers: one for each in the file, or by a period, whose last layer is global."""
    pattern = header.metadata.get(f"{arch}.{WINDOW_PATTERN}", period)
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if len(pattern) != layers:
        raise CheckpointError(f"{header.path}: {arch}.{WINDOW_PATTERN} has {len(pattern)} entries for {layers} layers")
    return [SLIDING if local else FULL for local in pattern]


def _experts(header: GGUFHeader, family: Family) -> dict[str, Any]:
    """llama.cpp's router renormalises the chosen weights in both families."""
    sizes = {
        str(family.experts): size_of(header, family.arch, "expert_count"),
        "num_experts_per_tok": size_of(header, family.arch, "expert_used_count"),
    }
    if family.model_type != "qwen3_moe":
        return sizes | {"sliding_window": None}
    inner = size_of(header, family.arch, "expert_feed_forward_length")
    return sizes | {"moe_intermediate_size": inner, "norm_topk_prob": True}
