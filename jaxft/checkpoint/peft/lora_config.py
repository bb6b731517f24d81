"""The fields of adapter_config.json of the LoRA family: their settings, the layers that they name, what is refused."""

import re
from collections.abc import Mapping
from typing import Any

from jaxft.adapters.lora import settings_for
from jaxft.adapters.lora.low_rank import LoRASettings
from jaxft.checkpoint.peft.experts import dense_targets, targets_of
from jaxft.checkpoint.peft.folder import named, refuse_unknown
from jaxft.errors import ModelError
from jaxft.models.nested import module_names

READ = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias",
)  # fmt: skip
# About training, or without an effect on linear layers, where PEFT sets fan_in_fan_out to False itself.
HARMLESS = (
    "loftq_config", "eva_config", "corda_config", "megatron_core", "lora_ga_config", "qalora_group_size",
    "fan_in_fan_out", "enable_lora", "merge_weights",
)  # fmt: skip
BIASES = ("none", "all", "lora_only")
# Initialisations of A and B only. The other kinds (pissa, olora, corda, loftq, ...) change the base's weights as well.
DRAWS = (True, False, None, "gaussian", "eva", "orthogonal")
CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # those that PEFT can write as plain LoRA on the unchanged base
MERGE = "Merge it with PEFT: PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
# Why a setting is not implemented, and what to do.
REASONS = {
    "layer_replication": f"it repeats layers of the base, which makes another model. {MERGE}",
    "use_qalora": f"it adds up groups of a layer's inputs before A. {MERGE}",
    "alora_invocation_tokens": "the adapter is switched on behind these tokens only, so it cannot be merged either",
    "arrow_config": "it chooses among other adapters for each token. Load one of those",
    "kasa_config": f"it changes the base's weights by their singular values. {MERGE}",
    "monteclora_config": f"it samples the weights of the adapter. {MERGE}",
    "velora_config": f"it compresses what the layers remember. {MERGE}",
    "use_bdlora": f"its halves are block diagonal. {MERGE}",
    "megatron_config": f"its layers are Megatron's, which are split over devices. {MERGE}",
}
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def read_settings(config: Mapping[str, Any]) -> LoRASettings:
    """LoRA settings of an adapter_config.json without its patterns. Raises ModelError naming each not implemented."""
    _refuse_changed_base(config.get("init_lora_weights"))
    for name, reason in REASONS.items():
        if config.get(name):
            raise ModelError(f"adapter_config.json has {name}={config[name]!r}, which is not implemented: {reason}.")
    refuse_unknown(config, _understood)
    if config.get("lora_bias") and config.get("use_dora"):
        raise ModelError("adapter_config.json has lora_bias beside use_dora, which PEFT does not have either")
    for name in ("lora_alpha", "lora_dropout"):
        if name in config and config[name] is None:
            raise ModelError(f"adapter_config.json has {name}=null, which is no number: leave it out, or give one")
    for r in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if not isinstance(r, int) or r < 1:
            raise ModelError(f"adapter_config.json has r={r!r}; a rank is a whole number above zero")
    return LoRASettings(
        r=config["r"],
        alpha=float(8 if config.get("lora_alpha") is None else config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
        use_bias=bool(config.get("lora_bias", False)),
    )


def settings_of(config: Mapping[str, Any], module: str) -> LoRASettings:
    """The settings of one module, named as in transformers, patterns included."""
    patterns = (config.get("rank_pattern") or {}, config.get("alpha_pattern") or {})
    return settings_for(read_settings(config), module, *patterns)


def _refuse_changed_base(init: Any) -> None:
    kind = str(init).partition("_niter_")[0]
    if kind in CONVERTED:
        raise ModelError(
            f"adapter_config.json has init_lora_weights={init!r}: the adapter belongs to a base from which PEFT took "
            "away its initial A and B. Save it as plain LoRA on the base itself: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=INITIAL), where INITIAL is the adapter as it was saved before "
            "training. Or, if that base was saved, give it with --base=FOLDER and set init_lora_weights to true."
        )
    if kind == "loftq":
        raise ModelError(
            f"adapter_config.json has init_lora_weights={init!r}: the adapter belongs to a base that LoftQ changed: "
            "path_initial_model_for_weight_conversion of PEFT's save_pretrained has no form for it. Give that base "
            "with --base=FOLDER and set init_lora_weights to true."
        )


def selected(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on a module, by its name in transformers."""
    names = module_names(module)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if named(dense_targets(config), names):
        return True
    if named(config.get("exclude_modules"), names):
        return False
    if module == "lm_head" and config.get("ensure_weight_tying") and selected(config, "model.embed_tokens"):
        return True  # PEFT ties the adapters of both
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str) or layers is None or layers == []:
        return named(targets, names)
    layer = _LAYER.match(module)
    layers = [layers] if isinstance(layers, int) else layers
    return named(targets, names) and layer is not None and int(layer[1]) in layers


def _understood(name: str, value: Any) -> bool:
    if name == "init_lora_weights":
        return value in DRAWS
    if name == "layers_pattern":
        return value in ("layers", ["layers"])
    if name == "bias":
        return value in BIASES
    return name in READ or name in HARMLESS


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether target_parameters names the experts of a module."""
    return bool(targets_of(config)) and named(list(config["target_parameters"]), module_names(module))
