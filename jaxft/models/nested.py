"""Multimodal models (text and images): their language model's config.json and names of its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.hf_fields import ALLOWED, check_fields, require


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """A model_type that contains a language model.

    text_type: model_type of a text_config that does not give one. image_fields: fields of config.json about images.
    """

    text_type: str
    image_fields: tuple[str, ...]


MULTIMODAL = {
    "gemma3": Multimodal(
        text_type="gemma3_text",
        image_fields=("image_token_index", "boi_token_index", "eoi_token_index", "mm_tokens_per_image"),
    ),
    "mistral3": Multimodal(
        text_type="mistral",
        image_fields=(
            "image_token_index", "projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size",
            "vision_feature_layer",
        ),
    ),
}  # fmt: skip
# Fields of the whole model: in files they are outside text_config, inside it, or both.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")
# The module's name in transformers, from which PEFT makes its keys; files have older names.
LANGUAGE_MODEL = "model.language_model"
_TEXT = re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)")
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")
_IMAGES = re.compile(r"(?:model\.)?(vision_tower|multi_modal_projector)\..+")


def text_config(hf: Mapping[str, Any], *, own_head: bool | None = None) -> dict[str, Any]:
    """config.json of the language model, without defaults filled in; `hf` itself if the model is not multimodal.

    own_head: whether the files contain an LM head that differs from the embedding, None if unknown. Raises ModelError
    for fields of the outer model that are not implemented, and for a missing text_config.
    """
    if hf.get("model_type") not in MULTIMODAL:
        return dict(hf)
    outer = MULTIMODAL[hf["model_type"]]
    require(hf, ["text_config"])
    check_fields(hf, used=["text_config", "vision_config", "tie_word_embeddings", *outer.image_fields], must_equal={})
    if not isinstance(hf["text_config"], Mapping):
        raise ModelError(f"text_config of model_type {hf['model_type']!r} must be an object, not {hf['text_config']!r}")
    inner: dict[str, Any] = {"model_type": outer.text_type, **hf["text_config"]}
    shared = {name: hf[name] for name in (*SHARED, ALLOWED) if hf.get(name) is not None}
    # The head belongs to the outer model, which ties it by default; transformers does not if the file has a head.
    tied = hf.get("tie_word_embeddings", True) and not own_head
    return inner | shared | {"tie_word_embeddings": bool(tied)}


def text_name(name: str) -> str | None:
    """The name of a tensor or module within the language model alone; None if it is not part of that."""
    if (match := _TEXT.fullmatch(name)) is not None:
        return f"model.{match[1]}"
    head = _HEAD.fullmatch(name)
    return None if head is None else head[1]


def image_part(name: str) -> str | None:
    """The part of the image encoder that a tensor belongs to (`vision_tower` or the projector); None for any other."""
    match = _IMAGES.fullmatch(name)
    return None if match is None else match[1]


def nested_module(module: str) -> str:
    """The name in transformers of the language model's module within the outer model: the inverse of `text_name`."""
    inner = module.removeprefix("model.")
    return module if inner == module else f"{LANGUAGE_MODEL}.{inner}"


def peft_targets(modules: list[str]) -> str:
    """A regular expression for PEFT's target_modules that matches these modules of the language model only."""
    inside = "|".join(sorted(set(modules) - {"lm_head"}))
    parts = [rf"{re.escape(LANGUAGE_MODEL)}\..*\.({inside})"] if inside else []
    return "|".join(parts + (["lm_head"] if "lm_head" in modules else []))


def unknown_multimodal(kind: object, text_kind: object) -> ModelError:
    """The error for a multimodal model that is not in MULTIMODAL."""
    return ModelError(
        f"model_type {kind!r} takes more than text, which is not implemented; its text model is of model_type "
        f"{text_kind!r}. Implemented: the text models of {', '.join(MULTIMODAL)}."
    )
