"""The LoRA family in PEFT's folders.

Keys: `<module>.lora_A.weight` [r, I] and `lora_B.weight` [O, r]; with DoRA also `lora_magnitude_vector` [O]; for
embeddings `lora_embedding_A` [r, V] and `lora_embedding_B` [D, r]. Each expert is a module, as in transformers 4; PEFT
converts that to the form of its own version of transformers.
"""

# I inputs, O outputs, r rank, V vocab, D model

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters, key_of, last_name, set_adapter, slots
from jaxft.adapters.lora import make_lora
from jaxft.adapters.lora.experts import ExpertLoRA
from jaxft.adapters.lora.low_rank import LoRASettings
from jaxft.checkpoint.peft.experts import (
    WEIGHT,
    StackedA,
    StackedB,
    is_stacked,
    is_taken_for_experts,
    split_stacked,
    wrapper_module,
)
from jaxft.checkpoint.peft.folder import (
    PREFIX,
    MergeBlock,
    PeftTensor,
    ReadBlock,
    layers_named,
    misfit_error,
    modules,
)
from jaxft.checkpoint.peft.lora_config import read_settings, selected, settings_of, targeted
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import ModelError
from jaxft.models.tensor_map import SAME, TRANSPOSED, Piece
from jaxft.nn.decoder import Decoder
from jaxft.nn.experts.layer import ExpertLinear

PEFT_TYPE = "LORA"
# Our parameter, the end of its key, its layout there, and whether it has one row for each rank.
PARTS = (
    ("lora_a", "lora_A.weight", SAME, True),
    ("lora_b", "lora_B.weight", TRANSPOSED, True),
    ("lora_bias", "lora_B.bias", SAME, False),
    ("lora_magnitude", "lora_magnitude_vector", SAME, False),
    ("lora_embedding_a", "lora_embedding_A", TRANSPOSED, False),
    ("lora_embedding_b", "lora_embedding_B", TRANSPOSED, False),
)
# By family: modules on which PEFT loads no adapter. Families whose experts' adapters it takes for no module's, or for
# those of transposed matrices: it loads them without a word as fresh ones, or not at all.
REFUSED = {"nemotron_h": ("out_proj",)}
REFUSED_EXPERTS = frozenset(("llama4_text", "lfm2_moe", "nemotron_h", "qwen3_5_moe_text"))
Index = tuple[int | slice, ...]


def normalize(
    config: Mapping[str, Any], source: TensorSource, base: Collection[str]
) -> tuple[dict[str, Any], TensorSource]:
    """A folder with one module per expert, if the base's files have that. base: names of their tensors."""
    return split_stacked(config, source, base)


def attach_to(
    model: Decoder, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> tuple[str, ...]:
    """Attaches adapters with a folder's settings to the layers that its keys name, values still to be read.

    In a stack, a layer that the settings do not select has none. Raises ModelError if the experts of one layer have
    different settings.
    """
    if read_settings(config).use_dora and any(".lora_embedding_" in key for key in specs):
        raise ModelError(
            f"{folder} has DoRA on the embeddings, which is not trained. Train on top of it: model.adapter='merge'"
        )
    others = [key for key in specs if not is_stacked(key)]
    named = layers_named(model, others, "lora_", folder) if others or not specs else ()
    named = tuple(sorted({*named, *_stacked_layers(model, config)}))
    by_layer: dict[str, dict[int | None, LoRASettings | None]] = {path: {} for path in named}
    for module, path, piece in modules(model):
        if path in by_layer:
            module = module.removeprefix(PREFIX)
            stacked = _is_stack(dict(slots(model))[path], piece)
            chosen = targeted(config, module) if stacked else selected(config, module)
            settings = settings_of(config, module) if chosen else None
            if by_layer[path].setdefault(piece.layer, settings) != settings:
                raise ModelError(f"{folder}: the experts of one layer have different settings: {module}")
    layers = dict(slots(model))
    for path, of_path in by_layer.items():
        if any(of_path.values()):
            adapter = make_lora(layers[path], tuple(of_path.values()), key_of(jax.random.key(0), path))
            set_adapter(layers[path], adapter)
    return named


def _is_stack(layer: Any, piece: Piece) -> bool:
    """Whether one tensor of the base's files holds all experts of a layer."""
    return isinstance(layer, ExpertLinear) and len(piece.at) == 1


def _stacked_layers(model: Decoder, config: Mapping[str, Any]) -> set[str]:
    layers = dict(slots(model))
    return {
        path
        for module, path, piece in modules(model)
        if _is_stack(layers[path], piece) and targeted(config, module.removeprefix(PREFIX))
    }


def plain_model(model: Decoder) -> Decoder:
    """The model with its adapters as plain LoRA, which PEFT can load: also those that started from the base (PiSSA)."""
    copy = nnx.merge(*nnx.split(model))
    attached = _lora_adapters(copy)
    for path, layer in slots(copy):
        if path in attached:
            set_adapter(layer, attached[path].plain())
    return copy


def _lora_adapters(model: Decoder) -> dict[str, Any]:
    """The adapters of a model by their layers' paths, each a `LowRank` or an `EmbeddingLoRA`."""
    return dict(adapters(model))


def peft_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The folder's tensors for a model's adapters."""
    attached = _lora_adapters(model)
    for module, path, piece in modules(model):
        rank = attached[path].rank(piece.layer) if path in attached else 0
        if rank and isinstance(attached[path], ExpertLoRA) and len(piece.at) == 1:
            yield from _stacked_tensors(module, path, piece, rank, attached)
            continue
        for name, end, transform, ranked in PARTS if rank else ():
            if getattr(attached[path], name, None) is not None:
                index: Index = (*piece.at, slice(0, rank)) if ranked else piece.at
                yield PeftTensor(f"{module}.{end}", f"{path}/adapter/{name}", index, transform)


def _stacked_tensors(
    module: str, path: str, piece: Piece, rank: int, attached: Mapping[str, Any]
) -> Iterator[PeftTensor]:
    layer, _, _ = path.rpartition("/")
    adapted = {other.rpartition("/")[2] for other in attached if other.rpartition("/")[0] == layer}
    experts = attached[path].lora_a.get_value().shape[1]
    index: Index = (*piece.at, slice(None), slice(0, rank))
    for half, transform in (("A", StackedA(experts)), ("B", StackedB(experts))):
        key = f"{wrapper_module(module, adapted)}.lora_{half}.weight"
        yield PeftTensor(key, f"{path}/adapter/lora_{half.lower()}", index, transform)


def adapter_config_fields(model: Decoder) -> dict[str, Any]:
    """The fields of adapter_config.json for a model's adapters. Raises ModelError if PEFT has no form for them."""
    attached = _lora_adapters(model)
    by_module: dict[str, LoRASettings] = {}
    ends: dict[str, list[str]] = {}
    stacked: set[str] = set()
    for module, path, piece in modules(model):
        module = module.removeprefix(PREFIX)
        ends.setdefault(last_name(module, "."), []).append(module)
        adapter = attached.get(path)
        if adapter is not None and adapter.rank(piece.layer):
            stack_settings = getattr(adapter, "stack_settings", None)
            by_module[module] = adapter.settings if stack_settings is None else stack_settings[piece.layer]
            if isinstance(adapter, ExpertLoRA) and len(piece.at) == 1:
                stacked.add(module)
    if not by_module:
        raise ModelError(
            "PEFT has rows of single tokens only beside LoRA on some layers: choose adapter.target_modules"
        )
    model_type = str(model.config.to_hf()["model_type"])
    _check_loads(model_type, by_module)
    _check_experts(model_type, attached)
    (r, alpha), _ = Counter((s.r, s.alpha) for s in by_module.values()).most_common(1)[0]
    settings = next(iter(by_module.values()))
    patterns = {
        "rank_pattern": _pattern(by_module, ends, "r", r),
        "alpha_pattern": _pattern(by_module, ends, "alpha", alpha),
    }
    if stacked and patterns["rank_pattern"]:
        raise ModelError(
            "PEFT's form of experts in one parameter has one rank for all layers: drop adapter.rank_pattern"
        )
    dense = {module for module in set(by_module) - stacked if is_taken_for_experts(model_type, module)}
    if dense and settings.use_dora:
        raise ModelError(
            f"PEFT has no DoRA for {sorted(dense)[0]}, since it takes the name of a dense feed-forward of model_type "
            f"{model_type!r} for the experts': set adapter.use_dora=False, or leave the feed-forward out of "
            "adapter.target_modules"
        )
    parameters = [*stacked, *(f"{module}{WEIGHT}" for module in dense)]
    return (
        ({"target_parameters": sorted(parameters)} if parameters else {})
        | patterns
        | {
            "r": r,
            "lora_alpha": alpha,
            # PEFT refuses dropout for parameters; it matters for training alone.
            "lora_dropout": 0.0 if dense else settings.dropout,
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
            "lora_bias": settings.use_bias,
            "target_modules": _shortest(set(by_module) - stacked - dense, ends),
            "bias": "none",
            "init_lora_weights": True,
        }
    )


def _check_loads(model_type: str, modules: Collection[str]) -> None:
    """Raises ModelError for a module on which PEFT loads no adapter."""
    refused = [module for module in modules if module.rpartition(".")[2] in REFUSED.get(model_type, ())]
    if refused:
        raise ModelError(
            f"PEFT loads no adapter on {refused[0]} of model_type {model_type!r}, because its GPU kernel passes the "
            "module by: leave out_proj out of adapter.target_modules, as 'all-linear' does"
        )


def _check_experts(model_type: str, attached: Mapping[str, Any]) -> None:
    """Raises ModelError for adapters on experts that PEFT would leave out, or refuse. attached: by layer."""
    on_experts = {path.rpartition("/")[2] for path, adapter in attached.items() if isinstance(adapter, ExpertLoRA)}
    if on_experts and model_type in REFUSED_EXPERTS:
        raise ModelError(
            f"PEFT does not load adapters on the experts of model_type {model_type!r} ({', '.join(sorted(on_experts))})"
            ": take adapter.target_modules='all-linear', which leaves experts out"
        )
    if len(on_experts & {"gate_proj", "up_proj"}) == 1:
        raise ModelError(
            f"PEFT fuses gate_proj and up_proj of experts, and {', '.join(sorted(on_experts))} has one of them: name "
            "both in adapter.target_modules, or neither"
        )


def _shortest(modules: set[str], ends: Mapping[str, list[str]]) -> list[str]:
    """The modules by their last names, if every module with such a name has an adapter; else each in full."""
    names = {last_name(module, ".") for module in modules}
    short = all(module in modules for name in names for module in ends[name])
    return sorted(names if short else modules)


def merge_blocks(base: TensorSource, config: Mapping[str, Any], source: TensorSource) -> dict[str, MergeBlock]:
    """How each of the base's matrices is merged, by its name. Only the adapter's small tensors stay in memory.

    Raises ModelError for settings not implemented, and CheckpointError listing tensors that name no matrix of the
    base, lack another that belongs to them or have another shape.
    """
    read_settings(config)
    by_matrix, problems = _by_matrix(base, source)
    out = {}
    for name, keys in by_matrix.items():
        rows, columns = base.specs()[name].shape
        settings = settings_of(config, name.removesuffix(".weight"))
        r = settings.r
        shapes: dict[str, tuple[int, ...]] = {"A.weight": (r, columns), "B.weight": (rows, r)}
        shapes |= {"magnitude_vector": (rows,)} if settings.use_dora else {}
        shapes |= {"B.bias": (rows,)} if settings.use_bias else {}
        if "embedding_A" in keys or "embedding_B" in keys:
            shapes = {"embedding_A": (r, rows), "embedding_B": (columns, r)}
            shapes |= {"magnitude_vector": (columns,)} if settings.use_dora else {}
        misfits = [f"{name} lacks its lora_{part}" for part in shapes if part not in keys]
        misfits += [f"{name} has an unexpected lora_{part}" for part in keys if part not in shapes]
        for part, key in keys.items():
            spec = source.specs()[key]
            if part in shapes and spec.shape != shapes[part]:
                misfits.append(f"{key} is {list(spec.shape)}, the base wants {list(shapes[part])}")
        problems += misfits
        if not misfits:
            parts = {part: source.read(key).astype(np.float32) for part, key in keys.items()}
            # B and A in both cases, [rows, r] and [r, columns].
            b, a = [parts["B.weight"], parts["A.weight"]] if "A.weight" in parts else [
                parts["embedding_A"].T, parts["embedding_B"].T
            ]  # fmt: skip
            lengths_of = 0 if "embedding_A" in parts else 1
            out[name] = _merge_block(np.float32(settings.scale), b, a, parts.get("magnitude_vector"), lengths_of)
            if settings.use_bias:
                bias = f"{name.removesuffix('.weight')}.bias"
                _check_has_bias(base, bias)
                out[bias] = _merge_bias(np.float32(settings.scale), parts["B.bias"])
    if problems or not out:
        raise misfit_error(problems)
    return out


def _check_has_bias(base: TensorSource, bias: str) -> None:
    if bias not in base.specs():
        raise ModelError(
            f"the adapter adds a bias (lora_bias) to {bias.removesuffix('.bias')}, which has none in its base, so it "
            "cannot be merged. Serve the adapter on its base."
        )


def _merge_bias(scale: np.float32, added: np.ndarray) -> MergeBlock:
    return lambda read, rows: read(rows) + scale * added[slice(*rows)]


def _by_matrix(base: TensorSource, source: TensorSource) -> tuple[dict[str, dict[str, str]], list[str]]:
    matrices = base.specs()
    by_matrix: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key in source.specs():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        name = f"{module}.weight"
        if not key.startswith(PREFIX) or len(matrices[name].shape if name in matrices else ()) != 2:
            problems.append(f"{key} names no matrix of the base")
        else:
            by_matrix.setdefault(name, {})[part] = key
    return by_matrix, problems


def _merge_block(
    scale: np.float32, b: np.ndarray, a: np.ndarray, magnitude: np.ndarray | None, axis: int
) -> MergeBlock:
    """axis: along which DoRA takes lengths: the inputs of a linear layer, the tokens of a table."""

    def lora(read: ReadBlock, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        delta = b[slice(*rows)] @ a[:, slice(*columns)]
        delta *= scale
        delta += read(rows, columns)
        return delta

    if magnitude is None:
        return lora

    def dora(read: ReadBlock, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        if axis == 0:
            whole = lora(read, (0, b.shape[0]), columns)
            lengths = np.linalg.norm(whole, axis=0, keepdims=True)
            return whole[slice(*rows)] * (magnitude[None, slice(*columns)] / lengths)
        whole = lora(read, rows, (0, a.shape[1]))
        lengths = np.linalg.norm(whole, axis=1, keepdims=True)
        return whole[:, slice(*columns)] * (magnitude[slice(*rows), None] / lengths)

    return dora


def _pattern(
    by_module: Mapping[str, LoRASettings], ends: Mapping[str, list[str]], name: str, usual: float
) -> dict[str, float]:
    # A full name is written without `model.`: in a model that takes images too, that prefix is a different one.
    out = {}
    for module, settings in by_module.items():
        value, end = getattr(settings, name), last_name(module, ".")
        alike = {getattr(by_module[other], name) for other in ends[end] if other in by_module} == {value}
        if value != usual:
            out[re.escape(end if alike else module.removeprefix("model."))] = value
    return out
