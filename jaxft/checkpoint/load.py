"""Loading: one function for every kind of model on disk."""

# B batch, S sequence, V vocab

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.checkpoint.derived.grown_vocabulary import GrownVocabulary
from jaxft.checkpoint.folders.opening import Opened, folder_config
from jaxft.checkpoint.folders.opening import open_weights as open_weights
from jaxft.checkpoint.folders.origin import base_of as base_of
from jaxft.checkpoint.folders.origin import is_adapter as is_adapter
from jaxft.checkpoint.folders.origin import is_score_adapter as is_score_adapter
from jaxft.checkpoint.folders.origin import refuse_base as refuse_base
from jaxft.checkpoint.folders.origin import resolve as resolve
from jaxft.checkpoint.folders.origin import resolve_base as resolve_base
from jaxft.checkpoint.folders.weights import Weights
from jaxft.checkpoint.hf import EMBEDDING, load_weights
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import attach_folder, open_adapter
from jaxft.checkpoint.peft.reading import PeftFolder
from jaxft.checkpoint.tensors import TensorSource
from jaxft.data.batch import Batch, Example, assemble
from jaxft.data.tokenizers.table import AddedRows
from jaxft.errors import ModelError
from jaxft.files.paths import HUB, read_json
from jaxft.home import local_path
from jaxft.models.hf_fields import with_allowed
from jaxft.nn.decoder import Decoder
from jaxft.nn.score import Head
from jaxft.nn.storage import storage_dims_of
from jaxft.nn.virtual import virtual_ids
from jaxft.objectives.reward import document_scores
from jaxft.quant import FORMATS, is_quantized
from jaxft.sharding.arrays import to_host
from jaxft.sharding.mesh import MeshPlan
from jaxft.trees import flatten


@dataclass
class LoadedModel:
    """A model in memory, and its origin.

    module: the nnx model. hf_config: its config.json. base: path of the base weights. adapter: path of the PEFT folder
    that was attached, or None. generation: its generation_config.json, or the same settings of a GGUF file, or None.
    left_out: if the base is the language model of one that takes images too, a sentence on what was left out.
    quantization: the format of its frozen kernels; None if they are dense. file_dtype: the type of the tensors of a
    merged export: that of the base's own files, or float32 if all of it is trained. notes: sentences for the user on
    what is read otherwise than the files say, and on what a PEFT folder changes in its base besides its adapters.
    """

    module: Decoder
    hf_config: dict[str, Any]
    base: str
    adapter: str | None = None
    generation: dict[str, Any] | None = None
    left_out: str | None = None
    quantization: str | None = None
    file_dtype: str = "float32"
    notes: tuple[str, ...] = ()

    def logits(self, tokens_BS: Any) -> np.ndarray:
        """Logits [B, S, V], float32, of token ids [B, S], without those of virtual tokens.

        Raises ModelError for ids outside the vocabulary.
        """
        tokens = np.asarray(tokens_BS)
        vocab = self.module.config.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ModelError(f"logits takes integers [B, S], got {tokens.dtype} of shape {tokens.shape}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
            raise ModelError(f"token ids run from {tokens.min()} to {tokens.max()}; the vocabulary has {vocab}")
        _, state = nnx.split(self.module)
        return to_host(self._forward(state, tokens.astype(np.int32)))

    def scores(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """The score of each document of token ids, [N] float32, read at its last token.

        Raises ModelError if the model has no score head.
        """
        rows = [[Example(tokens=np.array(d, np.int32), mask=np.zeros(len(d), np.uint8), row=0)] for d in documents]
        batch = assemble(rows, max(4, *map(len, documents)))
        _, state = nnx.split(self.module)
        return to_host(self._scores(state, batch))

    @cached_property
    def _scores(self) -> Callable[[nnx.State, Batch[np.ndarray]], jax.Array]:
        graphdef, _ = nnx.split(self.module)

        def scores(state: nnx.State, batch: Batch[jax.Array]) -> jax.Array:
            return document_scores(nnx.merge(graphdef, state), batch)[:, 0]

        return jax.jit(scores)

    @cached_property
    def _forward(self) -> Callable[[nnx.State, np.ndarray], jax.Array]:
        graphdef, _ = nnx.split(self.module)

        def forward(state: nnx.State, tokens_BS: jax.Array) -> jax.Array:
            module = nnx.merge(graphdef, state)
            first = jnp.broadcast_to(
                jnp.array(virtual_ids(module.virtual_tokens), jnp.int32), (len(tokens_BS), module.virtual_tokens)
            )
            hidden_BSD, _ = module(jnp.concatenate([first, tokens_BS], axis=1))
            return module.unembed(hidden_BSD[:, module.virtual_tokens :])

        return jax.jit(forward)


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str = "none",
    revision: str | None = None,
    mesh: MeshPlan | None = None,
    quantization: str | None = None,
    trainable: str | None = None,
    head: Head | None = None,
    base: str | None = None,
    allow_unknown: Sequence[str] = (),
    added: AddedRows | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Loads a Hugging Face, PEFT (with its base), Orbax or run folder, a GGUF file, or hf://owner/name[@revision].

    A Hugging Face folder may also be at an address such as gs://bucket/model, of which only the parts that this process
    needs are read. dtype: of computation. param_dtype: of storage, dtype if None. mesh: for the parameters; one device
    if None. quantization: a name of `quant.FORMATS`; the kernels of linear layers are quantised to it as they are read.
    trainable: patterns of the parameters to train, stored in float32; see `models.freezing`. head: `score` gives a
    reward model, with a fresh score head unless the folder has one; None: what the folder has. base: of a PEFT folder,
    where its base is, in place of the path that the folder names. allow_unknown: fields of config.json that are ignored
    although jaxft does not know what they mean. added: rows of the tables that are drawn from `seed`; see
    `GrownVocabulary`. Raises CheckpointError for files that are damaged or do not fit, and
    ModelError for models and settings that are not implemented.
    """
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    types |= {"quantization": quantization, "trainable": trainable}
    named = local_path(path)
    path = resolve(named, revision)
    if is_adapter(path):
        opened = open_adapter(path)
        if opened.only_merged:
            hf_config, weights, generation = open_merged(path, head, allow_unknown, base)
            module = _load_module(hf_config, weights, mesh, types)
            return _loaded(module, hf_config, path, weights, generation, quantization)
        of_base = open_merged(resolve_base(path, base), "score" if opened.is_score else head, allow_unknown)
        return _load_adapted(path, opened, of_base, base_of(path, base), mesh, types)
    refuse_base(named, base)
    hf_config, weights, generation = open_weights(path, head, allow_unknown)
    if added is not None:
        grown = GrownVocabulary(weights.source, added, seed)
        weights = dataclasses.replace(weights, source=grown, notes=(*weights.notes, grown.describe()))
        hf_config = {**hf_config, "vocab_size": added.rows}
    module = _load_module(hf_config, weights, mesh, types)
    origin = named if named.startswith(HUB) else path
    return _loaded(module, hf_config, origin, weights, generation, quantization)


def _load_adapted(
    path: str, opened: PeftFolder, of_base: Opened, origin: str, mesh: MeshPlan | None, types: dict[str, Any]
) -> LoadedModel:
    """`load_model` of a PEFT folder. of_base: what `open_merged` gives of its base, whose path is `origin`."""
    before, weights, generation = of_base
    change = opened.change(weights, before)
    hf_config = change.hf_config(before)
    module = _load_module(hf_config, dataclasses.replace(weights, source=change.source), mesh, types)
    attach_folder(module, opened, change)
    if mesh is not None:
        mesh.shard_module(module)
    loaded = _loaded(module, hf_config, origin, weights, generation, types["quantization"])
    return dataclasses.replace(loaded, adapter=path, notes=(*loaded.notes, *change.notes))


def _load_module(hf_config: dict[str, Any], weights: Weights, mesh: MeshPlan | None, types: dict[str, Any]) -> Decoder:
    model = models.abstract_model(models.config_from_hf(hf_config), **types)
    format = None if types["quantization"] is None else FORMATS[types["quantization"]]
    return load_weights(model, weights, None if mesh is None else shardings_by_path(model, mesh), format)


def _loaded(
    module: Decoder,
    hf_config: dict[str, Any],
    base: str,
    weights: Weights,
    generation: dict[str, Any] | None,
    quantization: str | None,
) -> LoadedModel:
    return LoadedModel(
        module,
        hf_config,
        base,
        generation=generation,
        left_out=weights.left_out,
        quantization=quantization,
        file_dtype=file_dtype_of(weights),
        notes=weights.notes,
    )


def open_merged(
    path: str, head: Head | None = None, allow_unknown: Sequence[str] = (), base: str | None = None
) -> Opened:
    """`open_weights`, also of a PEFT folder, whose tensors are those of its base with the adapter merged.

    base: of a PEFT folder, as for `load_model`.
    """
    if not is_adapter(path):
        return open_weights(path, head, allow_unknown)
    of_base, weights, generation = open_merged(resolve_base(path, base), head, allow_unknown)
    merged = MergedSource(weights, path, of_base)
    notes = (*weights.notes, *merged.notes)
    return merged.hf_config or of_base, dataclasses.replace(weights, source=merged, nf4=None, notes=notes), generation


def file_dtype_of(weights: TensorSource) -> str:
    """The type of a model's tensors in its files, as far as models are written in it; float32 for others."""
    own = str(weights.specs()[EMBEDDING].dtype)
    return own if own in ("float32", "bfloat16", "float16") else "float32"


def random_model(
    path: str, *, seed: int, dtype: str, param_dtype: str, remat: str = "none", allow_unknown: Sequence[str] = ()
) -> LoadedModel:
    """A model of the sizes in config.json of `path`, with weights drawn from a seed."""
    hf_config = with_allowed(read_json(os.path.join(path, "config.json")), allow_unknown)
    config = models.config_from_hf(hf_config)
    module = models.random_model(config, dtype=dtype, param_dtype=param_dtype, remat=remat, seed=seed)
    return LoadedModel(module, models.text_config(hf_config), path)


def hf_config_of(path: str, base: str | None = None, *, allow_unknown: Sequence[str] = ()) -> dict[str, Any]:
    """config.json of a Hugging Face folder, a GGUF file or the model of a PEFT folder, without loading weights.

    For a model that takes images too, the config.json of its language model as a text-only model. base,
    allow_unknown: as for `load_model`.
    """
    if is_adapter(path):
        return adapted_config(path, hf_config_of(resolve_base(path, base), allow_unknown=allow_unknown))
    return folder_config(path, allow_unknown)


def adapted_config(folder: str, of_base: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model of a PEFT folder, whose tables may be untied or have other sizes than the base's.

    of_base: config.json of its base.
    """
    opened = open_adapter(folder)
    hf_config = models.score_config(of_base) if opened.is_score else of_base
    model = models.abstract_model(models.config_from_hf(hf_config))
    return opened.change_of(model).hf_config(hf_config)


def shardings_by_path(model: Decoder, mesh: MeshPlan) -> dict[str, Any]:
    """The NamedSharding of every parameter by its path."""
    return flatten(mesh.shardings(nnx.state(model), storage_dims_of(model)), is_quantized)[0]
