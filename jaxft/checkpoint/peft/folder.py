"""A PEFT folder: its two files, their keys, and the fields of adapter_config.json that all kinds of adapter share.

Format: adapter_config.json and adapter_model.safetensors, whose keys are `base_model.model.<module>.<parameter>`
(PEFT 0.21).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.adapters.attach import slots
from jaxft.checkpoint.finite import FiniteSource
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.peft.keys import PREFIX as PREFIX
from jaxft.checkpoint.peft.keys import Key, check_one_adapter, read_key
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError, listed
from jaxft.files.patterns import matches
from jaxft.models.nested import module_names, text_name
from jaxft.models.tensor_map import SAME, Piece, Transform
from jaxft.nn.decoder import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINABLE_TOKENS = "TRAINABLE_TOKENS"  # peft_type of rows of tables without other adapters
SCORE_TASK = "SEQ_CLS"  # task_type of a reward model's adapter
# Fields about training or bookkeeping: they do not change what the adapter computes.
HARMLESS = (
    "task_type", "inference_mode", "revision", "auto_mapping", "runtime_config", "peft_version",
    "base_model_name_or_path", "peft_type", "modules_to_save", "ensure_weight_tying", "trainable_token_indices",
)  # fmt: skip
# `read(rows, columns)` gives a block of a matrix of the base, `read(rows)` of a vector: Hugging Face's layout, float32.
ReadBlock = Callable[..., np.ndarray]
# `merge(read, rows, columns)` gives the merged block, float32.
MergeBlock = Callable[..., np.ndarray]


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of a folder, or a part of one, and its place in a model with the adapter.

    path: of our parameter. index: the part of our parameter. transform: from that part to PEFT's layout and back.
    part: the slices of the folder's tensor, if that tensor holds several of our parameters; else None.
    """

    key: str
    path: str
    index: tuple[int | slice, ...] = ()
    transform: Transform = SAME
    part: tuple[slice, ...] | None = None


class AdapterTensors:
    """The tensors of a PEFT folder. As a source it has the adapter's own, its halves, under one form of their keys.

    Keys have the modules of a text-only model: transformers nests them one level deeper in a base that takes images
    too. files: all tensors under the keys that they have in the file. keys: what each of these names.
    Raises CheckpointError if two keys mean one tensor or belong to two adapters, and for NaN or infinite values when
    they are read.
    """

    def __init__(self, folder: str) -> None:
        self.files: TensorSource = FiniteSource(SafetensorsFolder(folder, WEIGHTS))
        self.keys: dict[str, Key] = {key: read_key(key) for key in self.files.specs()}
        check_one_adapter(self.keys.values(), folder)
        self._halves: dict[str, str] = {}
        taken: dict[tuple[str, str], str] = {}
        for key, what in self.keys.items():
            other = taken.setdefault((what.role, what.name), key)
            if other != key:
                raise CheckpointError(f"{folder}: {other} and {key} are the same tensor of the base")
            if what.role == "half":
                self._halves[what.name] = key

    def specs(self) -> dict[str, TensorSpec]:
        specs = self.files.specs()
        return {name: specs[key] for name, key in self._halves.items()}

    def read(self, key: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.files.read(self._halves[key], index)

    def of_role(self, *roles: str) -> dict[str, Key]:
        """The keys in the file that have one of these roles."""
        return {key: what for key, what in self.keys.items() if what.role in roles}


def refuse_unknown(config: Mapping[str, Any], understood: Callable[[str, Any], bool]) -> None:
    """Raises ModelError naming each field of an adapter_config.json that would change what the adapter computes.

    understood(name, value): whether the kind of adapter reads the field, or the value has no effect. A field that is
    empty, false or zero counts as not set.
    """
    refused = [
        f"{name}={value!r}"
        for name, value in sorted(config.items())
        if value and name not in HARMLESS and not understood(name, value)
    ]
    if refused:
        raise ModelError(
            f"adapter_config.json has settings that are not implemented: {', '.join(refused)}. Without them the "
            "adapter may compute something else. If PEFT reads the folder, merge the adapter into its base there "
            "(merge_and_unload) and take the merged model. A setting that changes nothing for this adapter can be "
            "removed from adapter_config.json."
        )


def saved_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """modules_to_save of an adapter_config.json, under the names of a text-only model."""
    names = tuple(text_name(name) or name for name in config.get("modules_to_save") or ())
    if config.get("task_type") == SCORE_TASK:
        # PEFT names the heads of all families there, whichever the model has.
        names = (*(name for name in names if name not in ("classifier", "score")), "score")
    return names


def token_indices(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tokens whose rows an adapter_config.json says that the folder has, by the table's name.

    Raises ModelError if they are no whole numbers.
    """
    field = "token_indices" if config.get("peft_type") == TRAINABLE_TOKENS else "trainable_token_indices"
    given = config.get(field) or {}
    by_table = given if isinstance(given, Mapping) else dict.fromkeys(_tables_of_rows(config), given)
    for name, indices in by_table.items():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise ModelError(f"adapter_config.json has {field}={given!r}: {name} needs token ids")
    return {text_name(name) or name: tuple(indices) for name, indices in by_table.items() if indices}


def _tables_of_rows(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tables whose tokens are named without a table: the embeddings, or those that TRAINABLE_TOKENS targets."""
    targets = config.get("target_modules")
    if config.get("peft_type") != TRAINABLE_TOKENS or not targets:
        return ("embed_tokens",)
    tables = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    return tuple(name for name, module in tables.items() if named(targets, module_names(module)))


def named(listed: Any, names: tuple[str, ...]) -> bool:
    """Whether a field of names, or of one regular expression, has one of a module's names."""
    if not listed:
        return False
    if isinstance(listed, str):
        return any(matches(listed, name) for name in names)
    return any(name == end or name.endswith(f".{end}") for name in names for end in listed)


# Modules whose names in files transformers changes when it reads them.
RENAMED = {
    ".block_sparse_moe.input_linear": ".block_sparse_moe.experts.gate_up_proj",
    ".block_sparse_moe.output_linear": ".block_sparse_moe.experts.down_proj",
}


def modules(model: Decoder) -> Iterator[tuple[str, str, Piece]]:
    """(PEFT's module, path of our layer, position in that layer) of every matrix that may have an adapter."""
    layers = dict(slots(model))
    for path, param in param_tensors(model).items():
        layer, _, name = path.rpartition("/")
        if layer in layers and name in ("kernel", "embedding"):
            for piece in param.pieces:
                yield PREFIX + _in_memory(piece.hf.removesuffix(".weight")), layer, piece


def _in_memory(module: str) -> str:
    """transformers' name of a module that has another one in files."""
    for in_files, name in RENAMED.items():
        if module.endswith(in_files):
            return module.removesuffix(in_files) + name
    return module


def misfit_error(problems: Sequence[str]) -> CheckpointError:
    """The error for an adapter that cannot be merged into its base. problems: one line each; none if it is empty."""
    lines = listed(problems or ["it holds no adapter at all"], 20, lines=True)
    return CheckpointError(f"the adapter does not fit its base:\n{lines}")


def layers_named(model: Decoder, keys: Collection[str], prefix: str, folder: str) -> tuple[str, ...]:
    """Paths of the layers that keys of the form `<module>.<prefix>...` name.

    Raises CheckpointError if there is no key, or a key has another form or names no layer of the model.
    """
    paths = {module: layer for module, layer, _ in modules(model)}
    named = {key: key.rpartition(f".{prefix}")[0] for key in keys}
    unknown = [key for key, module in named.items() if module not in paths]
    if unknown or not keys:
        raise CheckpointError(
            f"{folder}: {len(unknown)} of {len(keys)} tensors name no layer of the model, "
            f"among them {unknown[:3]}. Keys are {PREFIX}<module>.{prefix}..."
        )
    return tuple(sorted({paths[module] for module in named.values()}))
