"""Reading a PEFT folder onto a model: its halves into the slots of layers, its whole tensors and rows into the base."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import CarriedParam, SavedParam
from jaxft.adapters.saved import mark
from jaxft.adapters.token_rows import attach_token_rows
from jaxft.checkpoint.hf import EMBEDDING, TIED_HEAD, hf_shape, param_tensors, read_json
from jaxft.checkpoint.peft.base import BaseChange, changed_base
from jaxft.checkpoint.peft.folder import CONFIG, SCORE_TASK, AdapterTensors, PeftTensor
from jaxft.checkpoint.peft.kinds import check_form, kind_of
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError, listed
from jaxft.nn.decoder import Decoder
from jaxft.quant import is_quantized
from jaxft.sharding.arrays import to_host
from jaxft.trees import flatten

TABLE_OF = {EMBEDDING: "embed_tokens", TIED_HEAD: "lm_head"}


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT folder whose settings are known to be implemented. config: its adapter_config.json."""

    path: str
    config: dict[str, Any]
    kind: ModuleType

    @cached_property
    def tensors(self) -> AdapterTensors:
        """Its tensors. Raises as `AdapterTensors` does."""
        return AdapterTensors(self.path)

    @property
    def is_score(self) -> bool:
        """Whether it is the adapter of a reward model."""
        return self.config.get("task_type") == SCORE_TASK

    @property
    def only_merged(self) -> bool:
        """Whether its adapter is implemented merged into the base, and not beside it: DoRA on the embeddings."""
        return bool(self.config.get("use_dora")) and any(".lora_embedding_" in key for key in self.tensors.specs())

    def change(self, base: TensorSource, hf_config: Mapping[str, Any] | None) -> BaseChange:
        """Its base with the whole tensors of the folder; see `changed_base`.

        hf_config: config.json of the base; without it a base is tied if it has no LM head.
        """
        tied = TIED_HEAD not in base.specs()
        if hf_config is not None:
            config = models.config_from_hf(hf_config)
            tied = config.tie_word_embeddings and config.head == "vocabulary"
        return changed_base(self.tensors, self.config, base, tied=tied, folder=self.path)

    def change_of(self, model: Decoder) -> BaseChange:
        """The same for a base in memory, which may be abstract."""
        base = ModelTensors(model)
        compare = not base.is_abstract
        return changed_base(self.tensors, self.config, base, tied=model.tied, folder=self.path, compare=compare)


def open_adapter(path: str) -> PeftFolder:
    """The PEFT folder at a path. Raises ModelError for a kind of adapter or a setting that is not implemented."""
    config = read_json(os.path.join(path, CONFIG))
    check_form(config, path)
    return PeftFolder(path, config, kind_of(config))


def read_adapter(model: Decoder, folder: str) -> tuple[str, ...]:
    """Attaches a PEFT folder's adapters to a model in memory and returns the paths of the layers that got one.

    Raises ModelError for settings that are not implemented and for a folder that gives its base tables of other sizes
    or a second table; and CheckpointError listing every tensor that is missing, unexpected or misshapen (a wrong prefix
    would otherwise leave the base model as it was).
    """
    opened = open_adapter(folder)
    change = opened.change_of(model)
    if change.tied != model.tied or change.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"{change.notes[0]}, so it cannot be attached to a base that is already in memory: load it alone, with "
            "load_model"
        )
    return attach_folder(model, opened, change)


def attach_folder(model: Decoder, opened: PeftFolder, change: BaseChange) -> tuple[str, ...]:
    """`read_adapter` onto a model whose tables have the sizes of the changed base."""
    config, source = _normalized(model, opened)
    _check(model, opened, change)
    paths = attach_structure(model, opened, change)
    parts, kinds = tuple(_parts(model, opened, config, source)), _kinds_of(model, change)
    state = nnx.state(model)
    leaves, treedef = flatten(state, is_quantized)
    for path in {part.path for part in parts}:
        value = np.zeros(leaves[path].shape, np.float32)
        for part in parts:
            if part.path == path:
                value[part.index] = part.transform.from_hf(source.read(part.key, part.part))
        leaves[path] = jnp.asarray(value)
    leaves |= _whole_values(model, leaves, kinds, change)
    for name, rows in change.rows.items():
        leaves[f"token_rows/{TABLE_OF[name]}/values"] = jnp.asarray(
            opened.tensors.files.read(rows.key).astype(np.float32)
        )
    nnx.update(model, jax.tree.unflatten(treedef, leaves.values()))
    return paths


def attach_structure(model: Decoder, opened: PeftFolder, change: BaseChange) -> tuple[str, ...]:
    """`attach_folder` without the folder's values, for models that may be abstract."""
    config, source = _normalized(model, opened)
    kinds, specs = _kinds_of(model, change), source.specs()
    paths: tuple[str, ...] = ()
    if specs or not (kinds or change.rows):
        paths = opened.kind.attach_to(model, config, specs, opened.path)
    mark(model, kinds)
    attach_token_rows(model, {TABLE_OF[name]: rows.indices for name, rows in change.rows.items()})
    return paths


class ModelTensors:
    """The base parameters of a model in memory as a source, under Hugging Face names; quantised ones as float32."""

    def __init__(self, model: Decoder) -> None:
        self._leaves = flatten(nnx.state(model), is_quantized)[0]
        self._pieces = {
            piece.hf: (path, param, piece) for path, param in param_tensors(model).items() for piece in param.pieces
        }

    @property
    def is_abstract(self) -> bool:
        """Whether the parameters are shapes without values."""
        return any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in self._leaves.values())

    def specs(self) -> dict[str, TensorSpec]:
        return {
            name: TensorSpec(hf_shape(param, piece, self._leaves[path].shape), _dtype_of(self._leaves[path]))
            for name, (path, param, piece) in self._pieces.items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        path, param, piece = self._pieces[name]
        part = self._leaves[path][piece.at]
        values = part.dense(jnp.float32) if is_quantized(part) else part
        return param.transform.to_hf(to_host(values))[index or ()]


def _dtype_of(leaf: Any) -> np.dtype:
    return np.dtype(np.float32) if is_quantized(leaf) else np.dtype(leaf.dtype)


def _normalized(model: Decoder, opened: PeftFolder) -> tuple[dict[str, Any], TensorSource]:
    if not hasattr(opened.kind, "normalize"):
        return opened.config, opened.tensors
    base = {piece.hf for param in param_tensors(model).values() for piece in param.pieces}
    config, source = opened.kind.normalize(opened.config, opened.tensors, base)
    return config, source


def _kinds_of(model: Decoder, change: BaseChange) -> dict[str, type[nnx.Param]]:
    """SavedParam or CarriedParam for the paths of parameters that the folder has whole tensors for."""
    out: dict[str, type[nnx.Param]] = {}
    for path, param in param_tensors(model).items():
        names = {piece.hf for piece in param.pieces}
        if names <= change.trained:
            out[path] = SavedParam
        elif names & (change.trained | change.carried):
            out[path] = CarriedParam
    return out


def _parts(model: Decoder, opened: PeftFolder, config: Mapping[str, Any], source: TensorSource) -> Iterable[PeftTensor]:
    optional = opened.kind.optional_keys(config) if hasattr(opened.kind, "optional_keys") else ()
    absent = tuple(key for key in optional if key not in source.specs())
    return (part for part in opened.kind.peft_tensors(model) if part.key not in absent)


def _whole_values(
    model: Decoder, leaves: Mapping[str, Any], kinds: Mapping[str, type[nnx.Param]], change: BaseChange
) -> dict[str, jax.Array]:
    """The values of parameters that were trained in full, unrounded, and of others that the folder replaces."""
    out, table = {}, param_tensors(model)
    for path in kinds:
        if is_quantized(leaves[path]):
            continue  # it was quantized as it was read
        value = np.zeros(leaves[path].shape, np.float32)
        for piece in table[path].pieces:
            value[piece.at] = table[path].transform.from_hf(change.source.read(piece.hf)).astype(np.float32)
        out[path] = jnp.asarray(value, leaves[path].dtype)
    return out


def _check(model: Decoder, opened: PeftFolder, change: BaseChange) -> None:
    """Raises CheckpointError unless the halves of a folder are those of the adapters that it describes."""

    def with_adapters() -> Decoder:
        copy = nnx.merge(*nnx.split(model))
        attach_structure(copy, opened, change)
        return copy

    config, source = _normalized(model, opened)
    abstract = nnx.eval_shape(with_adapters)
    parts, specs = tuple(_parts(abstract, opened, config, source)), source.specs()
    leaves, _ = flatten(nnx.state(abstract), is_quantized)
    expected = {key: shape_of(leaves, [part for part in parts if part.key == key]) for key in keys_of(parts)}
    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in specs]
    problems += [
        f"misshapen {key}: file {list(specs[key].shape)}, model {list(shape)}"
        for key, shape in expected.items()
        if key in specs and specs[key].shape != shape
    ]
    problems += [f"unexpected {key} {list(spec.shape)}" for key, spec in specs.items() if key not in expected]
    if problems:
        raise CheckpointError(
            f"the adapter in {opened.path} does not fit the model:\n{listed(problems, 40, lines=True)}"
        )


def keys_of(parts: Iterable[PeftTensor]) -> list[str]:
    """The keys of parts, each once."""
    return list(dict.fromkeys(part.key for part in parts))


def shape_of(leaves: Mapping[str, Any], parts: Sequence[PeftTensor]) -> tuple[int, ...]:
    """The shape of the tensor that these parts make up."""
    leaf, first = leaves[parts[0].path], parts[0]
    shape = jax.eval_shape(lambda x: x[first.index], jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    shape = first.transform.hf_shape(shape)
    slices = [part.part for part in parts if part.part is not None]
    return tuple(max((cut[axis].stop or size for cut in slices), default=size) for axis, size in enumerate(shape))
