"""Weights that bitsandbytes quantised to NF4, as transformers saves them: read dense, or their codes taken over.

A tensor NAME of shape [O, I] is kept as the bytes NAME [O I / 2, 1], two codes each, the first in the high bits. The
bytes may be stored as elements of a wider type, bnb_4bit_quant_storage, so that FSDP can split them with others. Its
scales as NAME.absmax, float32 [O I / 64] or, if they are double-quantised, codes of the dynamic map with a float32
NAME.nested_absmax for each 256; and NAME.quant_state.bitsandbytes__nf4, JSON with the other settings. Source:
`QuantState.as_dict` of bitsandbytes 0.50.
"""

# O outputs, I inputs, N blocks of 64 inputs, G groups of 256 scales

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxft.checkpoint.safetensors_writer import Index
from jaxft.checkpoint.tensors import DTYPES, TensorSource, TensorSpec, block_bounds
from jaxft.errors import CheckpointError, listed
from jaxft.files.paths import json_object
from jaxft.quant.dynamic import dynamic_map
from jaxft.quant.nf4 import BLOCK, LEVELS, NF4
from jaxft.quant.nibbles import pack
from jaxft.quant.scales import GROUP, CompressedScales

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
STORAGE = tuple(DTYPES[name] for name in ("U8", "I8", "BF16", "F16", "F32"))
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def problem_of(given: Mapping[str, Any]) -> str | None:
    """Why the weights under a quantization_config of bitsandbytes are not read; None if they are."""
    kind = given.get("bnb_4bit_quant_type") if given.get("load_in_4bit") else "int8"
    return None if kind == "nf4" else f"bitsandbytes kept its weights as {kind}, and only nf4 is read"


def is_packed(source: TensorSource) -> bool:
    """Whether any tensor of a source is in this format."""
    return any(name.endswith(STATE) for name in source.specs())


class NF4Source:
    """A source whose NF4 tensors appear in their original shape and dtype.

    Raises CheckpointError listing those with parts that are missing or do not fit each other, before any weight is
    read.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source, specs = source, source.specs()
        self._states: dict[str, dict[str, Any]] = {}
        problems = []
        for state_name in specs:
            if state_name.endswith(STATE):
                name = state_name.removesuffix(STATE)
                state = _state(source, state_name)
                self._states[name] = state
                problems += [f"{name}: {problem}" for problem in _problems(name, state, specs)]
        if problems:
            lines = listed(problems, 20, lines=True)
            raise CheckpointError(f"{len(problems)} tensors are not whole in bitsandbytes' NF4:\n{lines}")

    def specs(self) -> dict[str, TensorSpec]:
        out = {}
        for name, spec in self._source.specs().items():
            if name in self._states:
                state = self._states[name]
                out[name] = TensorSpec(tuple(state["shape"]), DTYPES[DTYPE_NAMES[state["dtype"]]])
            elif not any(name.endswith(part) and name.removesuffix(part) in self._states for part in PARTS):
                out[name] = spec
        return out

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._states:
            return self._source.read(name, index)
        rows, columns = block_bounds(self.specs()[name].shape, index)
        scales_ON = self._expanded(name, rows)
        values = LEVELS[self.codes(name, rows)].reshape(rows[1] - rows[0], -1, BLOCK) * scales_ON[..., None]
        return values.reshape(rows[1] - rows[0], -1)[:, slice(*columns)].astype(self.specs()[name].dtype)

    def is_nf4(self, name: str) -> bool:
        """Whether a tensor is kept as NF4."""
        return name in self._states

    def codes(self, name: str, rows: tuple[int, int]) -> np.ndarray:
        """uint8 [O, I] below 16, of the outputs in `rows`."""
        width = self.specs()[name].shape[1] // 2
        # A row is a multiple of 32 bytes, so it consists of whole elements of every storage type.
        size = self._source.specs()[name].dtype.itemsize
        cut = slice(rows[0] * width // size, rows[1] * width // size)
        pairs = self._source.read(name, (cut,)).view(np.uint8).reshape(-1, width)
        return np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(len(pairs), -1)

    def scales(self, name: str, rows: tuple[int, int]) -> np.ndarray:
        """[O, N] of the outputs in `rows`: float32, or uint8 codes if they are double-quantised."""
        count = self.specs()[name].shape[1] // BLOCK
        return self._source.read(f"{name}.absmax", (slice(rows[0] * count, rows[1] * count),)).reshape(-1, count)

    def nested(self, name: str) -> tuple[np.ndarray, np.float32] | None:
        """(largest float32 [G], mean) of double-quantised scales; None if they are not double-quantised."""
        if "nested_offset" not in self._states[name]:
            return None
        return self._source.read(f"{name}.nested_absmax"), np.float32(self._states[name]["nested_offset"])

    def _expanded(self, name: str, rows: tuple[int, int]) -> np.ndarray:
        scales_ON, nested = self.scales(name, rows), self.nested(name)
        if nested is None:
            return scales_ON
        largest, mean = nested
        first = rows[0] * scales_ON.shape[1]
        groups = (first + np.arange(scales_ON.size)) // GROUP
        return dynamic_map(signed=True)[scales_ON] * largest[groups].reshape(scales_ON.shape) + mean


def load_nf4(source: NF4Source, name: str, sharding: Sharding) -> NF4:
    """A kernel [I, O] with the codes of the file, on this process's devices. sharding: of the kernel."""
    outputs, inputs = source.specs()[name].shape

    def codes(index: Index | None) -> np.ndarray:
        index = index or (slice(None), slice(None))
        rows = index[1].indices(outputs)[:2]
        return np.asarray(pack(jnp.asarray(source.codes(name, rows).T)))[index[0]]

    def scales(index: Index | None) -> np.ndarray:
        index = index or (slice(None), slice(None))
        return np.ascontiguousarray(source.scales(name, index[1].indices(outputs)[:2]).T[index[0]])

    kept = jax.make_array_from_callback((inputs // 2, outputs), sharding, codes)
    block_scales = jax.make_array_from_callback((inputs // BLOCK, outputs), sharding, scales)
    nested = source.nested(name)
    if nested is None:
        return NF4(kept, block_scales)
    everywhere = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding
    largest, mean = (
        jax.make_array_from_callback(part.shape, everywhere, part.__getitem__) for part in map(np.asarray, nested)
    )
    return NF4(kept, CompressedScales(block_scales, largest, mean))


def _state(source: TensorSource, state_name: str) -> dict[str, Any]:
    return json_object(source.read(state_name).tobytes(), state_name)


def _problems(name: str, state: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> list[str]:
    shape = state.get("shape")
    if state.get("blocksize") != BLOCK or state.get("nested_blocksize", GROUP) != GROUP:
        sizes = f"{state.get('blocksize')} weights and {state.get('nested_blocksize', GROUP)} scales"
        return [f"has blocks of {sizes}; only {BLOCK} and {GROUP} are read"]
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] % BLOCK or state.get("dtype") not in DTYPE_NAMES:
        types = ", ".join(DTYPE_NAMES)
        return [f"shape {shape} of {state.get('dtype')} is not a matrix of {types} whose rows divide by {BLOCK}"]
    size, nested = shape[0] * shape[1], "nested_offset" in state
    storage = specs[name].dtype if name in specs and specs[name].dtype in STORAGE else np.dtype(np.uint8)
    codes = ((size // 2 // storage.itemsize, 1), str(storage))
    wanted = {"": codes, ".absmax": ((size // BLOCK,), "uint8" if nested else "float32")}
    if nested:
        wanted[".nested_absmax"] = ((-(-size // BLOCK // GROUP),), "float32")
    return [
        f"{name}{part} is {_describe(specs.get(name + part))}, not {list(shape)} {dtype}"
        for part, (shape, dtype) in wanted.items()
        if specs.get(name + part) != TensorSpec(shape, np.dtype(dtype))
    ]


def _describe(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{list(spec.shape)} {spec.dtype}"
