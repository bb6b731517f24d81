"""Hugging Face weights read into a model and written from one, at most one tensor in host memory at a time."""

# L stacked layers, I inputs, O outputs

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import merge_functions
from jaxft.checkpoint.finite import FiniteSource
from jaxft.checkpoint.folders.weights import nf4_codes
from jaxft.checkpoint.quantized.on_load import quantized_array
from jaxft.checkpoint.safetensors_writer import Index, LazyTensor, gather_sharded, write_sharded
from jaxft.checkpoint.tensors import TensorSource, TensorSpec, block_bounds
from jaxft.data.tokenizers.end_tokens import with_end_tokens
from jaxft.errors import CheckpointError, listed
from jaxft.files.atomic import write_text
from jaxft.files.paths import read_json as read_json
from jaxft.models.family import ROPE_FIELDS, FamilyConfig
from jaxft.models.hf_fields import DENSE_TENSORS, without_allowed
from jaxft.models.tensor_map import ParamTensors, Piece, iter_params
from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import Constant
from jaxft.nn.stack import group_layers
from jaxft.quant import Format, QuantizedArray, dense, is_quantized
from jaxft.sharding.arrays import host_parts
from jaxft.sharding.processes import is_primary
from jaxft.trees import flatten

MAX_SHARD_BYTES = 5 * 10**9
NOT_WEIGHTS = "iubc"  # kinds of NumPy types: whole numbers, truth values, complex numbers
Bounds = tuple[tuple[int, int], ...]  # (start, stop) along every axis
SQUARE = 256  # of 2-byte elements, 128 KB: two of them fit into the cache of a core
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def param_tensors(model: Decoder) -> dict[str, ParamTensors]:
    """Every base parameter of a model by path, with the Hugging Face tensors that it consists of."""
    groups, config = group_layers(model.segments), cast(FamilyConfig, model.config)  # the base of every family's
    return {param.path: param for param in iter_params(config.tensors(), groups)}


def load_weights(
    model: Decoder,
    source: TensorSource,
    shardings: Mapping[str, Any] | None = None,
    format: Format | None = None,
) -> Decoder:
    """The abstract model with the source's weights, cast to the parameter types that the model declares.

    model: from `models.abstract_model`. format: of its quantised kernels. shardings: NamedSharding by path (for a
    quantised kernel one for each of its arrays); one device if None. Only the slices that this process's devices hold
    are read, parameter by parameter: host memory beyond the arrays stays below one parameter's part in this process
    plus one tensor of the source.
    Raises CheckpointError listing every missing, unexpected and misshapen tensor before any is read, and for a tensor
    with NaN or infinite values when it is read.
    """
    graphdef, state = nnx.split(model)
    leaves, treedef = flatten(state, is_quantized)
    table = param_tensors(model)
    check_tensors(leaves, table, source)
    codes, finite = nf4_codes(source), FiniteSource(source)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays: list[jax.Array | QuantizedArray] = []
    for path, leaf in leaves.items():
        sharding = jax.tree.map(lambda _: device, leaf) if shardings is None else shardings[path]
        if format is not None and isinstance(leaf, QuantizedArray):
            arrays.append(quantized_array(table[path], finite, leaf, sharding, format, _load_param, codes))
        else:
            arrays.append(_load_param(table[path], finite, leaf, sharding))
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


def check_tensors(leaves: Mapping[str, Any], table: Mapping[str, ParamTensors], source: TensorSource) -> None:
    """Raises CheckpointError unless the source has exactly the tensors of the table, in the right shapes.

    A tensor of whole numbers is refused too. leaves: our parameters by path. table: from `param_tensors`.
    """
    specs = source.specs()
    expected = {
        piece.hf: hf_shape(param, piece, leaves[path].shape) for path, param in table.items() for piece in param.pieces
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
    whole = [
        f"no weights in {name}: the file has {specs[name].dtype}, and weights have a type with fractions"
        for name in expected
        if name in specs and specs[name].dtype.kind in NOT_WEIGHTS
    ]
    problems = missing + misshapen + unexpected + whole
    if problems:
        lines = listed(problems, 40, lines=True)
        raise CheckpointError(f"the weights do not fit config.json ({len(problems)} tensors):\n{lines}")


def hf_tensors(model: Decoder, dtype: str | None = None) -> dict[str, LazyTensor]:
    """Every Hugging Face tensor of a model, or a block of it, computed when called; adapters are merged in float32.

    dtype: of the written tensors, the parameters' own if None; constants always have their own.
    """
    leaves, _ = flatten(nnx.state(model), is_quantized)
    constants = flatten(nnx.state(model, Constant))[0]
    merging, out = merge_functions(model), {}
    for path, param in param_tensors(model).items():
        leaf = leaves[path]
        # A quantised kernel is written in the dtype of computation.
        own = model.dtype if is_quantized(leaf) else leaf.dtype
        target = np.dtype(own if dtype is None or path in constants else dtype)
        for piece in param.pieces:
            shape = hf_shape(param, piece, leaf.shape)
            out[piece.hf] = (TensorSpec(shape, target), _maker(leaf, merging.get(path), param, piece, target))
    return out


def write_weights(
    model: Decoder, folder: str, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Writes model.safetensors, or shards and their index above max_shard_bytes. Returns the file names.

    Host memory beyond the arrays stays below two blocks of a tensor (`safetensors_writer.BLOCK_BYTES`) for every model.
    If the parameters span several processes, every one takes part, and every device holds one block at a time; process
    0 writes.
    """
    config = cast(FamilyConfig, model.config)
    tensors = {config.in_files(name): tensor for name, tensor in hf_tensors(model, dtype).items()}
    if not is_primary():
        return gather_sharded(tensors, max_bytes=max_shard_bytes)
    return write_sharded(folder, tensors, max_bytes=max_shard_bytes, metadata={"format": "pt"})


def write_config(
    folder: str, hf_config: Mapping[str, Any], *, dtype: str, generation: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json, its rope in the dialects of transformers 4 and 5, and generation_config.json."""
    # Both names: transformers 4 reads torch_dtype, 5 reads dtype. Weights that were packed in the source are no longer
    # packed, and code that auto_map names is never run.
    replaced = ("torch_dtype", "dtype", "quantization_config", DENSE_TENSORS, "auto_map")
    config = {k: v for k, v in without_allowed(hf_config).items() if k not in replaced} | {"torch_dtype": dtype}
    if any(config.get(name) is not None for name in ROPE_FIELDS):
        # Without the architecture, whose head says nothing of ropes.
        config |= models.config_from_hf({**hf_config, "architectures": None}).rope_fields()
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation or with_end_tokens(None, config)),
    ):
        write_text(os.path.join(folder, name), json.dumps(value, indent=2) + "\n")


def hf_shape(param: ParamTensors, piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of our parameter of shape `shape`."""
    return param.transform.hf_shape(shape[len(piece.at) :])


def _tied_copy(name: str, expected: Mapping[str, Any], source: TensorSource) -> bool:
    # Some writers also store the head of a tied model; it must then equal the embedding.
    if name != TIED_HEAD or TIED_HEAD in expected or EMBEDDING not in source.specs():
        return False
    head, table = source.specs()[TIED_HEAD], source.specs()[EMBEDDING]
    rows = range(0, head.shape[0], 4096)
    return head.shape == table.shape and all(
        np.array_equal(source.read(TIED_HEAD, (slice(r, r + 4096),)), source.read(EMBEDDING, (slice(r, r + 4096),)))
        for r in rows
    )


def _load_param(param: ParamTensors, source: TensorSource, leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """One of our parameters on this process's devices."""
    indices = sharding.addressable_devices_indices_map(leaf.shape)
    cuts = {device: _bounds(index or (), leaf.shape) for device, index in indices.items()}
    blocks = read_blocks(param, source, leaf.dtype, set(cuts.values()))
    arrays, last = [], {cut: device for device, cut in cuts.items()}
    for device, cut in cuts.items():
        # A block is freed as soon as its last device has it.
        block = blocks.pop(cut) if last[cut] is device else blocks[cut]
        arrays.append(jax.device_put(block, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def read_blocks(
    param: ParamTensors, source: TensorSource, dtype: np.dtype, cuts: Iterable[Bounds]
) -> dict[Bounds, np.ndarray]:
    """Parts of one of our parameters, each given as (start, stop) along every axis.

    Each tensor is read once, even if every part has different columns of it, and only the range that the parts span;
    a tensor of more than two axes is read one matrix at a time.
    """
    blocks = {cut: np.empty([stop - start for start, stop in cut], dtype) for cut in cuts}
    for piece in param.pieces:
        inside = {cut: inner for cut in blocks if (inner := _in_piece(cut, piece)) is not None}
        if not inside:
            continue
        hull = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*inside.values(), strict=True))
        for slab in _slabs(hull):
            index = param.transform.hf_index(tuple(slice(*axis) for axis in slab))
            values = param.transform.from_hf(source.read(piece.hf, index))
            for cut, inner in inside.items():
                common = tuple((max(a, low), min(b, high)) for (a, b), (low, high) in zip(inner, slab, strict=True))
                if all(a < b for a, b in common):
                    inside_block = tuple(at - start for at, (start, _) in zip(piece.at, cut, strict=False))
                    out = _view(blocks[cut], (*inside_block, *_within(common, inner)))
                    copy_into(out, _view(values, _within(common, slab)))
    return blocks


def _slabs(hull: Bounds) -> Iterator[Bounds]:
    """A vector or matrix as a whole; experts that a file keeps in one tensor one after the other."""
    if len(hull) < 3:
        yield hull
        return
    for i in range(*hull[0]):
        yield ((i, i + 1), *hull[1:])


def _within(cut: Bounds, whole: Bounds) -> tuple[slice, ...]:
    return tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(cut, whole, strict=True))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _in_piece(cut: Bounds, piece: Piece) -> Bounds | None:
    """The part of a piece that is in a block, None if there is none."""
    leading = zip(piece.at, cut, strict=False)
    return cut[len(piece.at) :] if all(start <= at < stop for at, (start, stop) in leading) else None


def _view(array: np.ndarray, index: tuple[Any, ...]) -> np.ndarray:
    """A part of an array as a view of it, even if it is a single number."""
    return array[(*index, ...)]


def copy_into(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, cast, for matrices of any size and either order of axes.

    It copies squares, because a transposed copy of the whole misses the cache at every element. If the dtypes are equal
    it copies plain bits, because NumPy copies bfloat16 one element at a time.
    """
    if out.dtype == values.dtype and out.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, values = out.view(bits), values.view(bits) if values.flags.c_contiguous else values.T.view(bits).T
    if out.ndim != 2 or values.flags.c_contiguous:
        out[...] = values
        return
    rows, columns = out.shape
    for i in range(0, rows, SQUARE):
        for j in range(0, columns, SQUARE):
            out[i : i + SQUARE, j : j + SQUARE] = values[i : i + SQUARE, j : j + SQUARE]


def _maker(
    leaf: jax.Array, merge: Callable[..., jax.Array] | None, param: ParamTensors, piece: Piece, dtype: np.dtype
) -> Callable[..., np.ndarray]:
    shape, transform = hf_shape(param, piece, leaf.shape), param.transform

    def make(index: Index | None = None) -> np.ndarray:
        bounds = block_bounds(shape, index)
        out = np.empty([stop - start for start, stop in bounds], dtype)
        whole, at = leaf, piece.at
        if merge is not None or is_quantized(leaf):
            # The whole matrix, on the devices: an adapter's change of a block may depend on all of it.
            whole, at = dense(leaf[piece.at], jnp.float32), ()
        if merge is not None:
            whole = merge(whole, piece.at)
        leading = [(i, i + 1) for i in at]
        for inside, part in host_parts(whole, (*leading, *transform.our_bounds(bounds)), dtype):
            matrix = part.reshape(part.shape[len(at) :])
            copy_into(_view(out, transform.hf_index(inside[len(at) :])), transform.to_hf(matrix))
        return out

    return make
