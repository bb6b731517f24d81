"""Hugging Face weights into a model and out of it, one tensor in host memory at a time."""

# L stacked layers, I inputs, O outputs

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters
from jaxft.checkpoint.safetensors_writer import LazyTensor, write_sharded
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError
from jaxft.models.tensor_map import Piece, Placed, place
from jaxft.nn.stack import group_layers
from jaxft.trees import flatten

MAX_SHARD_BYTES = 5 * 10**9
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def placed_tensors(model: nnx.Module) -> dict[str, Placed]:
    """Every base parameter of a model by path, and the Hugging Face tensors that make it up."""
    groups = group_layers(model.segments)
    return {placed.path: placed for placed in place(model.config.tensors(), groups)}


def load_weights(model: nnx.Module, source: TensorSource, shardings: Mapping[str, Any] | None = None) -> nnx.Module:
    """The abstract model with the source's weights, cast to the parameter types that the model declares.

    model: from `models.abstract_model`. shardings: NamedSharding by path; one device where None. Only
    the slices that this process's devices hold are read, parameter by parameter.
    Raises CheckpointError listing every missing, unexpected and misshapen tensor, before reading any.
    """
    graphdef, state = nnx.split(model)
    leaves, treedef = flatten(state)
    table = placed_tensors(model)
    check_tensors(leaves, table, source)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = []
    for path, leaf in leaves.items():
        sharding = device if shardings is None else shardings[path]
        arrays.append(
            jax.make_array_from_callback(leaf.shape, sharding, lambda i, p=path, s=leaf: _block(table[p], source, s, i))
        )
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


def check_tensors(leaves: Mapping[str, Any], table: Mapping[str, Placed], source: TensorSource) -> None:
    """Raises CheckpointError unless the source has exactly the tensors of the table, in the right shapes."""
    specs = source.specs()
    expected = {
        piece.hf: placed.transform.hf_shape(_piece_shape(piece, leaves[path].shape))
        for path, placed in table.items()
        for piece in placed.pieces
    }
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in specs]
    misshapen = [
        f"misshapen {name}: file {list(specs[name].shape)}, config {list(shape)}"
        for name, shape in expected.items()
        if name in specs and specs[name].shape != shape
    ]
    unexpected = [
        f"unexpected {name} {list(spec.shape)}"
        for name, spec in specs.items()
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and not _tied_copy(name, expected, source)
    ]
    problems = missing + misshapen + unexpected
    if problems:
        shown = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise CheckpointError(f"the weights do not fit config.json ({len(problems)} tensors):\n  {shown}")


def hf_tensors(model: nnx.Module, dtype: str | None = None) -> dict[str, LazyTensor]:
    """Every Hugging Face tensor of a model, computed when called; adapters are merged in float32 on the way.

    dtype: stored type, the parameters' own where None.
    """
    leaves, _ = flatten(nnx.state(model))
    attached = {f"{path}/kernel": adapter for path, adapter in adapters(model).items()}
    out = {}
    for path, placed in placed_tensors(model).items():
        leaf = leaves[path]
        target = np.dtype(dtype or leaf.dtype)
        for piece in placed.pieces:
            shape = placed.transform.hf_shape(_piece_shape(piece, leaf.shape))
            out[piece.hf] = (TensorSpec(shape, target), _maker(leaf, attached.get(path), placed, piece, target))
    return out


def write_weights(
    model: nnx.Module, folder: str, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Writes model.safetensors, or shards and their index above max_shard_bytes. Returns the file names."""
    return write_sharded(folder, hf_tensors(model, dtype), max_bytes=max_shard_bytes, metadata={"format": "pt"})


def write_config(
    folder: str, hf_config: Mapping[str, Any], *, dtype: str, generation: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json and generation_config.json."""
    # Both names: transformers 4 reads torch_dtype, 5 reads dtype.
    config = {k: v for k, v in hf_config.items() if k not in ("torch_dtype", "dtype")} | {"torch_dtype": dtype}
    tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    for name, value in (("config.json", config), ("generation_config.json", generation or tokens)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")


def read_json(path: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _piece_shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if piece.layer is None else shape[1:]


def _tied_copy(name: str, expected: Mapping[str, Any], source: TensorSource) -> bool:
    # Some writers store the head of a tied model once more; it must then be the embedding.
    if name != TIED_HEAD or TIED_HEAD in expected or EMBEDDING not in source.specs():
        return False
    head, table = source.specs()[TIED_HEAD], source.specs()[EMBEDDING]
    rows = range(0, head.shape[0], 4096)
    return head.shape == table.shape and all(
        np.array_equal(source.read(TIED_HEAD, (slice(r, r + 4096),)), source.read(EMBEDDING, (slice(r, r + 4096),)))
        for r in rows
    )


def _block(placed: Placed, source: TensorSource, leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of one of our parameters."""
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, leaf.shape, strict=True)]
    cuts = tuple(slice(start, stop) for start, stop in bounds)
    out = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    for place_in_block, (piece, inner) in enumerate(_pieces_of(placed, cuts)):
        values = placed.transform.from_hf(source.read(piece.hf, placed.transform.hf_index(inner)))
        if piece.layer is None:
            out[...] = values
        else:
            out[place_in_block] = values
    return out


def _pieces_of(placed: Placed, cuts: tuple[slice, ...]) -> Iterator[tuple[Piece, tuple[slice, ...]]]:
    if placed.pieces[0].layer is None:
        yield placed.pieces[0], cuts
        return
    for piece in placed.pieces[cuts[0]]:
        yield piece, cuts[1:]


def _maker(leaf: jax.Array, adapter: Any, placed: Placed, piece: Piece, dtype: np.dtype) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        value = leaf if piece.layer is None else leaf[piece.layer]
        if adapter is not None:
            value = value.astype(jnp.float32) + adapter.delta(piece.layer)
        array = np.asarray(jax.device_get(value.astype(dtype)))
        return placed.transform.to_hf(array)

    return make
