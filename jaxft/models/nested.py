"""Multimodal models (text, images, audio): their language model's config.json and names of its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.hf_fields import ALLOWED, check_fields, require
from jaxft.models.qwen_vl import as_plain


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """A model_type that contains a language model.

    text_type: model_type of a text_config that does not give one. image_fields: fields of config.json about images and
    audio. parts: modules for images and audio. tied: whether the LM head is the embedding if config.json does not say
    so. flat: whether older files have the fields and names of a text-only model, beside those about images.
    language_model: the language model's module in transformers, from which PEFT makes its keys; files may have older
    names.
    """

    text_type: str
    image_fields: tuple[str, ...]
    parts: tuple[str, ...] = ("vision_tower", "multi_modal_projector", "visual")
    tied: bool = True
    flat: bool = False
    language_model: str = "model.language_model"


_QWEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_GEMMA4_FIELDS = (
    "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id", "boa_token_id",
    "eoa_token_index", "eoa_token_id", "audio_token_id", "vision_soft_tokens_per_image",
)  # fmt: skip
_GEMMA4_PARTS = ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio")
MULTIMODAL = {
    "gemma3": Multimodal(
        text_type="gemma3_text",
        image_fields=("image_token_index", "boi_token_index", "eoi_token_index", "mm_tokens_per_image"),
    ),
    "gemma3n": Multimodal(
        text_type="gemma3n_text",
        image_fields=(
            "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "boa_token_id", "eoa_token_id",
            "audio_token_id", "vision_soft_tokens_per_image", "audio_soft_tokens_per_image",
        ),
        parts=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
    ),
    "gemma4": Multimodal(text_type="gemma4_text", image_fields=_GEMMA4_FIELDS, parts=_GEMMA4_PARTS),
    "gemma4_unified": Multimodal(
        text_type="gemma4_unified_text", image_fields=_GEMMA4_FIELDS, parts=_GEMMA4_PARTS
    ),
    "llama4": Multimodal(
        text_type="llama4_text",
        image_fields=("boi_token_index", "eoi_token_index", "image_token_index"),
        parts=("vision_model", "multi_modal_projector"),
        tied=False,
        language_model="language_model.model",
    ),
    "mistral3": Multimodal(
        text_type="mistral",
        image_fields=(
            "image_token_index", "projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size",
            "vision_feature_layer",
        ),
    ),
    "qwen2_5_vl": Multimodal(
        text_type="qwen2_5_vl_text", image_fields=(*_QWEN_FIELDS, "vision_token_id"), tied=False, flat=True
    ),
    "qwen3_vl": Multimodal(text_type="qwen3_vl_text", image_fields=_QWEN_FIELDS, tied=False),
    "qwen3_vl_moe": Multimodal(text_type="qwen3_vl_moe_text", image_fields=_QWEN_FIELDS, tied=False),
    "qwen3_5": Multimodal(text_type="qwen3_5_text", image_fields=_QWEN_FIELDS, tied=False),
    "qwen3_5_moe": Multimodal(text_type="qwen3_5_moe_text", image_fields=_QWEN_FIELDS, tied=False),
}  # fmt: skip
# Fields of the whole model: in files they are outside text_config, inside it, or both.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")
_TEXT = re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)")
_FLAT_TEXT = re.compile(r"model\.(?:embed_tokens|layers|norm)\..+")
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")
_PART = re.compile(r"(?:model\.)?(\w+)\..+")


def text_config(hf: Mapping[str, Any], *, own_head: bool | None = None) -> dict[str, Any]:
    """config.json of the language model, without defaults filled in; `hf` itself if the model is not multimodal.

    own_head: whether the files contain an LM head that differs from the embedding, None if unknown. Raises ModelError
    for fields of the outer model that are not implemented, and for a missing text_config.
    """
    if hf.get("model_type") not in MULTIMODAL:
        return dict(hf)
    outer = MULTIMODAL[hf["model_type"]]
    hf = _with_text_config(hf, outer) if outer.flat and hf.get("text_config") is None else hf
    require(hf, ["text_config"])
    check_fields(hf, used=["text_config", "vision_config", "tie_word_embeddings", *outer.image_fields], must_equal={})
    if not isinstance(hf["text_config"], Mapping):
        raise ModelError(f"text_config of model_type {hf['model_type']!r} must be an object, not {hf['text_config']!r}")
    inner: dict[str, Any] = {"model_type": outer.text_type, **hf["text_config"]}
    shared = {name: hf[name] for name in (*SHARED, ALLOWED) if hf.get(name) is not None}
    # The head belongs to the outer model; transformers does not tie it if the file has a head.
    tied = hf.get("tie_word_embeddings", outer.tied) and not own_head
    if outer.flat:  # transformers 4 wrote it inside
        tied = (tied or inner.get("tie_word_embeddings")) and not own_head
    return as_plain(inner) | shared | {"tie_word_embeddings": bool(tied)}


def _with_text_config(hf: Mapping[str, Any], outer: Multimodal) -> dict[str, Any]:
    """A flat config.json as one with a text_config."""
    whole = {"model_type", "architectures", "vision_config", "tie_word_embeddings", *outer.image_fields, *SHARED}
    kept = whole | {ALLOWED, "quantization_config", "transformers_version", "use_cache"}
    inner = {name: value for name, value in hf.items() if name not in kept}
    return {name: value for name, value in hf.items() if name in kept} | {"text_config": inner}


def text_name(name: str, model_type: str | None = None) -> str | None:
    """The name of a tensor or module within the language model alone; None if it is not part of that.

    model_type: of the outer model, for tensors of its files.
    """
    if model_type is not None and MULTIMODAL[model_type].flat and _FLAT_TEXT.fullmatch(name):
        return name
    if (match := _TEXT.fullmatch(name)) is not None:
        return f"model.{match[1]}"
    head = _HEAD.fullmatch(name)
    return None if head is None else head[1]


def image_part(name: str, model_type: str) -> str | None:
    """The part for images or audio that a tensor belongs to, such as `vision_tower`; None for any other tensor."""
    match = _PART.fullmatch(name)
    return match[1] if match is not None and match[1] in MULTIMODAL[model_type].parts else None


def language_model_of(text_type: str) -> str:
    """The name in transformers of a language model of this model_type within the outer model."""
    names = (outer.language_model for outer in MULTIMODAL.values() if outer.text_type == text_type)
    return next(names, Multimodal.language_model)


def nested_module(module: str, language_model: str) -> str:
    """The name in transformers of the language model's module within the outer model: the inverse of `text_name`."""
    inner = module.removeprefix("model.")
    if inner != module:
        return f"{language_model}.{inner}"
    return f"{language_model.removesuffix('.model')}.{module}" if language_model.endswith(".model") else module


def module_names(module: str) -> tuple[str, ...]:
    """The names in transformers of the language model's module: alone, and within any outer model."""
    outers = dict.fromkeys(outer.language_model for outer in MULTIMODAL.values())
    return (module, *(nested_module(module, name) for name in outers))


def peft_targets(modules: list[str], language_model: str) -> str:
    """A regular expression for PEFT's target_modules that matches these modules of the language model only."""
    inside = "|".join(map(re.escape, sorted(set(modules) - {"lm_head"})))
    parts = [rf"{re.escape(language_model)}\.(.*\.)?({inside})"] if inside else []
    head = re.escape(nested_module("lm_head", language_model))
    return "|".join(parts + ([head] if "lm_head" in modules else []))


def unknown_multimodal(kind: object, text_kind: object) -> ModelError:
    """The error for a multimodal model that is not in MULTIMODAL."""
    return ModelError(
        f"model_type {kind!r} takes more than text, which is not implemented; its text model is of model_type "
        f"{text_kind!r}. Implemented: the text models of {', '.join(MULTIMODAL)}."
    )
