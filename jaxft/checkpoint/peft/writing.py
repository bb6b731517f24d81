"""Writing the adapters of a model as a PEFT folder, with the tensors of the base that belong to them."""

# V vocab, D model, n tokens

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters
from jaxft.adapters.saved import carried_paths, saved_paths
from jaxft.adapters.token_rows import TokenRows
from jaxft.checkpoint.hf import EMBEDDING, TIED_HEAD, param_tensors
from jaxft.checkpoint.peft.folder import CONFIG, PREFIX, SCORE_TASK, TRAINABLE_TOKENS, WEIGHTS, PeftTensor
from jaxft.checkpoint.peft.kinds import only_kind
from jaxft.checkpoint.peft.reading import shape_of
from jaxft.checkpoint.safetensors_writer import Index, LazyTensor, gather_sharded, write_safetensors
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import ModelError
from jaxft.files.atomic import write_text
from jaxft.models.family import FamilyConfig
from jaxft.models.nested import language_model_of, nested_module, peft_targets
from jaxft.models.tensor_map import Piece
from jaxft.nn.decoder import Decoder
from jaxft.quant import is_quantized
from jaxft.sharding.arrays import to_host
from jaxft.sharding.processes import is_primary
from jaxft.trees import flatten

MODULE_OF = {"embed_tokens": EMBEDDING.removesuffix(".weight"), "lm_head": "lm_head"}


def check_writable(model: Decoder) -> None:
    """Raises ModelError if PEFT's folders have no form for the adapters of a model, which may be abstract."""
    _check_embedding(model)
    kind = only_kind(model)
    if kind is not None:
        kind.adapter_config_fields(model)


def write_adapter(model: Decoder, folder: str, *, base: str, nested: bool = False) -> None:
    """Writes the model's adapters as a PEFT folder.

    base: the value of base_model_name_or_path. nested: whether `base` is a model that takes images too, in which
    transformers nests these layers one level deeper. Every process takes part; process 0 writes.
    Raises ModelError if the model has no adapter.
    """
    kind = only_kind(model)
    _check_embedding(model)
    if kind is None:
        raise ModelError("the model has no adapter to write; full fine-tuning writes the whole model")
    model = kind.plain_model(model) if hasattr(kind, "plain_model") else model
    leaves, _ = flatten(nnx.state(model), is_quantized)
    outer = language_model_of(str(model.config.to_hf()["model_type"])) if nested else None
    wrapper = "" if kind.PEFT_TYPE == TRAINABLE_TOKENS else "token_adapter."
    whole = tuple(_whole_tensors(model, saved_paths(model), wrapper))
    carried = tuple(_whole_tensors(model, carried_paths(model), wrapper))
    parts: dict[str, list[PeftTensor]] = {}
    for part in (*kind.peft_tensors(model), *whole, *carried, *_row_tensors(model, wrapper)):
        parts.setdefault(_nested_key(part.key, outer), []).append(part)
    tensors = {key: _lazy(leaves, of_key) for key, of_key in parts.items()}
    if not is_primary():
        gather_sharded(tensors)
        return
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, WEIGHTS), tensors, {"format": "pt"})
    config = {
        "peft_type": kind.PEFT_TYPE,
        "task_type": SCORE_TASK if model.config.head == "score" else "CAUSAL_LM",
        # transformers knows repositories by owner/name, and no single file of one.
        "base_model_name_or_path": base if base.endswith(".gguf") else base.removeprefix("hf://"),
        "inference_mode": True,
    } | kind.adapter_config_fields(model)
    if outer is not None and "target_modules" in config:
        config["target_modules"] = _nested_targets(config["target_modules"], outer)
    config |= _whole_fields(model, whole, outer) | _row_fields(model, kind.PEFT_TYPE)
    write_text(os.path.join(folder, CONFIG), json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_embedding(model: Decoder) -> None:
    """Raises ModelError if something is trained on an embedding table that transformers' module calls otherwise."""
    config, table = cast(FamilyConfig, model.config), "embed_tokens"
    rows = {} if model.token_rows is None else cast(TokenRows, model.token_rows).by_table()
    paths = {*adapters(model), *saved_paths(model), *carried_paths(model), *rows}
    if config.in_files(EMBEDDING).endswith(EMBEDDING.removeprefix("model.")) or not any(
        path.split("/")[0] == table for path in paths
    ):
        return
    raise ModelError(
        f"the embedding table of model_type {config.to_hf()['model_type']!r} has a name in transformers for which "
        "adapters are not written: leave embed_tokens out of adapter.target_modules and adapter.modules_to_save, and "
        "add no tokens"
    )


def _whole_tensors(model: Decoder, paths: Iterable[str], wrapper: str) -> Iterator[PeftTensor]:
    """The folder's tensors of parameters of the base that it holds whole.

    wrapper: what PEFT has between the module of a table and the rows of it that are trained.
    """
    table = param_tensors(model)
    for path in paths:
        for piece in table[path].pieces:
            names = (EMBEDDING, TIED_HEAD) if piece.hf == EMBEDDING and model.tied else (piece.hf,)  # PEFT has it twice
            for name in names:
                key = PREFIX + _wrapped(model, name, path, piece, wrapper)
                yield PeftTensor(key, path, piece.at, table[path].transform)


def _wrapped(model: Decoder, name: str, path: str, piece: Piece, wrapper: str) -> str:
    """The name of a tensor of the base in PEFT's model, which wraps a module that has an adapter."""
    module, _, parameter = name.rpartition(".")
    layer = path.rpartition("/")[0]
    adapter: Any = adapters(model).get(layer)
    if adapter is not None and (not hasattr(adapter, "rank") or adapter.rank(piece.layer)):
        return f"{module}.base_layer.{parameter}"
    if model.token_rows is not None and layer in cast(TokenRows, model.token_rows).by_table():
        return f"{module}.{wrapper}base_layer.{parameter}"
    return name


def _row_tensors(model: Decoder, wrapper: str) -> Iterator[PeftTensor]:
    if model.token_rows is not None:
        for name in cast(TokenRows, model.token_rows).by_table():
            key = f"{PREFIX}{MODULE_OF[name]}.{wrapper}trainable_tokens_delta"
            yield PeftTensor(key, f"token_rows/{name}/values")


def _row_fields(model: Decoder, peft_type: str) -> dict[str, Any]:
    if model.token_rows is None or peft_type == TRAINABLE_TOKENS:  # whose own fields name the tokens
        return {}
    indices = {name: list(rows.indices) for name, rows in cast(TokenRows, model.token_rows).by_table().items()}
    only_embeddings = list(indices) == ["embed_tokens"]
    return {"trainable_token_indices": indices["embed_tokens"] if only_embeddings else indices}


def _whole_fields(model: Decoder, whole: Sequence[PeftTensor], outer: str | None) -> dict[str, Any]:
    """modules_to_save and what belongs to it; trained biases are named by a field of their own."""
    if not whole:
        return {}
    keys = [_nested_key(part.key, outer) for part in whole]
    saved = {key.removeprefix(PREFIX).rpartition(".")[0] for key in keys if not key.endswith(".bias")}
    biases = {key.rpartition(".")[0] for key in keys if key.endswith(".bias")} - {PREFIX + name for name in saved}
    fields: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    if biases:
        fields["bias"] = "lora_only" if all(name.endswith(".base_layer") for name in biases) else "all"
    if saved:
        # Without it PEFT would train a copy of a tied table and leave the head as it was.
        fields["ensure_weight_tying"] = PREFIX + TIED_HEAD in (part.key for part in whole) and model.tied
    return fields


def _nested_targets(names: list[str], outer: str) -> str | list[str]:
    # A list of last names would find the image tower's layers of the same names too.
    if any(name.startswith("model.") for name in names):
        return [nested_module(name, outer) for name in names]
    return peft_targets(names, outer)


def _nested_key(key: str, outer: str | None) -> str:
    """outer: the language model's module within a model that takes images too; None if there is no such model."""
    return key if outer is None or not key.startswith(PREFIX) else PREFIX + nested_module(key[len(PREFIX) :], outer)


def _lazy(leaves: Mapping[str, Any], parts: Sequence[PeftTensor]) -> LazyTensor:
    shape = shape_of(leaves, parts)
    values = [leaves[part.path][part.index] for part in parts]

    def make(index: Index | None = None) -> np.ndarray:
        out = np.empty(shape, np.float32)
        for part, value in zip(parts, values, strict=True):
            out[part.part or ...] = part.transform.to_hf(to_host(value))
        return out[index or ()]

    return TensorSpec(shape, np.dtype(np.float32)), make
