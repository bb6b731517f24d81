"""Folders of models that take images too: where their language model is, in config.json and among the tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.hf_fields import check_fields, require


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """What a model_type keeps around its language model.

    text_type: model_type of a text_config that names none. image_fields: fields of config.json about images.
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
# Said for the model as a whole: these stand outside text_config, or in it, or in both.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")
# transformers' modules, of which PEFT makes its keys; files have the older names.
LANGUAGE_MODEL = "model.language_model"
_TEXT = re.compile(r"(?:model\.language_model|language_model\.model)\.(.+)")
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")
_IMAGES = re.compile(r"(?:model\.)?(vision_tower|multi_modal_projector)\..+")


def text_config(hf: Mapping[str, Any], *, own_head: bool | None = None) -> dict[str, Any]:
    """config.json of the language model alone, its defaults not filled in; `hf` itself where it is not nested.

    own_head: whether the files hold an LM head that is not the embedding, None where that is not known. Raises
    ModelError for fields of the outer model that are not understood, and where there is no text_config.
    """
    if hf.get("model_type") not in MULTIMODAL:
        return dict(hf)
    outer = MULTIMODAL[hf["model_type"]]
    require(hf, ["text_config"])
    check_fields(hf, used=["text_config", "vision_config", "tie_word_embeddings", *outer.image_fields], must_equal={})
    if not isinstance(hf["text_config"], Mapping):
        raise ModelError(f"text_config of model_type {hf['model_type']!r} is no object, but {hf['text_config']!r}")
    inner = {"model_type": outer.text_type} | hf["text_config"]
    shared = {name: hf[name] for name in SHARED if hf.get(name) is not None}
    # The outer model has the head, and ties it unless told not to. transformers does not where the file has another.
    tied = hf.get("tie_word_embeddings", True) and not own_head
    return inner | shared | {"tie_word_embeddings": bool(tied)}


def text_name(name: str) -> str | None:
    """What the language model alone calls a tensor or a module of it, None where it is none of its own."""
    if (found := _TEXT.fullmatch(name)) is not None:
        return f"model.{found[1]}"
    head = _HEAD.fullmatch(name)
    return None if head is None else head[1]


def image_part(name: str) -> str | None:
    """Which of the parts that only images go through a tensor is of, None for any other."""
    found = _IMAGES.fullmatch(name)
    return None if found is None else found[1]


def nested_module(module: str) -> str:
    """What transformers calls a module of the language model inside the outer one: the inverse of `text_name`."""
    inner = module.removeprefix("model.")
    return module if inner == module else f"{LANGUAGE_MODEL}.{inner}"


def peft_targets(modules: list[str]) -> str:
    """The expression by which PEFT finds those kinds of modules in the language model, and no others of that name."""
    inside = "|".join(sorted(set(modules) - {"lm_head"}))
    parts = [rf"{re.escape(LANGUAGE_MODEL)}\..*\.({inside})"] if inside else []
    return "|".join(parts + (["lm_head"] if "lm_head" in modules else []))


def missing_text_model(kind: Any, part: Any) -> ModelError:
    """The refusal of a nested model that is not one of MULTIMODAL."""
    return ModelError(
        f"model_type {kind!r} takes more than text, which is not implemented; its text model is of model_type "
        f"{part!r}. Implemented: the text models of {', '.join(MULTIMODAL)}."
    )
