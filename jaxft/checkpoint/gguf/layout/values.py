"""How the values of a single tensor differ between Hugging Face's files and GGUF files."""

# C channels, W taps of a convolution, E experts, H heads, G groups, I inner width

import numpy as np

from jaxft.checkpoint.gguf.family import Family
from jaxft.checkpoint.gguf.layout.delta_rows import tiled_order
from jaxft.checkpoint.gguf.names import has_shifted_norm, heads_interleaved, interleave, require_tensor
from jaxft.models.families.qwen.qwen3_5 import DeltaNetConfig
from jaxft.models.family import FamilyConfig

CONVOLUTIONS = ("ssm_conv1d", "shortconv.conv")
CHOICE_BIAS, RATES = "exp_probs_b", "ssm_a"


def file_shape(family: Family, config: FamilyConfig, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor has in the file. tensor, shape: in Hugging Face's files."""
    part = require_tensor(family, tensor).part
    if part in CONVOLUTIONS and len(shape) == 3:  # [C, 1, W]
        return (shape[0], shape[2])
    if part == CHOICE_BIAS:  # [1, E] in some families
        return (shape[-1],)
    if family.mamba and part in ("ssm_a", "ssm_d"):
        return (*shape, 1)
    if family.mamba and part == "ssm_norm":  # [G, I / G]
        groups = getattr(config, family.mamba)
        return (groups, shape[0] // groups)
    return shape


def is_by_rows(family: Family, config: FamilyConfig, tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether the file has the rows of this matrix, perhaps in another order; then parts of it are read alone."""
    same = len(shape) == 2 and file_shape(family, config, tensor, shape) == shape
    return same and _order(family, config, tensor) is None


def to_file(family: Family, config: FamilyConfig, tensor: str, values: np.ndarray) -> np.ndarray:
    """A whole float32 tensor as the file has it."""
    part = require_tensor(family, tensor).part
    if has_shifted_norm(family, tensor):
        values = values + np.float32(1)
    if part == RATES:
        values = -np.exp(values)
    if heads := heads_interleaved(family, tensor.rpartition(".")[0], config):
        values = interleave(values, heads)
    if (order := _order(family, config, tensor)) is not None:
        values = values[:, order] if part == "ssm_out" else values[order]
    return values.reshape(file_shape(family, config, tensor, values.shape))


def from_file(
    family: Family, config: FamilyConfig, tensor: str, values: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """A whole tensor of the file as Hugging Face's files have it, in this shape."""
    values, part = values.reshape(shape), require_tensor(family, tensor).part
    if (order := _order(family, config, tensor)) is not None:
        back = np.argsort(order)
        values = values[:, back] if part == "ssm_out" else values[back]
    if heads := heads_interleaved(family, tensor.rpartition(".")[0], config):
        pairs = values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
        values = pairs.swapaxes(1, 2).reshape(shape)
    if has_shifted_norm(family, tensor):
        values = values - np.float32(1)
    return np.log(-values) if part == RATES else values


def _order(family: Family, config: FamilyConfig, tensor: str) -> np.ndarray | None:
    if not family.tiled_heads or not isinstance(config, DeltaNetConfig):
        return None
    return tiled_order(config, require_tensor(family, tensor).part)


def adapter_half(family: Family, config: FamilyConfig, module: str, half: str, values: np.ndarray) -> np.ndarray:
    """One half of a LoRA of a module, A [r, inputs] or B [outputs, r], in the order of the file's matrix."""
    heads = heads_interleaved(family, module, config)
    if heads and half == "B":
        values = interleave(values, heads)
    order, is_output = (
        _order(family, config, f"{module}.weight"),
        require_tensor(family, f"{module}.weight").part == "ssm_out",
    )
    if order is None or is_output == (half == "B"):
        return values
    return values[:, order] if is_output else values[order]
