"""How the values of a single tensor differ between Hugging Face's files and GGUF files."""

# C channels, W taps of a convolution, E experts

import numpy as np

from jaxft.checkpoint.gguf.family import Family
from jaxft.checkpoint.gguf.names import has_shifted_norm, heads_interleaved, interleave, require_tensor
from jaxft.models.family import FamilyConfig

CONVOLUTIONS = ("ssm_conv1d", "shortconv.conv")
CHOICE_BIAS = "exp_probs_b"


def file_shape(family: Family, config: FamilyConfig, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has in the file. tensor, shape: in Hugging Face's files."""
    part = require_tensor(family, tensor).part
    if part in CONVOLUTIONS and len(shape) == 3:  # [C, 1, W]
        return (shape[0], shape[2])
    return (shape[-1],) if part == CHOICE_BIAS else shape  # [1, E] in some families


def is_by_rows(family: Family, config: FamilyConfig, tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether the file has the rows of this matrix, perhaps in another order; then parts of it are read alone."""
    return len(shape) == 2 and file_shape(family, config, tensor, shape) == shape


def to_file(family: Family, config: FamilyConfig, tensor: str, values: np.ndarray) -> np.ndarray:
    """A whole float32 tensor as the file has it."""
    if has_shifted_norm(family, tensor):
        values = values + np.float32(1)
    if heads := heads_interleaved(family, tensor.rpartition(".")[0], config):
        values = interleave(values, heads)
    return values.reshape(file_shape(family, config, tensor, values.shape))


def from_file(
    family: Family, config: FamilyConfig, tensor: str, values: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """A whole tensor of the file as Hugging Face's files have it, in this shape."""
    values = values.reshape(shape)
    if has_shifted_norm(family, tensor):
        values = values - np.float32(1)
    if heads := heads_interleaved(family, tensor.rpartition(".")[0], config):
        pairs = values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
        values = pairs.swapaxes(1, 2).reshape(shape)
    return values
