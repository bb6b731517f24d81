"""A model in Orbax's format: `params/` under our own paths, beside config.json and the tokenizer.

    orbax.checkpoint.StandardCheckpointer().restore(folder / "params")    # a nested dict of arrays

It is also a source of tensors under Hugging Face names, read piece by piece straight from the arrays
on disk (zarr, one folder for each parameter), so that everything that reads a model reads this too.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.checkpoint import manifest
from jaxft.checkpoint.hf import hf_shape, param_tensors
from jaxft.checkpoint.tensors import TensorSpec, block_bounds
from jaxft.errors import CheckpointError, did_you_mean
from jaxft.files.paths import read_json
from jaxft.models.tensor_map import ParamTensors, Piece
from jaxft.trees import flatten

PARAMS = "params"
CONCURRENT_GB = 2  # in flight while saving, beyond the arrays themselves


def is_orbax_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a local folder is an Orbax model as written here."""
    return os.path.isdir(os.path.join(path, PARAMS)) and os.path.isfile(os.path.join(path, "config.json"))


def write_params(model: nnx.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `params/` of a model without adapters, sharded or not; config.json is the caller's.

    Every process takes part. Host memory beyond the arrays stays below a few GB whatever the size.
    """
    # Imported here: most commands never write Orbax.
    import orbax.checkpoint as ocp

    leaves, _ = flatten(nnx.state(model))
    arrays = _nested(leaves.items())
    args = jax.tree.map(
        lambda leaf: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(leaf), shard_axes=tuple(range(max(1, leaf.ndim - 2)))),
        arrays,
    )
    # One folder for each array, rather than OCDBT's shared database: any zarr reader finds its way.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, save_concurrent_gb=CONCURRENT_GB)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(folder).absolute() / PARAMS, ocp.args.PyTreeSave(arrays, save_args=args))


class OrbaxFolder:
    """The parameters in `params/` of a folder, as Hugging Face tensors.

    Raises CheckpointError, before any tensor is read, where files are damaged or missing by the manifest
    that ends the writing, or where `params/` is not what config.json says; ModelError for its family.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        manifest.verify(self.path)
        model = models.abstract_model(models.config_from_hf(read_json(os.path.join(self.path, "config.json"))))
        leaves, _ = flatten(nnx.state(model))
        self._pieces: dict[str, tuple[ParamTensors, Piece]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._stores: dict[str, Any] = {}
        for path, placed in param_tensors(model).items():
            shape, dtype = self._metadata(path)
            if shape != leaves[path].shape:
                raise CheckpointError(f"{self.path}: {path} has shape {list(shape)}, config {list(leaves[path].shape)}")
            for piece in placed.pieces:
                self._pieces[piece.hf] = (placed, piece)
                self._specs[piece.hf] = TensorSpec(hf_shape(placed, piece, shape), dtype)

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor under its Hugging Face name."""
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        if name not in self._pieces:
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self._pieces)}")
        placed, piece = self._pieces[name]
        cuts = tuple(slice(*cut) for cut in block_bounds(self._specs[name].shape, index))
        # A transform that turns axes around turns an index back in the same way.
        inner = placed.transform.hf_index(cuts)
        return placed.transform.to_hf(self._store(placed.path)[(*piece.at, *inner)].read().result())

    def _metadata(self, path: str) -> tuple[tuple[int, ...], np.dtype]:
        file = os.path.join(self.path, PARAMS, _folder_of(path), ".zarray")
        try:
            with open(file, encoding="utf-8") as opened:
                found = json.load(opened)
            return tuple(found["shape"]), np.dtype(found["dtype"])
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: parameter {path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} does not describe an array: {error}") from error

    def _store(self, path: str) -> Any:
        if path not in self._stores:
            import tensorstore

            store = {"driver": "file", "path": os.path.join(os.path.abspath(self.path), PARAMS, _folder_of(path))}
            self._stores[path] = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
        return self._stores[path]


def _chunk_bytes(leaf: jax.Array) -> int:
    """One layer of a stack, or one row of a table, but not less than a file system likes: what is read at least.

    Of experts it is one matrix, since that is how they are read.
    """
    part = leaf.addressable_shards[0].data
    return max(part.nbytes // max(1, part.shape[0]), 2**20)


def _folder_of(path: str) -> str:
    return path.replace("/", ".")  # as Orbax names them


def _nested(leaves: Iterable[tuple[str, Any]]) -> Mapping[str, Any]:
    out: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        inner = out
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return out
