"""One way in for every kind of model on disk."""

# B batch, S sequence, V vocab

import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.checkpoint import fused_experts, orbax_folder
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.hf import load_weights
from jaxft.checkpoint.peft import read_adapter
from jaxft.checkpoint.peft.folder import CONFIG
from jaxft.checkpoint.quantized import bitsandbytes
from jaxft.checkpoint.quantized.mxfp4 import Unpacked, is_packed
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource
from jaxft.checkpoint.text_part import TextPart
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.paths import HUB, fetch_hub, is_file, is_remote, open_folder, read_json
from jaxft.files.run_folder import ADAPTER, MERGED, MODEL, is_run_folder
from jaxft.models.nested import MULTIMODAL
from jaxft.nn.storage import storage_dims_of
from jaxft.nn.virtual import virtual_ids
from jaxft.quant import FORMATS, is_quantized
from jaxft.sharding.arrays import to_host
from jaxft.sharding.mesh import MeshPlan
from jaxft.trees import flatten


@dataclass
class LoadedModel:
    """A model in memory and where it came from.

    module: the nnx model. hf_config: its config.json. base: path of the base weights. adapter: path of
    the PEFT folder that was attached, or None. generation: its generation_config.json, where it has one, or what a
    GGUF file says of the same. left_out: where the base is nested in a model that takes images too, what of that was
    left out, in words. quantization: the format of its frozen kernels; None: they are dense.
    """

    module: Any
    hf_config: dict[str, Any]
    base: str
    adapter: str | None = None
    generation: dict[str, Any] | None = None
    left_out: str | None = None
    quantization: str | None = None

    def logits(self, tokens_BS: Any) -> np.ndarray:
        """[B, S, V] float32 for token ids [B, S], virtual ones left out. Raises ModelError for ids outside the
        vocabulary.
        """
        tokens = np.asarray(tokens_BS)
        vocab = self.module.config.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ModelError(f"logits takes whole numbers [B, S], got {tokens.dtype} of shape {tokens.shape}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
            raise ModelError(f"token ids run from {tokens.min()} to {tokens.max()}; the vocabulary has {vocab}")
        _, state = nnx.split(self.module)
        return to_host(self._forward(state, tokens.astype(np.int32)))

    @cached_property
    def _forward(self) -> Any:
        graphdef, _ = nnx.split(self.module)

        def forward(state: Any, tokens_BS: jax.Array) -> jax.Array:
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
) -> LoadedModel:
    """A Hugging Face, PEFT (with its base), Orbax or run folder, a GGUF file, or hf://owner/name[@revision].

    A Hugging Face folder may also be at an address such as gs://bucket/model, of which only what this
    process needs is read.
    dtype: of computation. param_dtype: of storage, dtype where None. mesh: where the parameters go,
    one device where None. quantization: a name of `quant.FORMATS`, in which the kernels of linear layers are kept
    from the moment that they are read. trainable: patterns of what training is to move, float32 then; see
    `models.freezing`. Raises CheckpointError or ModelError for what is not understood or damaged.
    """
    types = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
    types |= {"quantization": quantization, "trainable": trainable}
    named, path = path, resolve(path, revision)
    if is_file(os.path.join(path, CONFIG)):
        base = base_of(path)
        loaded = load_model(base, revision=revision, mesh=mesh, **types)
        read_adapter(loaded.module, path)
        if mesh is not None:
            mesh.shard_module(loaded.module)
        loaded.adapter = path
        return loaded
    hf_config, source, generation = open_weights(path)
    model = models.abstract_model(models.config_from_hf(hf_config), **types)
    format = None if quantization is None else FORMATS[quantization]
    module = load_weights(model, source, None if mesh is None else shardings_by_path(model, mesh), format)
    base = named if named.startswith(HUB) else path
    return LoadedModel(
        module, hf_config, base, generation=generation, left_out=left_out(source), quantization=quantization
    )


def random_model(path: str, *, seed: int, dtype: str, param_dtype: str, remat: str = "none") -> LoadedModel:
    """The shapes of config.json in `path` with weights drawn from a seed."""
    hf_config = read_json(os.path.join(path, "config.json"))
    config = models.config_from_hf(hf_config)
    module = models.random_model(config, dtype=dtype, param_dtype=param_dtype, remat=remat, seed=seed)
    return LoadedModel(module, models.text_config(hf_config), path)


def hf_config_of(path: str) -> dict[str, Any]:
    """config.json of a Hugging Face folder, a PEFT folder's base or a GGUF file, without loading weights.

    Of a model that takes images too, the config.json that its language model would have alone.
    """
    if is_file(os.path.join(path, CONFIG)):
        return hf_config_of(resolve(base_of(path)))
    return open_weights(path)[0] if path.endswith(".gguf") else _config_and_part(path)[0]


def open_weights(path: str) -> tuple[dict[str, Any], TensorSource, dict[str, Any] | None]:
    """(config.json, tensors, generation_config.json or None) of a folder or GGUF file, no tensor read yet.

    Of a model that takes images too, those of its language model, as if it were alone; see `left_out`.
    """
    if path.endswith(".gguf"):
        source = GGUFFile(path)
        return source.hf_config(), source, source.generation_config()
    hf_config, source = _config_and_part(path)
    generation = os.path.join(path, "generation_config.json")
    if source is None:
        source = orbax_folder.OrbaxFolder(path) if orbax_folder.is_one(path) else SafetensorsFolder(path)
    source = Unpacked(source) if is_packed(hf_config) else source
    source = bitsandbytes.FourBit(source) if bitsandbytes.is_packed(source) else source
    if fused_experts.is_fused(hf_config.get("model_type"), source):
        source = fused_experts.SingleExperts(source, hf_config["model_type"])
    return hf_config, source, read_json(generation) if is_file(generation) else None


def left_out(source: TensorSource) -> str | None:
    """What `open_weights` left out of a folder, in words; None where it is all there."""
    return source.left_out if isinstance(source, TextPart) else None


def _config_and_part(path: str) -> tuple[dict[str, Any], TextPart | None]:
    """config.json of a folder; where its language model is nested, that of the language model and its tensors."""
    config = os.path.join(path, "config.json")
    if not is_file(config):
        there = ", ".join(open_folder(path).names()[:8]) if "://" in path or os.path.isdir(path) else "nothing"
        raise CheckpointError(f"{path} is not a model: no config.json and not a .gguf file (there: {there})")
    hf_config = bitsandbytes.without_quantization(read_json(config))
    if hf_config.get("model_type") not in MULTIMODAL:
        return hf_config, None
    # Before any file of weights is opened.
    models.config_from_hf(hf_config)
    part = TextPart(SafetensorsFolder(path), hf_config["model_type"])
    return models.text_config(hf_config, own_head=part.own_head()), part


def resolve(path: str, revision: str | None = None) -> str:
    """A local path: hf:// names through the Hugging Face cache, run folders to what they exported."""
    if path.startswith(HUB):
        return fetch_hub(path, revision)
    if is_run_folder(path):
        for kind in (ADAPTER, MODEL, MERGED):
            if os.path.isdir(os.path.join(path, kind)):
                return os.path.join(path, kind)
        raise CheckpointError(
            f"run folder {path} has no adapter/ or model/ yet: `jaxft export --run={path} --to=FOLDER` writes one"
        )
    return path


def base_of(folder: str) -> str:
    """The base model that a PEFT folder names: a path that exists, or the address that it names."""
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


def shardings_by_path(model: nnx.Module, mesh: MeshPlan) -> dict[str, Any]:
    """The NamedSharding of every parameter by its path."""
    return flatten(mesh.shardings(nnx.state(model), storage_dims_of(model)), is_quantized)[0]
