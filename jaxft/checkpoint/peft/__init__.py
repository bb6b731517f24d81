"""Adapters read from and written to PEFT's folder format. Each kind of adapter has a module of its own here.

Such a module has PEFT_TYPE and these functions:

- `attach_to(model, config, specs, folder)` attaches adapters with a folder's settings, values still to be read;
- `peft_tensors(model)` lists the tensors that a folder has for a model's adapters;
- `adapter_config_fields(model)` gives their fields of adapter_config.json;
- `merge_blocks(base, config, source)` says how the base's tensors are merged with a folder while they are read; a kind
  without it cannot be merged.

Optional are `plain_model(model)`, the model with its adapters in a form that PEFT can load, for adapters that have
another; `normalize(config, source, base)`, one form of a folder for kinds that have two; and `optional_keys(config)`,
the tensors that a folder may leave out.
"""

import functools
import importlib
import json
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters, virtual_modules
from jaxft.adapters.saved import train_whole
from jaxft.checkpoint.hf import EMBEDDING, TIED_HEAD, param_tensors, read_json
from jaxft.checkpoint.peft.folder import (
    CONFIG,
    PREFIX,
    SCORE_TASK,
    WEIGHTS,
    AdapterTensors,
    PeftSource,
    PeftTensor,
    saved_tensors,
)
from jaxft.checkpoint.safetensors_writer import Index, LazyTensor, gather_sharded, write_safetensors
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import CheckpointError, ModelError, did_you_mean, listed
from jaxft.files.atomic import write_text
from jaxft.models.nested import nested_module, peft_targets, text_name
from jaxft.nn.decoder import Decoder
from jaxft.sharding.arrays import to_host
from jaxft.sharding.processes import is_primary
from jaxft.trees import flatten


@functools.cache
def kinds() -> dict[str, ModuleType]:
    """The module of every implemented `peft_type`."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {module.PEFT_TYPE: module for module in modules if hasattr(module, "PEFT_TYPE")}


def kind_of(config: Mapping[str, Any]) -> ModuleType:
    """The module for an adapter_config.json. Raises ModelError for a peft_type that is not implemented."""
    kind = config.get("peft_type")
    if kind not in kinds():
        known = ", ".join(sorted(kinds()))
        raise ModelError(
            f"adapter_config.json has peft_type {kind!r}, which is not implemented."
            f"{did_you_mean(str(kind), kinds())} Implemented: {known}."
        )
    return kinds()[kind]


def check_writable(model: Decoder) -> None:
    """Raises ModelError if PEFT's folders have no form for the adapters of a model, which may be abstract."""
    kind = _only_kind(model)
    if kind is not None:
        kind.adapter_config_fields(model)


def _only_kind(model: Decoder) -> ModuleType | None:
    kind_names = sorted({adapter.peft_type for adapter in (adapters(model) | virtual_modules(model)).values()})
    if len(kind_names) > 1:
        raise ModelError(f"the model has adapters of {' and '.join(kind_names)}: a PEFT folder holds one kind")
    return kinds()[kind_names[0]] if kind_names else None


def write_adapter(model: Decoder, folder: str, *, base: str, nested: bool = False) -> None:
    """Writes the model's adapters as a PEFT folder.

    base: the value of base_model_name_or_path. nested: whether `base` is a model that takes images too, in which
    transformers nests these layers one level deeper. Every process takes part; process 0 writes.
    Raises ModelError if the model has no adapter.
    """
    kind = _only_kind(model)
    if kind is None:
        raise ModelError("the model has no adapter to write; full fine-tuning writes the whole model")
    os.makedirs(folder, exist_ok=True)
    model = kind.plain_model(model) if hasattr(kind, "plain_model") else model
    leaves, _ = flatten(nnx.state(model))
    whole = tuple(saved_tensors(model))
    parts: dict[str, list[PeftTensor]] = {}
    for part in (*kind.peft_tensors(model), *whole):
        parts.setdefault(_nested_key(part.key) if nested else part.key, []).append(part)
    tensors = {key: _lazy(leaves, of_key) for key, of_key in parts.items()}
    if not is_primary():
        gather_sharded(tensors)
        return
    write_safetensors(os.path.join(folder, WEIGHTS), tensors, {"format": "pt"})
    config = {
        "peft_type": kind.PEFT_TYPE,
        "task_type": SCORE_TASK if model.config.head == "score" else "CAUSAL_LM",
        "base_model_name_or_path": base.removeprefix("hf://"),
        "inference_mode": True,
    } | kind.adapter_config_fields(model)
    if nested and "target_modules" in config:
        config["target_modules"] = _nested_targets(config["target_modules"])
    if whole:
        keys = (_nested_key(part.key) if nested else part.key for part in whole)
        config["modules_to_save"] = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in keys})
        # Without it PEFT would train a copy of a tied table and leave the head as it was.
        config["ensure_weight_tying"] = PREFIX + TIED_HEAD in (part.key for part in whole) and model.tied
    write_text(os.path.join(folder, CONFIG), json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter(model: Decoder, folder: str) -> tuple[str, ...]:
    """Attaches a PEFT folder's adapters to a model and returns the paths of the layers that got one.

    Raises ModelError for settings that are not implemented, and CheckpointError listing every tensor that is missing,
    unexpected or misshapen (a wrong prefix would otherwise leave the base model as it was).
    """
    config = read_json(os.path.join(folder, CONFIG))
    kind = kind_of(config)
    source: PeftSource = AdapterTensors(folder)
    if hasattr(kind, "normalize"):
        base = {piece.hf for param in param_tensors(model).values() for piece in param.pieces}
        config, source = kind.normalize(config, source, base)
    names = saved_modules(config, tied=model.tied, folder=folder)
    copies = _copies_of_base(model, source)
    specs = {key: spec for key, spec in source.specs().items() if key not in copies}
    whole = whole_keys(source, names, folder, tied=model.tied)

    def attach(model: Decoder) -> tuple[str, ...]:
        given = {key: spec for key, spec in specs.items() if key not in whole}
        paths = kind.attach_to(model, config, given, folder)
        if whole:
            train_whole(model, sorted({_our_module(model, module, folder) for module in whole.values()}))
        return paths

    def with_adapters() -> Decoder:
        copy = nnx.merge(*nnx.split(model))
        attach(copy)
        return copy

    abstract = nnx.eval_shape(with_adapters)
    optional = kind.optional_keys(config) if hasattr(kind, "optional_keys") else ()
    absent = tuple(key for key in optional if key not in specs)
    parts = tuple(part for part in (*kind.peft_tensors(abstract), *saved_tensors(abstract)) if part.key not in absent)
    leaves, _ = flatten(nnx.state(abstract))
    _check(parts, leaves, specs, folder)
    paths = attach(model)
    state = nnx.state(model)
    leaves, treedef = flatten(state)
    for path in {part.path for part in parts}:
        value = np.zeros(leaves[path].shape, np.float32)
        for part in parts:
            if part.path == path:
                value[part.index] = part.transform.from_hf(source.read(part.key, part.part))
        leaves[path] = jnp.asarray(value)
    nnx.update(model, jax.tree.unflatten(treedef, leaves.values()))
    return paths


def saved_modules(config: Mapping[str, Any], *, tied: bool, folder: str) -> tuple[str, ...]:
    """modules_to_save of an adapter_config.json. tied: whether the base's LM head is its embeddings.

    Raises ModelError if PEFT would untie the two: it then trains a copy of the table for one of them alone.
    """
    names = tuple(text_name(name) or name for name in config.get("modules_to_save") or ())
    if config.get("task_type") == SCORE_TASK:
        # PEFT names the heads of all families there, whichever the model has.
        names = (*(name for name in names if name not in ("classifier", "score")), "score")
    tied_names = [name for name in names if name.rsplit(".", 1)[-1] in ("embed_tokens", "lm_head")]
    if tied and tied_names and not config.get("ensure_weight_tying"):
        raise ModelError(
            f"{folder}: modules_to_save={list(names)} trains {tied_names[0]} apart from what it is tied to in its "
            "base, which is not implemented. Train the adapter with ensure_weight_tying=true, which keeps the two tied."
        )
    # PEFT then stores the table twice.
    return (*names, "embed_tokens", "lm_head") if tied and tied_names else names


def whole_keys(source: PeftSource, names: tuple[str, ...], folder: str, *, tied: bool) -> dict[str, str]:
    """Key -> module of the tensors of modules that were trained in full. names: from `saved_modules`.

    Raises CheckpointError for a name without a tensor, and if the two tensors of a tied table differ.
    """
    modules = {key: key.removeprefix(PREFIX).rpartition(".")[0] for key in source.specs()}
    both = [PREFIX + name for name in (EMBEDDING, TIED_HEAD) if PREFIX + name in modules]
    if tied and len(both) == 2 and not np.array_equal(source.read(both[0]), source.read(both[1])):
        raise CheckpointError(f"{folder}: {' and '.join(both)} differ, but in the base they are one tensor")
    for name in names:
        if not any(module.endswith(name) for module in modules.values()):
            raise CheckpointError(f"{folder}: {name}, which modules_to_save names, has no tensor there")
    return {key: module for key, module in modules.items() if names and module.endswith(names)}


def _our_module(model: Decoder, module: str, folder: str) -> str:
    if module == "lm_head" and model.tied:
        return "embed_tokens"
    for path, param in param_tensors(model).items():
        if any(piece.hf.rpartition(".")[0] == module for piece in param.pieces):
            return path.rpartition("/")[0]
    raise CheckpointError(f"{folder}: the model has no module {module!r}, which modules_to_save names")


def _nested_targets(names: list[str]) -> str | list[str]:
    # A list of last names would find the image tower's layers of the same names too.
    return [nested_module(name) for name in names] if any("." in name for name in names) else peft_targets(names)


def _check(
    parts: tuple[PeftTensor, ...], leaves: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> None:
    expected = {key: _shape(leaves, [part for part in parts if part.key == key]) for key in _keys(parts)}
    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in specs]
    problems += [
        f"misshapen {key}: file {list(specs[key].shape)}, model {list(shape)}"
        for key, shape in expected.items()
        if key in specs and specs[key].shape != shape
    ]
    problems += [f"unexpected {key} {list(spec.shape)}" for key, spec in specs.items() if key not in expected]
    if problems:
        raise CheckpointError(f"the adapter in {folder} does not fit the model:\n{listed(problems, 40, lines=True)}")


def _copies_of_base(model: Decoder, source: PeftSource) -> set[str]:
    # Beside an adapter on the LM head PEFT stores the head itself; one that is not the base's stays unexpected.
    leaves, out = flatten(nnx.state(model))[0], set()
    for path, param in param_tensors(model).items():
        for piece in param.pieces:
            key = f"{PREFIX}{piece.hf.removesuffix('.weight')}.base_layer.weight"
            if key in source.specs():
                leaf = leaves[path][piece.at]
                if np.array_equal(param.transform.from_hf(source.read(key)).astype(leaf.dtype), to_host(leaf)):
                    out.add(key)
    return out


def _nested_key(key: str) -> str:
    return PREFIX + nested_module(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else key


def _keys(parts: Iterable[PeftTensor]) -> list[str]:
    return list(dict.fromkeys(part.key for part in parts))


def _shape(leaves: Mapping[str, Any], parts: Sequence[PeftTensor]) -> tuple[int, ...]:
    """Shape of the tensor that these parts make up."""
    leaf, first = leaves[parts[0].path], parts[0]
    shape = jax.eval_shape(lambda x: x[first.index], jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    shape = first.transform.hf_shape(shape)
    slices = [part.part for part in parts if part.part is not None]
    return tuple(max((cut[axis].stop or size for cut in slices), default=size) for axis, size in enumerate(shape))


def _lazy(leaves: Mapping[str, Any], parts: Sequence[PeftTensor]) -> LazyTensor:
    shape = _shape(leaves, parts)
    values = [leaves[part.path][part.index] for part in parts]

    def make(index: Index | None = None) -> np.ndarray:
        out = np.empty(shape, np.float32)
        for part, value in zip(parts, values, strict=True):
            out[part.part or ...] = part.transform.to_hf(to_host(value))
        return out[index or ()]

    return TensorSpec(shape, np.dtype(np.float32)), make
