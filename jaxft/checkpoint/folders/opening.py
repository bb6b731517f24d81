"""Opens a folder or GGUF file: its config.json and its tensors, dense and under the names of one of our models."""

import os
from collections.abc import Mapping
from typing import Any

from jaxft import models
from jaxft.checkpoint import fused_experts, orbax_folder
from jaxft.checkpoint.folders.weights import Weights
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.quantized import bitsandbytes
from jaxft.checkpoint.quantized.mxfp4 import MXFP4Source, is_packed
from jaxft.checkpoint.score_head import FreshScoreHead
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource
from jaxft.checkpoint.text_part import TextPart
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.paths import hub_hint, is_file, open_folder, read_json
from jaxft.models.hf_fields import DENSE_TENSORS
from jaxft.models.nested import MULTIMODAL
from jaxft.models.score_model import is_score_model
from jaxft.nn.score import Head

Generation = dict[str, Any] | None


def open_weights(path: str, head: Head | None = None) -> tuple[dict[str, Any], Weights, Generation]:
    """(config.json, tensors, generation_config.json or None) of a folder or GGUF file, no tensor read yet.

    For a model that takes images too, those of its language model as a text-only model. Weights that are quantised in
    the files appear dense; `dense_tensors` of the returned config names those that the files keep dense. head: as for
    `load_model`.
    """
    if path.endswith(".gguf"):
        gguf = GGUFFile(path)
        hf_config, source = _with_head(gguf.hf_config(), gguf, head, images=False)
        return hf_config, Weights(source=source), gguf.generation_config()
    hf_config, weights = _open_folder(path)
    hf_config, source = _with_head(hf_config, weights.source, head, images=weights.left_out is not None)
    generation = os.path.join(path, "generation_config.json")
    opened = Weights(source=source, nf4=weights.nf4, left_out=weights.left_out)
    return hf_config, opened, read_json(generation) if is_file(generation) else None


def folder_config(path: str) -> dict[str, Any]:
    """config.json of a folder or GGUF file as `open_weights` returns it. Weights are opened only if it takes them.

    It does for GGUF files, for models that take images too, and for those that are quantised in the files.
    """
    if path.endswith(".gguf"):
        return open_weights(path)[0]
    hf_config = _read_config(path)
    if hf_config.get("model_type") in MULTIMODAL or hf_config.get("quantization_config") is not None:
        return _open_folder(path)[0]
    return hf_config


def _read_config(path: str) -> dict[str, Any]:
    config = os.path.join(path, "config.json")
    if not is_file(config):
        there = ", ".join(open_folder(path).names()[:8]) if "://" in path or os.path.isdir(path) else "nothing"
        raise CheckpointError(
            f"{path} is not a model: no config.json and not a .gguf file (there: {there}).{hub_hint(path)}"
        )
    return read_json(config)


def _open_folder(path: str) -> tuple[dict[str, Any], Weights]:
    given = _read_config(path)
    hf_config = bitsandbytes.without_quantization(given)
    source: TensorSource
    left_out = None
    if hf_config.get("model_type") in MULTIMODAL:
        # Refuses an unknown family before any file of weights is opened.
        models.config_from_hf(hf_config)
        part = TextPart(SafetensorsFolder(path), hf_config["model_type"])
        hf_config, left_out = models.text_config(hf_config, own_head=part.own_head()), part.left_out
        source = part
    elif orbax_folder.is_orbax_folder(path):
        source = orbax_folder.OrbaxFolder(path)
    else:
        source = SafetensorsFolder(path)
    source = MXFP4Source(source) if is_packed(hf_config) else source
    nf4 = bitsandbytes.NF4Source(source) if bitsandbytes.is_packed(source) else None
    if nf4 is not None:
        dense = [name for name in nf4.specs() if not nf4.is_nf4(name)]
        hf_config, source = hf_config | {DENSE_TENSORS: dense}, nf4
    model_type = str(hf_config.get("model_type"))
    if fused_experts.is_fused(model_type, source):
        source = fused_experts.SingleExperts(source, model_type)
    return hf_config, Weights(source=source, nf4=nf4, left_out=left_out)


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
