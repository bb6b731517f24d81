"""A model in Orbax's format: `params/` under our own paths, with config.json and the tokenizer in the same folder.

    orbax.checkpoint.StandardCheckpointer().restore(folder / "params")    # a nested dict of arrays

Such a folder is also a source of tensors under Hugging Face names, read in blocks from the arrays on disk (zarr, one
folder for each parameter), so that everything that reads a model reads this too.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.checkpoint import manifest
from jaxft.checkpoint.hf import hf_shape, param_tensors
from jaxft.checkpoint.plain_path import PlainFolder
from jaxft.checkpoint.tensors import TensorSpec, block_bounds
from jaxft.errors import CheckpointError, did_you_mean
from jaxft.files.paths import check_links, read_json
from jaxft.files.strict_json import parse_json
from jaxft.models.tensor_map import ParamTensors, Piece
from jaxft.nn.decoder import Decoder
from jaxft.trees import flatten

PARAMS = "params"
CONCURRENT_GB = 2  # in flight while saving, beyond the arrays themselves


def is_orbax_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a local folder is an Orbax model that `write_params` wrote."""
    return os.path.isdir(os.path.join(path, PARAMS)) and os.path.isfile(os.path.join(path, "config.json"))


def write_params(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Writes `params/` of a model without adapters, sharded or not; the caller writes config.json.

    Every process takes part. Host memory beyond the arrays stays below a few GB for models of every size.
    """
    # Imported here: most commands never write Orbax.
    import orbax.checkpoint as ocp

    leaves, _ = flatten(nnx.state(model))
    arrays = _nested(leaves.items())
    args = jax.tree.map(
        lambda leaf: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(leaf), shard_axes=tuple(range(max(1, leaf.ndim - 2)))),
        arrays,
    )
    plain = PlainFolder(folder)
    # One folder for each array instead of OCDBT's shared database, so that any zarr reader can read it.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, save_concurrent_gb=CONCURRENT_GB)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(plain.path / PARAMS, ocp.args.PyTreeSave(arrays, save_args=args))


class OrbaxFolder:
    """The parameters in `params/` of a folder, as Hugging Face tensors.

    Raises CheckpointError, before any tensor is read, if the manifest, which is written last, shows damaged or missing
    files, or if `params/` does not fit config.json; ModelError for a family that is not implemented.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        check_links(self.path)  # tensorstore opens the files by itself
        self._plain = PlainFolder(self.path)
        manifest.verify(self.path)
        model = models.abstract_model(models.config_from_hf(read_json(os.path.join(self.path, "config.json"))))
        leaves, _ = flatten(nnx.state(model))
        self._pieces: dict[str, tuple[ParamTensors, Piece]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._stores: dict[str, Any] = {}
        for path, param in param_tensors(model).items():
            shape, dtype = self._metadata(path)
            if shape != leaves[path].shape:
                raise CheckpointError(f"{self.path}: {path} has shape {list(shape)}, config {list(leaves[path].shape)}")
            for piece in param.pieces:
                self._pieces[piece.hf] = (param, piece)
                self._specs[piece.hf] = TensorSpec(hf_shape(param, piece, shape), dtype)

    def specs(self) -> dict[str, TensorSpec]:
        return dict(self._specs)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._pieces:
            raise CheckpointError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self._pieces)}")
        param, piece = self._pieces[name]
        cuts = tuple(slice(*cut) for cut in block_bounds(self._specs[name].shape, index))
        # A transform that reverses axes maps an index back in the same way.
        inner = param.transform.hf_index(cuts)
        try:
            block = self._store(param.path)[(*piece.at, *inner)].read().result()
        except (ValueError, OSError) as error:  # TensorStore's errors
            raise CheckpointError(
                f"{self.path}: parameter {param.path} cannot be read: {self._plain.own_names(str(error))[:500]}. Write "
                "the folder anew."
            ) from error
        return param.transform.to_hf(block)

    def _metadata(self, path: str) -> tuple[tuple[int, ...], np.dtype]:
        file = os.path.join(self.path, PARAMS, _folder_of(path), ".zarray")
        try:
            with open(file, "rb") as opened:
                metadata = parse_json(opened.read())
            return tuple(metadata["shape"]), np.dtype(metadata["dtype"])
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: parameter {path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} does not describe an array: {error}") from error

    def _store(self, path: str) -> Any:
        if path not in self._stores:
            import tensorstore

            store = {"driver": "file", "path": str(self._plain.path / PARAMS / _folder_of(path))}
            self._stores[path] = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
        return self._stores[path]


def _chunk_bytes(leaf: jax.Array) -> int:
    """Bytes of a chunk, the least that is read: one layer of a stack or one row of a table, but at least 1 MB.

    For experts it is one matrix, since they are read one at a time.
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
