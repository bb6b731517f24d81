"""Maps between Hugging Face's tensors and our stacked parameters, in both directions."""

# L stacked layers, I inputs, O outputs

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Transform:
    """How a tensor's layout differs between Hugging Face's files and our parameters. The base class: not at all."""

    def hf_index(self, index: Index) -> Index:
        """The part of the Hugging Face tensor that is our part `index`."""
        return index

    def our_bounds(self, bounds: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """(start, stop) along our axes for a part of the Hugging Face tensor given as (start, stop) along its axes."""
        return tuple(bounds)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the Hugging Face tensor of our shape."""
        return shape

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """Our layout of Hugging Face's values."""
        return array

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Hugging Face's layout of our values."""
        return array


@dataclass(frozen=True)
class Transpose(Transform):
    """Hugging Face stores linear layers as [O, I]; ours are [I, O]."""

    def hf_index(self, index: Index) -> Index:
        return index[::-1]

    def our_bounds(self, bounds: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple(bounds[::-1])

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.T

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.T


@dataclass(frozen=True)
class TransposeEach(Transform):
    """Hugging Face stores the experts of a layer as [E, O, I]; ours are [E, I, O]."""

    def hf_index(self, index: Index) -> Index:
        return (index[0], *index[:0:-1])

    def our_bounds(self, bounds: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return (bounds[0], *bounds[:0:-1])

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], *shape[:0:-1])

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2)


@dataclass(frozen=True)
class OneRow(Transform):
    """Hugging Face stores a linear layer with one output as [1, I]; ours is the vector [I]."""

    def hf_index(self, index: Index) -> Index:
        return (slice(None), *index)

    def our_bounds(self, bounds: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple(bounds[1:])

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape)

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array[0]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array[None]


@dataclass(frozen=True)
class Depthwise(Transform):
    """Hugging Face stores a depthwise convolution as [C, 1, W], C channels of W taps; ours is [W, C]."""

    def hf_index(self, index: Index) -> Index:
        return (index[1], slice(None), index[0])

    def our_bounds(self, bounds: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return (bounds[2], bounds[0])

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[1], 1, shape[0])

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array[:, 0].T

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.T[:, None]


SAME = Transform()
TRANSPOSED = Transpose()
EACH_TRANSPOSED = TransposeEach()
ONE_ROW = OneRow()
DEPTHWISE = Depthwise()


@dataclass(frozen=True)
class TensorMap:
    """One line of a family's table.

    hf: for example `model.layers.{i}.mlp.up_proj.weight`. path: `layers/*/mlp/up_proj/kernel`, where `*` is the index
    of the stack with layer i. experts: the number of tensors `{e}` of a layer, None without `{e}` in hf. layers: the
    layers that have it, None for all.
    """

    hf: str
    path: str
    transform: Transform = SAME
    experts: int | None = None
    layers: frozenset[int] | None = None

    @property
    def stacked(self) -> bool:
        """Whether our parameter has a leading layer axis."""
        return "{i}" in self.hf


def linear(hf_module: str, path: str, *, bias: bool = False) -> tuple[TensorMap, ...]:
    """The table's lines for a linear layer."""
    kernel = TensorMap(f"{hf_module}.weight", f"{path}/kernel", TRANSPOSED)
    return (kernel, TensorMap(f"{hf_module}.bias", f"{path}/bias")) if bias else (kernel,)


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor of one of our parameters.

    at: its index on the leading axes: () if it is the whole parameter, (index in the stack,) in a stack,
    (index in the stack, expert) among experts.
    """

    hf: str
    at: tuple[int, ...] = ()

    @property
    def layer(self) -> int | None:
        """Its index in the stack, None for a parameter without one."""
        return self.at[0] if self.at else None


@dataclass(frozen=True)
class ParamTensors:
    """One of our parameters and the Hugging Face tensors that it consists of."""

    path: str
    transform: Transform
    pieces: tuple[Piece, ...]


def iter_params(tensors: Sequence[TensorMap], groups: Sequence[Sequence[int]]) -> Iterator[ParamTensors]:
    """Every parameter of a model with the table `tensors` and the layer numbers `groups` in its stacks."""
    for line in tensors:
        if not line.stacked:
            yield ParamTensors(line.path, line.transform, (Piece(line.hf),))
            continue
        for g, layers in enumerate(groups):
            if line.layers is not None and line.layers.isdisjoint(layers):  # layers of one stack are alike
                continue
            pieces = tuple(piece for index, i in enumerate(layers) for piece in _pieces(line, index, i))
            yield ParamTensors(line.path.replace("*", str(g)), line.transform, pieces)


def unstacked_params(tensors: Sequence[TensorMap], layers: int) -> Iterator[ParamTensors]:
    """Every parameter of a model of `layers` layers as if each layer were a stack of its own."""
    return iter_params(tensors, [(layer,) for layer in range(layers)])


def tensor_names(tensors: Sequence[TensorMap], layers: int) -> frozenset[str]:
    """Hugging Face's names of all tensors of a model of `layers` layers."""
    return frozenset(piece.hf for param in unstacked_params(tensors, layers) for piece in param.pieces)


def _pieces(line: TensorMap, stack_index: int, layer: int) -> Iterator[Piece]:
    if line.experts is None:
        yield Piece(line.hf.format(i=layer), (stack_index,))
        return
    for e in range(line.experts):
        yield Piece(line.hf.format(i=layer, e=e), (stack_index, e))
