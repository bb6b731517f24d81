"""LoRA on experts that are one parameter per layer, as PEFT keeps it (target_parameters, PEFT 0.21).

transformers 5 has all experts of a layer in `gate_up_proj` and `down_proj` of one module. PEFT wraps the module once
for each of them, gate_up_proj first: with both, `experts.base_layer.lora_A.weight` belongs to gate_up_proj and
`experts.lora_A.weight` to down_proj; with one, `experts.lora_A.weight` belongs to that one. A is [E r, I], experts
outermost; B is [O, r E], experts innermost.
"""

# E experts, I inputs, O outputs, r rank, F inner

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.checkpoint.fused_experts import SINGLE
from jaxft.checkpoint.peft.folder import PREFIX
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError
from jaxft.models.tensor_map import Transform

INNER, OUTER = "gate_up_proj", "down_proj"
# Model types in which PEFT takes modules of these names for the experts, even if they are named in full: a shared
# expert or a layer without experts gets its adapter as a parameter, by the name of its weight.
TAKEN_FOR_EXPERTS = frozenset(
    (
        "qwen3_moe", "qwen3_next", "glm4_moe", "glm4_moe_lite", "ernie4_5_moe", "hunyuan_v1_moe", "deepseek_v2",
        "deepseek_v3",
    )
)  # fmt: skip
_TAKEN = ("gate_proj", "up_proj", "down_proj")
WEIGHT = ".weight"
_KEY = re.compile(
    re.escape(PREFIX)
    + r"(model\.layers\.\d+)(?:\.(?:mlp|block_sparse_moe))?\.experts(\.base_layer)?\.(lora_[AB])\.weight"
)


@dataclass(frozen=True)
class StackedA(Transform):
    """Ours [E, r, I], PEFT's [E r, I]."""

    experts: int

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * shape[1], shape[2])

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.experts, -1, array.shape[-1])

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, array.shape[-1])


@dataclass(frozen=True)
class StackedB(Transform):
    """Ours [E, r, O], PEFT's [O, r E]."""

    experts: int

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[2], shape[0] * shape[1])

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(array.shape[0], -1, self.experts).transpose(2, 1, 0)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(2, 1, 0).reshape(array.shape[2], -1)


def wrapper_module(module: str, adapted: Collection[str]) -> str:
    """PEFT's module for `<experts>.gate_up_proj` or `<experts>.down_proj`. adapted: those with an adapter."""
    experts, _, name = module.rpartition(".")
    return f"{experts}.base_layer" if name == INNER and OUTER in adapted else experts


def is_taken_for_experts(model_type: str, module: str) -> bool:
    """Whether PEFT takes a dense feed-forward's module for the experts. module: its name in transformers."""
    return model_type in TAKEN_FOR_EXPERTS and module.rsplit(".", 1)[-1] in _TAKEN and ".experts." not in module


def dense_targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules whose weights an adapter_config.json targets as parameters."""
    targets = map(str, config.get("target_parameters") or ())
    return tuple(target.removesuffix(WEIGHT) for target in targets if _is_dense_target(target))


def _is_dense_target(target: str) -> bool:
    return target.endswith(tuple(f".{name}{WEIGHT}" for name in _TAKEN))


def targets_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Last names of experts' parameters that an adapter_config.json targets. Raises ModelError for others, but for
    `dense_targets`.
    """
    targets = [str(target) for target in config.get("target_parameters") or ()]
    names = {target.rsplit(".", 1)[-1] for target in targets if not _is_dense_target(target)}
    if names - {INNER, OUTER}:
        raise ModelError(
            f"adapter_config.json has target_parameters={sorted(config['target_parameters'])}: only experts' {INNER} "
            f"and {OUTER} are implemented"
        )
    if names and config.get("rank_pattern"):
        raise ModelError("adapter_config.json has rank_pattern beside target_parameters, which is not implemented")
    return tuple(sorted(names))


def is_stacked(key: str) -> bool:
    """Whether a key belongs to experts in one parameter."""
    return _KEY.fullmatch(key) is not None


def split_stacked(
    config: Mapping[str, Any], source: TensorSource, base: Collection[str]
) -> tuple[dict[str, Any], TensorSource]:
    """The config and tensors of a folder as if each expert were a module, if the base's files have one for each.

    base: names of the base's tensors. Gate and up share the A of gate_up_proj: each gets a copy.
    """
    targets, kinds = targets_of(config), _kinds_in(base)
    if not targets or kinds is None:
        return dict(config), source
    target_modules = config.get("target_modules") or []
    if isinstance(target_modules, str):
        raise ModelError(
            f"adapter_config.json has target_parameters beside target_modules={target_modules!r}; give a list"
        )
    _, gate, up, down = kinds
    names = [name for target in targets for name in ((gate, up) if target == INNER else (down,))]
    plain = {name: value for name, value in config.items() if name != "target_parameters"}
    plain |= {"target_parameters": [f"{module}{WEIGHT}" for module in dense_targets(config)]}
    return plain | {"target_modules": [*target_modules, *names]}, _SplitExperts(source, targets, kinds, config["r"])


def _kinds_in(base: Collection[str]) -> tuple[str, ...] | None:
    for kinds in SINGLE.values():
        if any(f".{kinds[0]}.experts.0.{kinds[1]}.weight" in name for name in base):
            return kinds
    return None


@dataclass(frozen=True)
class _Part:
    """One expert's half of a LoRA in a stacked tensor of `experts` experts; rows: of B, all if None.

    With experts=0 the whole tensor.
    """

    source_name: str
    expert: int = 0
    experts: int = 0
    rows: tuple[int, int] | None = None

    def cut_from(self, array: np.ndarray) -> np.ndarray:
        if not self.experts:
            return array
        if ".lora_A." in self.source_name:
            return StackedA(self.experts).from_hf(array)[self.expert]
        return StackedB(self.experts).from_hf(array)[self.expert].T[slice(*self.rows) if self.rows else ...]


class _SplitExperts:
    """Adapter tensors with a key for each expert's matrix."""

    def __init__(self, source: TensorSource, targets: Collection[str], kinds: tuple[str, ...], r: int) -> None:
        self._source = source
        self._parts: dict[str, _Part] = {}
        for key, spec in source.specs().items():
            match = _KEY.fullmatch(key)
            if match is None:
                self._parts[key] = _Part(key)
            else:
                self._parts |= dict(_split_parts(key, spec, match, targets, kinds, r))

    def specs(self) -> dict[str, TensorSpec]:
        given = self._source.specs()
        out = {}
        for key, part in self._parts.items():
            spec = given[part.source_name]
            out[key] = TensorSpec(part.cut_from(np.broadcast_to(np.float32(0), spec.shape)).shape, spec.dtype)
        return out

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        part = self._parts[key]
        return part.cut_from(self._source.read(part.source_name))[index or ...]


def _split_parts(
    key: str, spec: TensorSpec, match: re.Match, targets: Collection[str], kinds: tuple[str, ...], r: int
) -> Iterator[tuple[str, _Part]]:
    layer, inner, half = match.groups()
    name = INNER if inner or OUTER not in targets else OUTER
    module, gate, up, down = kinds
    stacked = spec.shape[0 if half == "lora_A" else -1]
    if len(spec.shape) != 2 or stacked % r or (name == INNER and half == "lora_B" and spec.shape[0] % 2):
        raise CheckpointError(f"{key} {list(spec.shape)} does not hold experts of rank {r}")
    for expert in range(stacked // r):
        for position, kind in enumerate((gate, up) if name == INNER else (down,)):
            half_rows = spec.shape[0] // 2
            rows = (position * half_rows, (position + 1) * half_rows) if name == INNER else None
            part = _Part(key, expert, stacked // r, rows)
            yield f"{PREFIX}{layer}.{module}.experts.{expert}.{kind}.{half}.weight", part
