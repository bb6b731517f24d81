"""Loading: one function for every kind of model on disk."""

# B batch, S sequence, V vocab

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.checkpoint.folders.opening import folder_config
from jaxft.checkpoint.folders.opening import open_weights as open_weights
from jaxft.checkpoint.hf import EMBEDDING, load_weights
from jaxft.checkpoint.peft import read_adapter
from jaxft.checkpoint.peft.folder import CONFIG, SCORE_TASK
from jaxft.checkpoint.tensors import TensorSource
from jaxft.data.batch import Batch, Example, assemble
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.paths import HUB, fetch_hub, is_file, is_remote, read_json
from jaxft.files.run_folder import ADAPTER, MERGED, MODEL, is_run_folder
from jaxft.home import local_path
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
    merged export: that of the base's own files, or float32 if all of it is trained.
    """

    module: Decoder
    hf_config: dict[str, Any]
    base: str
    adapter: str | None = None
    generation: dict[str, Any] | None = None
    left_out: str | None = None
    quantization: str | None = None
    file_dtype: str = "float32"

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
) -> LoadedModel:
    """Loads a Hugging Face, PEFT (with its base), Orbax or run folder, a GGUF file, or hf://owner/name[@revision].

    A Hugging Face folder may also be at an address such as gs://bucket/model, of which only the parts that this process
    needs are read. dtype: of computation. param_dtype: of storage, dtype if None. mesh: for the parameters; one device
    if None. quantization: a name of `quant.FORMATS`; the kernels of linear layers are quantised to it as they are read.
    trainable: patterns of the parameters to train, stored in float32; see `models.freezing`. head: `score` gives a
    reward model, with a fresh score head unless the folder has one; None: what the folder has. Raises CheckpointError
    for files that are damaged or do not fit, and ModelError for models and settings that are not implemented.
    """
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    types |= {"quantization": quantization, "trainable": trainable}
    named = local_path(path)
    path = resolve(named, revision)
    if is_file(os.path.join(path, CONFIG)):
        base = base_of(path)
        head = "score" if is_score_adapter(path) else head
        loaded = load_model(base, revision=revision, mesh=mesh, head=head, **types)
        read_adapter(loaded.module, path)
        if mesh is not None:
            mesh.shard_module(loaded.module)
        loaded.adapter = path
        return loaded
    hf_config, weights, generation = open_weights(path, head)
    model = models.abstract_model(models.config_from_hf(hf_config), **types)
    format = None if quantization is None else FORMATS[quantization]
    module = load_weights(model, weights, None if mesh is None else shardings_by_path(model, mesh), format)
    return LoadedModel(
        module,
        hf_config,
        named if named.startswith(HUB) else path,
        generation=generation,
        left_out=weights.left_out,
        quantization=quantization,
        file_dtype=file_dtype_of(weights),
    )


def file_dtype_of(weights: TensorSource) -> str:
    """The type of a model's tensors in its files, as far as models are written in it; float32 for others."""
    own = str(weights.specs()[EMBEDDING].dtype)
    return own if own in ("float32", "bfloat16", "float16") else "float32"


def random_model(path: str, *, seed: int, dtype: str, param_dtype: str, remat: str = "none") -> LoadedModel:
    """A model of the sizes in config.json of `path`, with weights drawn from a seed."""
    hf_config = read_json(os.path.join(path, "config.json"))
    config = models.config_from_hf(hf_config)
    module = models.random_model(config, dtype=dtype, param_dtype=param_dtype, remat=remat, seed=seed)
    return LoadedModel(module, models.text_config(hf_config), path)


def hf_config_of(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face folder, a PEFT folder's base or a GGUF file, without loading weights.

    For a model that takes images too, the config.json of its language model as a text-only model.
    """
    if is_file(os.path.join(path, CONFIG)):
        base = hf_config_of(resolve(base_of(path)))
        return models.score_config(base) if is_score_adapter(path) else base
    return folder_config(path)


def is_score_adapter(folder: str) -> bool:
    """Whether a folder holds the PEFT adapter of a reward model."""
    config = os.path.join(folder, CONFIG)
    return is_file(config) and read_json(config).get("task_type") == SCORE_TASK


def resolve(path: str, revision: str | None = None) -> str:
    """The path to load from: hf:// names are fetched into the Hugging Face cache, run folders become their export."""
    if path.startswith(HUB):
        return fetch_hub(path, revision)
    path = local_path(path)
    if is_run_folder(path):
        for kind in (ADAPTER, MODEL, MERGED):
            if os.path.isdir(os.path.join(path, kind)):
                return os.path.join(path, kind)
        raise CheckpointError(
            f"run folder {path} has no adapter/ or model/ yet: `jaxft export --run={path} --to=FOLDER` writes one"
        )
    return path


def base_of(folder: str) -> str:
    """The base model that a PEFT folder names: a path that exists, or an address.

    Raises CheckpointError if it names none, or a local path that does not exist.
    """
    base = read_json(os.path.join(folder, CONFIG)).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder}: adapter_config.json does not say which base model it belongs to")
    for candidate in (base, os.path.join(folder, base)):
        if os.path.exists(candidate):
            return os.path.normpath(candidate)
    if base.startswith(HUB) or is_remote(base):
        return base
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base):
        raise CheckpointError(
            f"{folder} belongs to the base model {base!r}, which is not there. Set base_model_name_or_path in its "
            "adapter_config.json to the folder that holds it, or to owner/name on the Hugging Face hub."
        )
    return HUB + base


def shardings_by_path(model: Decoder, mesh: MeshPlan) -> dict[str, Any]:
    """The NamedSharding of every parameter by its path."""
    return flatten(mesh.shardings(nnx.state(model), storage_dims_of(model)), is_quantized)[0]
