"""Opens a folder or GGUF file: its config.json and its tensors, dense and under the names of one of our models."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft import models
from jaxft.checkpoint import fused_experts, orbax_folder
from jaxft.checkpoint.folders.names import with_names_of, with_own_head, with_usual_names, without_value_head
from jaxft.checkpoint.folders.weights import Weights
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.prediction import without_prediction, without_unused
from jaxft.checkpoint.quantized import bitsandbytes, dialects
from jaxft.checkpoint.quantized.mxfp4 import MXFP4Source, is_packed
from jaxft.checkpoint.score_head import FreshScoreHead
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource
from jaxft.checkpoint.text_part import TextPart
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.json_fields import TOKEN_IDS, check_kinds
from jaxft.files.paths import hub_hint, is_file, open_folder, read_json
from jaxft.models.field_kinds import check_config
from jaxft.models.hf_fields import DENSE_TENSORS, with_allowed
from jaxft.models.nested import MULTIMODAL
from jaxft.models.score_model import is_score_model
from jaxft.models.tensor_map import tensor_names
from jaxft.nn.score import Head

LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.")
# config.json, tensors, and generation_config.json or None.
Opened = tuple[dict[str, Any], Weights, dict[str, Any] | None]


def open_weights(path: str, head: Head | None = None, allow_unknown: Sequence[str] = ()) -> Opened:
    """(config.json, tensors, generation_config.json or None) of a folder or GGUF file, no tensor read yet.

    For a model that takes images too, those of its language model as a text-only model. Weights that are quantised in
    the files appear dense; `dense_tensors` of the returned config names those that the files keep dense. head,
    allow_unknown: as for `load_model`.
    """
    if path.endswith(".gguf"):
        gguf = GGUFFile(path)
        hf_config, source = _with_head(gguf.hf_config(), gguf.tensors(), head, images=False)
        return hf_config, Weights(source=source, notes=gguf.notes()), gguf.generation_config()
    hf_config, weights = _open_folder(path, allow_unknown, head)
    hf_config, source = _with_head(hf_config, weights.source, head, images=weights.left_out is not None)
    generation = os.path.join(path, "generation_config.json")
    opened = dataclasses.replace(weights, source=source)
    return hf_config, opened, _read_generation(generation) if is_file(generation) else None


def folder_config(path: str, allow_unknown: Sequence[str] = ()) -> dict[str, Any]:
    """config.json of a folder or GGUF file as `open_weights` returns it. Weights are opened only if it takes them.

    It does for GGUF files, for models that take images too, for those that are quantised in the files, and for those
    whose head is tied, unless the files hold another one.
    """
    if path.endswith(".gguf"):
        return open_weights(path)[0]
    hf_config = with_allowed(_read_config(path), allow_unknown)
    if hf_config.get("model_type") in MULTIMODAL:
        return _open_folder(path, allow_unknown)[0]
    quantized = dialects.quantization_of(hf_config, path) is not None
    hf_config = dialects.without_quantization(hf_config)
    if not quantized and not models.config_from_hf(hf_config).tie_word_embeddings:
        return hf_config
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in open_folder(path).names())
    return _open_folder(path, allow_unknown)[0] if has_weights else hf_config


def _read_config(path: str) -> dict[str, Any]:
    config = os.path.join(path, "config.json")
    if not is_file(config):
        there = ", ".join(open_folder(path).names()[:8]) if "://" in path or os.path.isdir(path) else "nothing"
        raise CheckpointError(
            f"{path} is not a model: no config.json and not a .gguf file (there: {there}).{hub_hint(path)}"
        )
    hf_config = read_json(config)
    check_config(hf_config, config)
    return hf_config


def _read_generation(path: str) -> dict[str, Any]:
    generation = read_json(path)
    check_kinds(generation, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN_IDS), path)
    return generation


def _open_folder(path: str, allow_unknown: Sequence[str], head: Head | None = None) -> tuple[dict[str, Any], Weights]:
    given = with_allowed(_read_config(path), allow_unknown)
    settings = dialects.quantization_of(given, path)
    hf_config = dialects.without_quantization(given)
    source: TensorSource
    left_out = None
    if hf_config.get("model_type") in MULTIMODAL:
        # Refuses an unknown family before any file of weights is opened.
        config = models.config_from_hf(hf_config)
        named = with_usual_names(SafetensorsFolder(path))
        part = TextPart(named, hf_config["model_type"], config.is_for_prediction)
        hf_config, left_out = models.text_config(hf_config, own_head=part.own_head()), part.left_out
        source = part
    elif orbax_folder.is_orbax_folder(path):
        source = orbax_folder.OrbaxFolder(path)
    else:
        source = with_names_of(models.config_from_hf(hf_config), with_usual_names(SafetensorsFolder(path)))
    _check_layers(hf_config, source, path)
    source, note = without_value_head(source)
    notes = [note] if note else []
    for without in (without_prediction, without_unused):
        source, note = without(source, models.config_from_hf(hf_config))
        notes += [note] if note else []
    source, dense = dialects.dequantized(settings, source)
    source = MXFP4Source(source) if is_packed(hf_config) else source
    nf4 = bitsandbytes.NF4Source(source) if bitsandbytes.is_packed(source) else None
    if nf4 is not None:
        dense, source = [name for name in nf4.specs() if not nf4.is_nf4(name)], nf4
    if dense is not None:
        hf_config = hf_config | {DENSE_TENSORS: dense}
        config = models.config_from_hf(hf_config)
        expected = tensor_names(config.tensors(), config.num_hidden_layers)
        source = dialects.without_empty_biases(source, expected)
    model_type = str(hf_config.get("model_type"))
    if fused_experts.is_fused(model_type, source):
        source = fused_experts.SingleExperts(source, model_type)
    if not (head == "score" or is_score_model(hf_config)):
        tied = models.config_from_hf(hf_config).tie_word_embeddings
        tied_in_files, source, note = with_own_head(tied, source)
        notes += [note] if note else []
        hf_config = hf_config if tied_in_files == tied else hf_config | {"tie_word_embeddings": tied_in_files}
    return hf_config, Weights(source=source, nf4=nf4, left_out=left_out, notes=tuple(notes))


def _check_layers(hf_config: Mapping[str, Any], source: TensorSource, path: str) -> None:
    """Raises CheckpointError for a number of layers that the files have not, before work in proportion to it."""
    numbers = {int(layer[1]) for name in source.specs() if (layer := LAYER.match(name))}
    claimed = hf_config.get("num_hidden_layers") or 0
    if numbers and claimed > 4 * (max(numbers) + 1):
        raise CheckpointError(
            f"{path}: config.json claims {claimed:,} layers, and the weights have those from {min(numbers):,} to "
            f"{max(numbers):,}: they are of different models, or damaged. Take both again from where the model was "
            "published."
        )


def _with_head(
    hf_config: Mapping[str, Any], source: TensorSource, head: Head | None, *, images: bool
) -> tuple[dict[str, Any], TensorSource]:
    if head != "score" or is_score_model(hf_config):
        return dict(hf_config), source
    if images:
        raise ModelError(
            "a reward model is made of a text-only model, and this one takes images too. Write its language model by "
            "itself first: jaxft export --model=PATH --format=merged --to=NEW_FOLDER"
        )
    return models.score_config(hf_config), FreshScoreHead(source, hf_config["hidden_size"])
