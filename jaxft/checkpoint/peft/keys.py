"""The keys of a PEFT folder in one form, however the program that wrote them spells them.

A key is `base_model.model.<module>.<what>`. Programs differ in what follows the module: some leave the adapter's name
in (`lora_A.default.weight`), versions of PEFT keep DoRA's lengths under two names, and a tensor of the base is stored
under the names of the modules that PEFT wrapped around it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxft.errors import CheckpointError, listed
from jaxft.models.nested import text_name

PREFIX = "base_model.model."
# half: a parameter of the adapter; rows: of single tokens; trained: a tensor of the base that was trained in full;
# base: one that stands for the base's own; plain: one of these two, as modules_to_save says; copy: what the base had
# before training.
Role = Literal["half", "rows", "trained", "base", "plain", "copy"]
# Parameters of adapters that are modules, so that their keys end in the parameter's name.
_MODULES = ("lora_A", "lora_B")
_HALF = re.compile(r"lora_.+|ia3_l|vera_lambda_[bd]")
_SHARED = re.compile(r"(base_model\.vera_[AB])(?:\.([^.]+))?")
_WRAPPED = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<trained>modules_to_save)(?:\.(?P<name>[^.]+))?"
    r"|(?P<copy>original_module)"
    r"|(?P<base>(?:token_adapter\.)?base_layer)"
    r")\.(?P<parameter>weight|bias)"
)
_ROWS = re.compile(r"(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?:\.(?P<name>[^.]+))?")
_ORIGINAL_ROWS = re.compile(r"(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_original(?:\.[^.]+)?")


@dataclass(frozen=True)
class Key:
    """What a key of a folder names.

    name: of a half, the key without the adapter's name; of rows, the module; else the name of the base's tensor. Names
    are those of a text-only model. adapter: the adapter's name, if the key has it.
    """

    role: Role
    name: str
    adapter: str | None = None


def read_key(key: str) -> Key:
    """What a key of a PEFT folder names. A key of an unknown form is a half of its own name, which fits no layer."""
    if (shared := _SHARED.fullmatch(key)) is not None:
        return Key("half", shared[1], shared[2])
    if not key.startswith(PREFIX):
        return Key("half", key)
    module = key.removeprefix(PREFIX)
    module = text_name(module) or module
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if _HALF.fullmatch(part)), None)
    if at is not None:
        own, adapter = _without_adapter(parts[at], parts[at + 1 :])
        return Key("half", PREFIX + ".".join([*parts[:at], *own]), adapter)
    if (rows := _ROWS.fullmatch(module)) is not None:
        return Key("rows", rows["module"], rows["name"])
    if (rows := _ORIGINAL_ROWS.fullmatch(module)) is not None:
        return Key("copy", rows["module"])
    if (wrapped := _WRAPPED.fullmatch(module)) is not None:
        role: Role = "trained" if wrapped["trained"] else "copy" if wrapped["copy"] else "base"
        return Key(role, f"{wrapped['module']}.{wrapped['parameter']}", wrapped["name"])
    return Key("plain", module)


def _without_adapter(name: str, rest: list[str]) -> tuple[list[str], str | None]:
    """(the parts of a half's key from its name on, the adapter's name that was among them)."""
    if name in _MODULES:
        return [name, *rest[-1:]], rest[0] if len(rest) == 2 else None
    # A parameter, which some versions wrap in a module with a `weight` of its own.
    rest = rest[:-1] if rest[-1:] == ["weight"] else rest
    return [name], rest[0] if len(rest) == 1 else None


def check_one_adapter(keys: Iterable[Key], folder: str) -> None:
    """Raises CheckpointError if the keys of a folder belong to several adapters."""
    names = sorted({key.adapter for key in keys if key.adapter is not None})
    if len(names) > 1:
        raise CheckpointError(
            f"{folder} holds the tensors of {len(names)} adapters, {listed(names, 8)}: keep one of them. PEFT writes "
            f"each into a folder of its own: model.save_pretrained(FOLDER, selected_adapters=[{names[0]!r}])"
        )
