"""Training that goes on from a PEFT folder: with its adapter, whose settings are then the folder's, or on top of it."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from jaxft import models
from jaxft.adapters.attach import adapters, last_name
from jaxft.checkpoint.folders.origin import continued_adapter, is_adapter, resolve
from jaxft.checkpoint.load import hf_config_of
from jaxft.checkpoint.peft import PeftFolder, attach_structure, open_adapter
from jaxft.checkpoint.peft.folder import saved_names
from jaxft.config import AdapterConfig, RunConfig
from jaxft.conversion.convert import convert
from jaxft.errors import ConfigError
from jaxft.methods import method_of
from jaxft.nn.decoder import Decoder
from jaxft.sharding.processes import on_primary
from jaxft.terminal.console import SafeConsole

KINDS = {"LORA": "lora", "VERA": "vera", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
# Fields of `adapter` by those of adapter_config.json. Dropout is a setting of the run that trains.
FIELDS: dict[str, dict[str, str]] = {
    "lora": {"r": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"},
    "vera": {"r": "r"},
    "ia3": {},
    "prompt": {"num_virtual_tokens": "num_virtual_tokens"},
    "prefix": {"num_virtual_tokens": "num_virtual_tokens"},
}
DROPOUTS = {"lora": "lora_dropout", "vera": "vera_dropout"}
# What only fresh adapters have.
FRESH = ("init_lora_weights", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
         "feedforward_modules", "prompt_init_text")  # fmt: skip
NAMES = ("target_modules", "modules_to_save")
MERGE = "Or merge it and train a new adapter on top: model.adapter='merge'."


def going_on(config: RunConfig, hf_config: dict[str, Any] | None = None) -> RunConfig:
    """The config of a run that trains the adapter of a PEFT folder on, with the folder's settings; else `config`.

    hf_config: config.json of the model of the folder; by default it is read. Settings of `adapter` that have their
    defaults become the folder's. Raises ConfigError naming each that is set to something else.
    """
    model = config.model
    if hf_config is None and not model.random_init:
        resolve(model.path, model.revision)  # it is fetched, if it is on the hub
    folder = continued_adapter(model)
    if folder is None:
        _check_merges(config)
        return config
    opened = open_adapter(folder)
    kind = KINDS[opened.kind.PEFT_TYPE]
    if config.adapter.kind == "none":
        raise ConfigError(
            f"adapter.kind='none' trains the whole model, but model.path {config.model.path} is a PEFT folder, whose "
            "adapter would be trained on. Set model.adapter='merge' to merge it first and train the result."
        )
    hf_config = hf_config or hf_config_of(folder, model.base, allow_unknown=model.allowed)
    attached = adapters(_abstract(opened, hf_config))
    own: dict[str, Any] = {name: opened.config[field] for name, field in FIELDS[kind].items() if field in opened.config}
    own |= {"kind": kind, "target_modules": ",".join(sorted({last_name(path) for path in attached}))}
    saved = [name for name in saved_names(opened.config) if name != "score"]
    own["modules_to_save"] = ",".join(sorted({name.rsplit(".", 1)[-1] for name in saved})) or None
    if not own["target_modules"]:
        del own["target_modules"]
    _check_settings(config.adapter, own, folder)
    _check_head(config, opened)
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **own))


def merged_base(config: RunConfig, folder: Path) -> Path:
    """The path of the base of a run on top of a merged adapter: written to `folder` once, for the export to name."""
    model = config.model

    def write() -> None:
        if not (folder / "config.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            convert(
                model.path,
                str(folder),
                revision=model.revision,
                base=model.base,
                allow_unknown=model.allowed,
                console=SafeConsole(quiet=True),
            )

    on_primary(write)
    return folder


def describe(config: RunConfig) -> tuple[str, ...]:
    """A sentence on the adapter that a run goes on from; none if it begins with a fresh one."""
    folder = continued_adapter(config.model)
    if folder is None:
        return ()
    opened = open_adapter(folder)
    before = opened.config.get(DROPOUTS.get(KINDS[opened.kind.PEFT_TYPE], ""))
    dropout = "" if not before or before == config.adapter.dropout else (
        f" Its dropout was {before}; adapter.dropout is {config.adapter.dropout} in this run."
    )  # fmt: skip
    return (f"goes on training the adapter of {folder}, with a new optimizer.{dropout}",)


def _abstract(opened: PeftFolder, hf_config: dict[str, Any]) -> Decoder:
    def make() -> Decoder:
        model = models.random_model(models.config_from_hf(hf_config), seed=0)
        attach_structure(model, opened, opened.change_of(model))
        return model

    return nnx.eval_shape(make)


def _check_settings(given: AdapterConfig, own: dict[str, Any], folder: str) -> None:
    usual, wrong = AdapterConfig(), []
    for name in (*own, *FRESH):
        value, default = getattr(given, name), getattr(usual, name)
        if value == default or (name in own and _same(name, value, own[name])):
            continue
        wrong.append(f"adapter.{name}={value!r}" + (f" (there {own[name]!r})" if name in own else ""))
    if wrong:
        raise ConfigError(
            f"model.path is the PEFT folder {folder}, whose adapter is trained on, and these settings are not its: "
            f"{', '.join(wrong)}. Leave them out; they come from the folder. {MERGE}"
        )


def _same(name: str, given: Any, own: Any) -> bool:
    if name in NAMES:
        return {part.strip().rsplit(".", 1)[-1] for part in (given or "").split(",")} == set((own or "").split(","))
    return bool(given == own)


def _check_head(config: RunConfig, opened: PeftFolder) -> None:
    on_head = any("lm_head." in key for key in opened.tensors.keys)
    if method_of(config).head == "score" and on_head:
        raise ConfigError(
            f"method.name={config.method.name!r} trains a model without an LM head, and the adapter of {opened.path} "
            f"has a part on it. {MERGE}"
        )


def _check_merges(config: RunConfig) -> None:
    model = config.model
    path = model.path if model.random_init or model.path.startswith("hf://") else resolve(model.path)
    if model.adapter == "merge" and not model.random_init and not path.startswith("hf://") and not is_adapter(path):
        raise ConfigError(f"model.adapter='merge', but model.path {model.path} is not a PEFT folder: leave it out")
