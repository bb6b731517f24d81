"""LoRA adapters in PEFT's folder format, both ways.

Format: adapter_config.json and adapter_model.safetensors, whose keys are
`base_model.model.<module>.lora_A.weight` [r, I] and `lora_B.weight` [O, r] (PEFT 0.21).
"""

# L stacked layers, I inputs, O outputs, r rank

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.adapters.attach import adapters, attach
from jaxft.adapters.lora import LoRA, LoRASettings, beside
from jaxft.checkpoint.finite import Finite
from jaxft.checkpoint.hf import placed_tensors, read_json
from jaxft.checkpoint.safetensors_writer import Index, LazyTensor, gather_sharded, write_safetensors
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSpec
from jaxft.errors import CheckpointError, ModelError
from jaxft.models.nested import nested_module, peft_targets, text_name
from jaxft.sharding.arrays import to_host
from jaxft.sharding.processes import primary
from jaxft.trees import flatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields whose other values would change what the adapter computes.
ONLY = {
    "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    "layer_replication": None, "target_parameters": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "use_qalora": False, "use_bdlora": None, "exclude_modules": None,
    "ensure_weight_tying": False,
}  # fmt: skip
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path", "peft_type")
# How training began or is to go on, not what the adapter computes.
HARMLESS = (
    "task_type", "inference_mode", "revision", "auto_mapping", "loftq_config", "eva_config",
    "corda_config", "megatron_config", "megatron_core", "runtime_config", "peft_version", "arrow_config",
    "lora_ga_config", "qalora_group_size",
)  # fmt: skip
# Draws of A and B only. The other kinds (pissa, olora, corda, loftq, ...) change the base's weights as well.
DRAWS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterTensors:
    """The tensors of a PEFT folder, under the keys that they have with a base of text only.

    PEFT takes a key from where transformers has the module; with a base that takes images too, that is inside it.
    Raises CheckpointError where two keys mean one tensor, and for NaN or infinite values when they are read.
    """

    def __init__(self, folder: str) -> None:
        self._source, self._stored = Finite(SafetensorsFolder(folder, WEIGHTS)), {}
        for stored in self._source.specs():
            module = stored.removeprefix(PREFIX)
            key = stored if module == stored else PREFIX + (text_name(module) or module)
            if key in self._stored:
                raise CheckpointError(f"{folder}: {self._stored[key]} and {stored} are the same tensor of the base")
            self._stored[key] = stored

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        specs = self._source.specs()
        return {key: specs[stored] for key, stored in self._stored.items()}

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        return self._source.read(self._stored[key], index)


def write_adapter(model: nnx.Module, folder: str, *, base: str, nested: bool = False) -> None:
    """Writes the model's LoRA adapters as a PEFT folder. base: what base_model_name_or_path is to say.

    nested: whether `base` is of a model that takes images too, so that transformers has these layers inside it.
    Every process takes part; process 0 writes.
    Raises ModelError where the model has no adapter.
    """
    attached = adapters(model)
    if not attached:
        raise ModelError("the model has no adapter to write; full fine-tuning writes the whole model")
    os.makedirs(folder, exist_ok=True)
    table, tensors = placed_tensors(model), {}
    for path, adapter in attached.items():
        for piece in table[f"{path}/kernel"].pieces:
            module = piece.hf.removesuffix(".weight")
            module = PREFIX + (nested_module(module) if nested else module)
            tensors |= {
                f"{module}.lora_A.weight": _lazy(adapter.lora_a.get_value(), piece.layer),
                f"{module}.lora_B.weight": _lazy(adapter.lora_b.get_value(), piece.layer, transpose=True),
            }
    if not primary():
        gather_sharded(tensors)
        return
    write_safetensors(os.path.join(folder, WEIGHTS), tensors, {"format": "pt"})
    settings = next(iter(attached.values())).settings
    with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
        json.dump(_peft_config(settings, attached, base, nested), file, indent=2, sort_keys=True)
        file.write("\n")


def read_adapter(model: nnx.Module, folder: str) -> tuple[str, ...]:
    """Attaches a PEFT folder's LoRA to a model and returns the paths of the layers that got one.

    Raises CheckpointError or ModelError for settings not implemented, and lists every tensor that is
    missing, unexpected or misshapen (a wrong prefix would otherwise leave the base model as it was).
    """
    config = read_json(os.path.join(folder, CONFIG))
    settings = read_settings(config)
    source = AdapterTensors(folder)
    table = placed_tensors(model)
    copies = _copies_of_base(model, table, source)
    specs = {key: spec for key, spec in source.specs().items() if key not in copies}
    paths = _paths_in(specs, table, folder)
    make = beside(settings)
    abstract = nnx.eval_shape(lambda: _attached(model, paths, make))
    expected: dict[str, tuple[int, ...]] = {}
    for path in paths:
        adapter = adapters(abstract)[path]
        shape_a, shape_b = (param.get_value().shape[-2:] for param in (adapter.lora_a, adapter.lora_b))
        for piece in table[f"{path}/kernel"].pieces:
            module = PREFIX + piece.hf.removesuffix(".weight")
            expected |= {f"{module}.lora_A.weight": shape_a, f"{module}.lora_B.weight": shape_b[::-1]}
    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in specs]
    problems += [
        f"misshapen {key}: file {list(specs[key].shape)}, model {list(shape)}"
        for key, shape in expected.items()
        if key in specs and specs[key].shape != shape
    ]
    problems += [f"unexpected {key} {list(spec.shape)}" for key, spec in specs.items() if key not in expected]
    if problems:
        raise CheckpointError(f"the adapter in {folder} does not fit the model:\n  " + "\n  ".join(problems[:40]))
    attach(model, paths, make, jax.random.key(0))
    for path, adapter in adapters(model).items():
        pieces = table[f"{path}/kernel"].pieces
        adapter.lora_a.set_value(_stacked(source, pieces, "lora_A"))
        adapter.lora_b.set_value(jnp.swapaxes(_stacked(source, pieces, "lora_B"), -1, -2))
    return paths


def read_settings(config: Mapping[str, Any]) -> LoRASettings:
    """LoRA settings of an adapter_config.json. Raises ModelError naming each field not implemented."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"adapter_config.json has peft_type {config.get('peft_type')!r}; only LORA is implemented")
    refused = [f"{name}={value!r}" for name, value in sorted(config.items()) if not _understood(name, value)]
    if refused:
        raise ModelError(f"adapter_config.json has settings that are not implemented: {', '.join(refused)}")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ModelError(f"adapter_config.json has r={config.get('r')!r}; a rank is a whole number above zero")
    return LoRASettings(
        r=config["r"],
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        use_rslora=bool(config.get("use_rslora", False)),
    )


def _understood(name: str, value: Any) -> bool:
    if name == "init_lora_weights":
        return value in DRAWS
    return name in READ or name in HARMLESS or not value or (name in ONLY and value == ONLY[name])


def _attached(model: nnx.Module, paths: tuple[str, ...], make: Any) -> nnx.Module:
    copy = nnx.merge(*nnx.split(model))
    attach(copy, paths, make, jax.random.key(0))
    return copy


def _copies_of_base(model: nnx.Module, table: Mapping[str, Any], source: AdapterTensors) -> set[str]:
    # Beside an adapter on the LM head PEFT stores the head itself; one that is not the base's stays unexpected.
    leaves, out = flatten(nnx.state(model))[0], set()
    for path, placed in table.items():
        for piece in placed.pieces:
            key = f"{PREFIX}{piece.hf.removesuffix('.weight')}.base_layer.weight"
            if key in source.specs():
                leaf = leaves[path][piece.at]
                if np.array_equal(placed.transform.from_hf(source.read(key)).astype(leaf.dtype), to_host(leaf)):
                    out.add(key)
    return out


def _paths_in(specs: Mapping[str, TensorSpec], table: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    modules = {
        piece.hf.removesuffix(".weight"): path.removesuffix("/kernel")
        for path, placed in table.items()
        if path.endswith("/kernel")
        for piece in placed.pieces
    }
    paths, unknown = set(), []
    for key in specs:
        module = key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
        if not key.startswith(PREFIX) or ".lora_" not in key or module not in modules:
            unknown.append(key)
        else:
            paths.add(modules[module])
    if unknown or not paths:
        raise CheckpointError(
            f"{folder}: {len(unknown)} of {len(specs)} tensors name no linear layer of the model, "
            f"among them {unknown[:3]}. Keys are {PREFIX}<module>.lora_A.weight and .lora_B.weight."
        )
    return tuple(sorted(paths))


def _stacked(source: AdapterTensors, pieces: Any, name: str) -> jax.Array:
    rows = [source.read(f"{PREFIX}{piece.hf.removesuffix('.weight')}.{name}.weight") for piece in pieces]
    array = rows[0] if pieces[0].layer is None else np.stack(rows)
    return jnp.asarray(array, jnp.float32)


def _lazy(array: jax.Array, layer: int | None, *, transpose: bool = False) -> LazyTensor:
    part = array if layer is None else array[layer]
    part = part.T if transpose else part

    def make(index: Index | None = None) -> np.ndarray:
        return np.asarray(to_host(part), np.float32)[index or ()]

    return TensorSpec(part.shape, np.dtype(np.float32)), make


def _peft_config(settings: LoRASettings, attached: Mapping[str, LoRA], base: str, nested: bool) -> dict[str, Any]:
    kinds = sorted({path.rsplit("/", 1)[-1] for path in attached})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.removeprefix("hf://"),
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        # A list would find the image tower's layers of the same names too.
        "target_modules": peft_targets(kinds) if nested else kinds,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
