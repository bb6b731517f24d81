"""The kinds of adapter that are implemented, each a module of this room that has a PEFT_TYPE."""

import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxft.adapters.attach import adapters, virtual_modules
from jaxft.adapters.saved import saved_paths
from jaxft.checkpoint.peft.folder import TRAINABLE_TOKENS
from jaxft.errors import ModelError, did_you_mean
from jaxft.files.adapter_base import refuse_mlx
from jaxft.files.json_fields import FLAG, INDEX, NUMBER, TEXT, TEXTS, check_kinds, listing, mapping
from jaxft.nn.decoder import Decoder

PACKAGE = __name__.rpartition(".")[0]
NAMES = TEXT | TEXTS
KINDS = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "bias"), TEXT),
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules"), NAMES),
    **dict.fromkeys(("modules_to_save", "target_parameters"), TEXTS),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), mapping(NUMBER, "an object of numbers")),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "vera_dropout"), NUMBER),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "save_projection", "ensure_weight_tying", "fan_in_fan_out"), FLAG
    ),
    "layers_to_transform": INDEX | listing(INDEX, "a list of them"),
    "projection_prng_key": INDEX,
}
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "rank_pattern", "alpha_pattern")


@functools.cache
def kinds() -> dict[str, ModuleType]:
    """The module of every implemented `peft_type`."""
    path = importlib.import_module(PACKAGE).__path__
    modules = (importlib.import_module(f"{PACKAGE}.{info.name}") for info in pkgutil.iter_modules(path))
    return {module.PEFT_TYPE: module for module in modules if hasattr(module, "PEFT_TYPE")}


def check_form(config: Mapping[str, Any], folder: str) -> None:
    """Raises ModelError if an adapter_config.json is not PEFT's, or a field that is read is of the wrong kind."""
    refuse_mlx(config, folder)
    where = f"{folder}/adapter_config.json"
    check_kinds(config, KINDS, where)
    for name in PATTERNS:
        for pattern in _patterns(config.get(name)):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ModelError(f"{where}: {pattern!r} in {name} is no regular expression: {error}") from error


def _patterns(value: Any) -> tuple[str, ...]:
    """The regular expressions in a field: a text is one, a list has names of modules, an object has them as names."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Mapping) else ()


def kind_of(config: Mapping[str, Any]) -> ModuleType:
    """The module for an adapter_config.json. Raises ModelError for a peft_type that is not implemented."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds():
        known = ", ".join(sorted(kinds()))
        raise ModelError(
            f"adapter_config.json has peft_type {kind!r}, which is not implemented."
            f"{did_you_mean(str(kind), kinds())} Implemented: {known}. Merge it into its base with PEFT, if it can be: "
            "PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        )
    return kinds()[kind]


def only_kind(model: Decoder) -> ModuleType | None:
    """The module for the adapters of a model; None if it has none. Raises ModelError if they are of several kinds."""
    kind_names = {adapter.peft_type for adapter in (adapters(model) | virtual_modules(model)).values()}
    if model.token_rows is not None and (kind_names or saved_paths(model)):
        kind_names.add("LORA")  # the only kind beside which PEFT has rows of single tokens, or modules in full
    elif model.token_rows is not None:
        kind_names.add(TRAINABLE_TOKENS)
    if len(kind_names) > 1:
        raise ModelError(f"the model has adapters of {' and '.join(sorted(kind_names))}: a PEFT folder holds one kind")
    return kinds()[next(iter(kind_names))] if kind_names else None
