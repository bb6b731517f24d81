"""The LoRA family in PEFT's folders.

Keys: `<module>.lora_A.weight` [r, I] and `lora_B.weight` [O, r]; of DoRA also `lora_magnitude_vector` [O]; of
embeddings `lora_embedding_A` [r, V] and `lora_embedding_B` [D, r]. Experts have a module each, as transformers 4 has
them; PEFT turns those into what its version of transformers has.
"""

# I inputs, O outputs, r rank, V vocab, D model

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters, key_of, slots
from jaxft.adapters.lora import make_lora, settings_for
from jaxft.adapters.lora_experts import ExpertLoRA
from jaxft.adapters.low_rank import LoRASettings
from jaxft.checkpoint.hf import TIED_HEAD
from jaxft.checkpoint.peft.experts import StackedA, StackedB, is_stacked, single, targets_of, wrapper
from jaxft.checkpoint.peft.folder import (
    PREFIX,
    AdapterTensors,
    MergeBlock,
    PeftTensor,
    ReadBlock,
    layers_named,
    modules,
    refuse_unknown,
)
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError
from jaxft.models.nested import nested_module
from jaxft.models.tensor_map import SAME, TRANSPOSED, Piece
from jaxft.nn.experts.layer import ExpertLinear

PEFT_TYPE = "LORA"
# Our parameter, the end of its key, its layout there, and whether its rows are as many as the rank.
PARTS = (
    ("lora_a", "lora_A.weight", SAME, True),
    ("lora_b", "lora_B.weight", TRANSPOSED, True),
    ("lora_magnitude", "lora_magnitude_vector", SAME, False),
    ("lora_embedding_a", "lora_embedding_A", TRANSPOSED, False),
    ("lora_embedding_b", "lora_embedding_B", TRANSPOSED, False),
)
READ = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "rank_pattern", "alpha_pattern", "target_parameters",
)  # fmt: skip
HARMLESS = (
    "loftq_config", "eva_config", "corda_config", "megatron_config", "megatron_core", "arrow_config",
    "lora_ga_config", "qalora_group_size",
)  # fmt: skip
# Draws of A and B only. The other kinds (pissa, olora, corda, loftq, ...) change the base's weights as well.
DRAWS = (True, False, None, "gaussian", "eva", "orthogonal")
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def read_settings(config: Mapping[str, Any]) -> LoRASettings:
    """LoRA settings of an adapter_config.json, patterns left aside. Raises ModelError naming each not implemented."""
    refuse_unknown(config, _understood)
    for r in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if not isinstance(r, int) or r < 1:
            raise ModelError(f"adapter_config.json has r={r!r}; a rank is a whole number above zero")
    return LoRASettings(
        r=config["r"],
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
    )


def settings_of(config: Mapping[str, Any], module: str) -> LoRASettings:
    """The settings of one module, named as in transformers, patterns included."""
    patterns = (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
    return settings_for(read_settings(config), module, *patterns)


def opened(
    config: Mapping[str, Any], source: AdapterTensors, base: Collection[str]
) -> tuple[dict[str, Any], AdapterTensors]:
    """A folder as the base's files suggest it. base: names of their tensors."""
    return single(config, source, base)


def put(model: nnx.Module, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str) -> tuple[str, ...]:
    """Attaches adapters of a folder's settings to the layers that its keys name, values still to be read.

    In a stack, a layer that the settings do not select has none.
    """
    read_settings(config)
    others = [key for key in specs if not is_stacked(key)]
    named = layers_named(model, others, "lora_", folder) if others or not specs else ()
    named = tuple(sorted({*named, *_stacked_layers(model, config)}))
    stack_settings: dict[str, dict[int | None, LoRASettings | None]] = {path: {} for path in named}
    for module, path, piece in modules(model):
        if path in stack_settings:
            module = module.removeprefix(PREFIX)
            stacked = _is_stack(dict(slots(model))[path], piece)
            chosen = _targeted(config, module) if stacked else _selected(config, module)
            found = settings_of(config, module) if chosen else None
            if stack_settings[path].setdefault(piece.layer, found) != found:
                raise ModelError(f"{folder}: experts of one layer have other settings than each other: {module}")
    layers = dict(slots(model))
    for path, found in stack_settings.items():
        if any(found.values()):
            layers[path].adapter = make_lora(layers[path], tuple(found.values()), key_of(jax.random.key(0), path))
    return named


def _is_stack(layer: Any, piece: Piece) -> bool:
    """Whether a tensor of the base's files holds all experts of a layer."""
    return isinstance(layer, ExpertLinear) and len(piece.at) == 1


def _stacked_layers(model: nnx.Module, config: Mapping[str, Any]) -> set[str]:
    layers = dict(slots(model))
    return {
        path
        for module, path, piece in modules(model)
        if _is_stack(layers[path], piece) and _targeted(config, module.removeprefix(PREFIX))
    }


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    return bool(targets_of(config)) and _named(list(config["target_parameters"]), (module, nested_module(module)))


def for_writing(model: nnx.Module) -> nnx.Module:
    """The model with adapters as PEFT can load them beside the base: those with a start of their own as plain LoRA."""
    copy = nnx.merge(*nnx.split(model))
    for _, layer in slots(copy):
        if layer.adapter is not None:
            layer.adapter = layer.adapter.plain()
    return copy


def stored(model: nnx.Module) -> Iterator[PeftTensor]:
    """The tensors that a folder has of a model's adapters."""
    attached = adapters(model)
    for module, path, piece in modules(model):
        rank = attached[path].rank(piece.layer) if path in attached else 0
        if rank and isinstance(attached[path], ExpertLoRA) and len(piece.at) == 1:
            yield from _stored_stack(module, path, piece, rank, attached)
            continue
        for name, end, transform, ranked in PARTS if rank else ():
            if getattr(attached[path], name, None) is not None:
                index = (*piece.at, slice(0, rank)) if ranked else piece.at
                yield PeftTensor(f"{module}.{end}", f"{path}/adapter/{name}", index, transform)


def _stored_stack(module: str, path: str, piece: Piece, rank: int, attached: Mapping[str, Any]) -> Iterator[PeftTensor]:
    layer, _, _ = path.rpartition("/")
    adapted = {other.rpartition("/")[2] for other in attached if other.rpartition("/")[0] == layer}
    experts = attached[path].lora_a.get_value().shape[1]
    index = (*piece.at, slice(None), slice(0, rank))
    for half, transform in (("A", StackedA(experts)), ("B", StackedB(experts))):
        key = f"{wrapper(module, adapted)}.lora_{half}.weight"
        yield PeftTensor(key, f"{path}/adapter/lora_{half.lower()}", index, transform)


def fields(model: nnx.Module) -> dict[str, Any]:
    """What adapter_config.json says of a model's adapters."""
    attached, found, ends, stacked = adapters(model), {}, {}, set()
    for module, path, piece in modules(model):
        module = module.removeprefix(PREFIX)
        ends.setdefault(module.rsplit(".", 1)[-1], []).append(module)
        adapter = attached.get(path)
        if adapter is not None and adapter.rank(piece.layer):
            stack_settings = getattr(adapter, "stack_settings", None)
            found[module] = adapter.settings if stack_settings is None else stack_settings[piece.layer]
            if isinstance(adapter, ExpertLoRA) and len(piece.at) == 1:
                stacked.add(module)
    (r, alpha), _ = Counter((s.r, s.alpha) for s in found.values()).most_common(1)[0]
    settings = next(iter(found.values()))
    patterns = {"rank_pattern": _pattern(found, ends, "r", r), "alpha_pattern": _pattern(found, ends, "alpha", alpha)}
    if stacked and patterns["rank_pattern"]:
        raise ModelError(
            "PEFT's form of experts in one parameter has one rank for all layers: drop adapter.rank_pattern"
        )
    parameters = {"target_parameters": sorted(stacked)} if stacked else {}
    return (
        parameters
        | patterns
        | {
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.use_rslora,
            "use_dora": settings.use_dora,
            "target_modules": _shortest(set(found) - stacked, ends),
            "bias": "none",
            "init_lora_weights": True,
        }
    )


def _shortest(modules: set[str], ends: Mapping[str, list[str]]) -> list[str]:
    """Last names where every module of such a name has an adapter, else each in full."""
    names = {module.rsplit(".", 1)[-1] for module in modules}
    short = all(module in modules for name in names for module in ends[name])
    return sorted(names if short else modules)


def merging(base: TensorSource, config: Mapping[str, Any], source: AdapterTensors) -> dict[str, MergeBlock]:
    """How the base's matrices, by name, are merged. Only the adapter's small tensors stay in memory.

    Raises ModelError for settings not implemented, and CheckpointError listing tensors that name no matrix of the
    base, lack another that belongs to them or have another shape.
    """
    read_settings(config)
    found, problems = _by_matrix(base, source)
    out = {}
    for name, keys in found.items():
        rows, columns = base.specs()[name].shape
        settings = settings_of(config, name.removesuffix(".weight"))
        r = settings.r
        shapes = {"A.weight": (r, columns), "B.weight": (rows, r)}
        shapes |= {"magnitude_vector": (rows,)} if settings.use_dora else {}
        if "embedding_A" in keys or "embedding_B" in keys:
            shapes = {"embedding_A": (r, rows), "embedding_B": (columns, r)}
        misfits = [f"{name} lacks its lora_{part}" for part in shapes if part not in keys]
        misfits += [f"{name} has a lora_{part} too many" for part in keys if part not in shapes]
        for part, key in keys.items():
            spec = source.specs()[key]
            if part in shapes and spec.shape != shapes[part]:
                misfits.append(f"{key} is {list(spec.shape)}, the base wants {list(shapes[part])}")
        problems += misfits
        if not misfits:
            parts = {part: source.read(key).astype(np.float32) for part, key in keys.items()}
            # B A either way, [rows, r] and [r, columns].
            b, a = [parts["B.weight"], parts["A.weight"]] if "A.weight" in parts else [
                parts["embedding_A"].T, parts["embedding_B"].T
            ]  # fmt: skip
            out[name] = _merge(np.float32(settings.scale), b, a, parts.get("magnitude_vector"))
    if problems or not out:
        listed = "\n  ".join(problems[:20] or ["it holds no adapter at all"])
        raise CheckpointError(f"the adapter does not fit its base:\n  {listed}")
    return out


def _by_matrix(base: TensorSource, source: AdapterTensors) -> tuple[dict[str, dict[str, str]], list[str]]:
    matrices, found, problems = base.specs(), {}, []
    for key in source.specs():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        copied = key.removeprefix(PREFIX).removesuffix(".base_layer.weight") + ".weight"
        if copied in matrices and np.array_equal(source.read(key), base.read(copied)):
            continue  # beside an adapter on the LM head PEFT stores the head itself
        name = f"{module}.weight"
        if not key.startswith(PREFIX) or len(matrices[name].shape if name in matrices else ()) != 2:
            problems.append(f"{key} names no matrix of the base")
        else:
            found.setdefault(name, {})[part] = key
    tables = [name for name, parts in found.items() if "embedding_A" in parts]
    if tables and TIED_HEAD not in matrices:
        raise ModelError(
            f"the adapter on {tables[0]} cannot be merged: in its base the table is the LM head too, which the adapter "
            "does not move. Serve the adapter beside its base."
        )
    return found, problems


def _merge(scale: np.float32, b: np.ndarray, a: np.ndarray, magnitude: np.ndarray | None) -> MergeBlock:
    def moved(read: ReadBlock, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        delta = b[slice(*rows)] @ a[:, slice(*columns)]
        delta *= scale
        delta += read(rows, columns)
        return delta

    def dora(read: ReadBlock, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        whole = moved(read, rows, (0, a.shape[1]))
        lengths = np.linalg.norm(whole, axis=1, keepdims=True)
        return whole[:, slice(*columns)] * (magnitude[slice(*rows), None] / lengths)

    return moved if magnitude is None else dora


def _pattern(found: Mapping[str, LoRASettings], ends: Mapping[str, list[str]], name: str, usual: float) -> dict:
    # A module in full goes without `model.`: in a model that takes images too it has another name before its layers.
    out = {}
    for module, settings in found.items():
        value, end = getattr(settings, name), module.rsplit(".", 1)[-1]
        alike = {getattr(found[other], name) for other in ends[end] if other in found} == {value}
        if value != usual:
            out[end if alike else re.escape(module.removeprefix("model."))] = value
    return out


def _selected(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on a module, by its name in transformers."""
    names = (module, nested_module(module))
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if _named(config.get("exclude_modules"), names):
        return False
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str) or layers is None or layers == []:
        return _named(targets, names)
    layer = _LAYER.match(module)
    layers = [layers] if isinstance(layers, int) else layers
    return _named(targets, names) and layer is not None and int(layer[1]) in layers


def _named(listed: Any, names: tuple[str, ...]) -> bool:
    if not listed:
        return False
    if isinstance(listed, str):
        return any(re.fullmatch(listed, name) for name in names)
    return any(name == end or name.endswith(f".{end}") for name in names for end in listed)


def _understood(name: str, value: Any) -> bool:
    if name == "init_lora_weights":
        return value in DRAWS
    if name == "layers_pattern":
        return value in ("layers", ["layers"])
    return name in READ or name in HARMLESS or (name, value) == ("bias", "none")
