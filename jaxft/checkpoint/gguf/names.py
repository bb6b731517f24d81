"""Names of the tensors of a GGUF file by family: one table for reading and for writing.

Names, the order of rows and the 1 that is added to norms are those of llama.cpp's converter.
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from jaxft.checkpoint.gguf.families.dense import DENSE_FAMILIES
from jaxft.checkpoint.gguf.families.experts import EXPERT_FAMILIES
from jaxft.checkpoint.gguf.families.recurrent import RECURRENT_FAMILIES
from jaxft.checkpoint.gguf.family import Family, GGUFModule
from jaxft.errors import ModelError
from jaxft.models.family import FamilyConfig

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1: a divisor for each rotary frequency, [head_dim / 2]
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # Phi-3: the same, two sets
FAMILIES: dict[str, Family] = {
    family.key: family for family in (*DENSE_FAMILIES, *EXPERT_FAMILIES, *RECURRENT_FAMILIES)
}
# These are read back as the other family, which computes the same.
WRITTEN_AS = {
    "mistral": "llama",
    "internlm3": "llama",
    "glm4_moe_lite": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "gemma4_unified_text": "gemma4_text",
}
WRITTEN = frozenset((*(family.model_type for family in FAMILIES.values()), *WRITTEN_AS))
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
_EXPERT = re.compile(r"(?<=experts\.)\d{1,9}(?=\.)")


def gguf_modules(family: Family, layers: int, experts: int = 0) -> dict[str, GGUFModule]:
    """Hugging Face's name of every module -> its module in GGUF, without `.weight` or `.bias`; experts in order."""
    modules = {theirs: GGUFModule(ours, ours) for ours, theirs in family.whole.items()}
    for n in range(layers):
        for ours, theirs in family.layer.items():
            name, module = f"blk.{n}.{ours}", f"model.layers.{n}.{theirs}"
            if "{e}" not in theirs:
                modules[module] = GGUFModule(name, ours, n)
                continue
            modules |= {module.format(e=e): GGUFModule(name, ours, n, e) for e in range(experts)}
    return modules


def gguf_tensor(family: Family, tensor: str) -> GGUFModule | None:
    """The place of a tensor, given its Hugging Face name, with the ending of its name; None if it has none."""
    match = _LAYER.fullmatch(tensor)
    inner = tensor if match is None else match[2]
    layer = -1 if match is None else int(match[1])
    expert = _EXPERT.search(inner)
    modules, tensors = _inverse(family.key)
    inner = _EXPERT.sub("{e}", inner, count=1)
    name = tensors.get(inner) if layer >= 0 else None
    if name is None:
        module, _, ending = inner.rpartition(".")
        known = modules if layer >= 0 else {theirs: ours for ours, theirs in family.whole.items()}
        if module not in known or ending not in ("weight", "bias"):
            return None
        name = f"{known[module]}.{ending}"
    part = name.removesuffix(".weight").removesuffix(".bias")
    return GGUFModule(name if layer < 0 else f"blk.{layer}.{name}", part, layer, int(expert[0]) if expert else None)


def require_tensor(family: Family, tensor: str) -> GGUFModule:
    """`gguf_tensor` of a tensor that must have one. Raises ModelError if it has none."""
    module = gguf_tensor(family, tensor)
    if module is None:
        raise ModelError(
            f"GGUF's {family.arch} has no name for the tensor {tensor!r} of this {family.model_type} model"
        )
    return module


@functools.cache
def _inverse(key: str) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """GGUF's names of a family's modules and of its single tensors by Hugging Face's."""
    family = FAMILIES[key]
    modules = {theirs: ours for ours, theirs in family.layer.items()}
    return modules, {theirs: ours for ours, theirs in family.tensors.items()}


def expert_count(family: Family, config: FamilyConfig) -> int:
    """Experts of a layer, 0 in a dense family. config: the family's Config."""
    return getattr(config, family.experts) if family.experts else 0


def heads_interleaved(family: Family, module: str, config: FamilyConfig) -> int:
    """Number of heads whose halves llama.cpp interleaves in the rows of a module, 0 for none."""
    if family.interleaved and module.endswith(".q_proj"):
        return config.num_attention_heads
    if family.interleaved and module.endswith(".k_proj"):
        return config.num_key_value_heads
    return 0


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: in every head (half, pair) becomes (pair, half)."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def has_shifted_norm(family: Family, tensor: str) -> bool:
    """Whether a file holds 1 + the values of this Hugging Face tensor."""
    of_delta_net = tensor.endswith("linear_attn.norm.weight")
    return family.norm_plus_one and tensor.endswith("norm.weight") and not of_delta_net
