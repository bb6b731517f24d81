"""The run as frozen dataclasses; the only reader of `ml_collections.ConfigDict`.

A config file (`configs/NAME.py`) fills a ConfigDict made from these dataclasses and returns it
from `get_config(arg)`. `load` imports the file, applies overrides, and `resolve` turns the
result into a `RunConfig`, refusing unknown keys, wrong types and impossible combinations before
anything is loaded or compiled.
"""

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from jaxft.config_checks import check, layers_in, names_in, pattern_in
from jaxft.config_data import DataConfig, MixtureSet
from jaxft.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which pretrained model, and in which number types it computes and is stored."""

    path: str = ""  # Hugging Face folder, GGUF file, run folder, or hf://owner/name
    revision: str | None = None  # for hf:// paths: branch, tag or commit
    random_init: bool = False  # take only the shapes from path; draw the weights from `seed`
    dtype: str = "float32"  # of activations and matrix products
    param_dtype: str = "float32"  # of frozen parameters; trained ones are always float32
    quantization: str | None = None  # of the frozen linear layers under an adapter, while loading (QLoRA)
    remat: str = "none"
    trainable: str | None = None  # which parameters move where adapter.kind is none; None: all


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained beside the model. `kind="none"` trains the model itself: all of it, or `model.trainable`."""

    kind: str = "lora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"  # or names, comma separated: "q_proj,v_proj"
    use_rslora: bool = False  # scale by alpha / sqrt(r), arXiv:2312.03732
    use_dora: bool = False  # train lengths of kernels' columns apart, arXiv:2402.09353
    init_lora_weights: str = "default"  # or gaussian, olora, pissa, loftq, eva, the last three with _niter_N
    exclude_modules: str | None = None  # names, comma separated, left out of target_modules
    layers_to_transform: str | None = None  # only these layers: "0-3,8"
    rank_pattern: str | None = None  # other ranks: "q_proj:8,layers.0.mlp.down_proj:32", by PEFT's patterns
    alpha_pattern: str | None = None  # other alphas, likewise
    modules_to_save: str | None = None  # names, comma separated, trained whole in float32: "embed_tokens,norm"
    feedforward_modules: str = "down_proj"  # ia3: layers whose inputs are scaled, not their outputs
    num_virtual_tokens: int = 20  # prompt, prefix: positions that they take at the start of every row
    prompt_init_text: str | None = None  # prompt: text whose embeddings it begins as; None: drawn words

    @property
    def targets(self) -> tuple[str, ...]:
        """Module names, or the single name `all-linear` (every linear layer but the LM head)."""
        return names_in(self.target_modules)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Module names of exclude_modules."""
        return names_in(self.exclude_modules)

    @property
    def saved(self) -> tuple[str, ...]:
        """Module names of modules_to_save."""
        return names_in(self.modules_to_save)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Layer numbers of layers_to_transform, None for all. Raises ConfigError for what is no range of numbers."""
        return None if self.layers_to_transform is None else layers_in(self.layers_to_transform)

    @property
    def ranks(self) -> dict[str, int]:
        """rank_pattern as pattern -> rank. Raises ConfigError for another form."""
        return pattern_in("adapter.rank_pattern", self.rank_pattern, int)

    @property
    def alphas(self) -> dict[str, float]:
        """alpha_pattern as pattern -> alpha. Raises ConfigError for another form."""
        return pattern_in("adapter.alpha_pattern", self.alpha_pattern, float)

    @property
    def by_data(self) -> bool:
        """Whether A begins with what the data says (EVA)."""
        return self.kind == "lora" and self.init_lora_weights.startswith("eva")

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens every row begins with."""
        return self.num_virtual_tokens if self.kind in ("prompt", "prefix") else 0


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int | None = None  # at most one of warmup_steps and warmup_ratio
    warmup_ratio: float | None = None
    min_ratio: float = 0.0  # the schedule ends at min_ratio * learning_rate
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    rank: int | None = None
    scale_parameter: bool = False
    weight_decay: float = 0.0  # on matrices only: norms, biases and other vectors are left out
    clip_norm: float | None = 1.0
    moments_dtype: str = "float32"  # bfloat16 halves the optimizer's memory; rounded at random
    loraplus_lr_ratio: float | None = None
    layer_decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long training lasts and how a step is cut up."""

    batch_size: int = 16  # sequences per optimizer step over all devices
    accumulation_steps: int = 1
    epochs: float = 1.0
    steps: int | None = None  # where given, the run has so many steps, whatever epochs says
    gradient_dtype: str | None = None  # of matrices' gradients, summed over devices; None: model.dtype
    loss_type: str = "nll"
    label_smoothing_factor: float = 0.0
    z_loss: float = 0.0
    neftune_noise_alpha: float | None = None
    ema_decay: float | None = None
    use_ema: bool = True  # whether it is the average that is evaluated and exported, where there is one
    log_every: int = 10
    eval_every: int | None = None  # steps between held-out losses; None: only at the end


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Losses on the routers of a model with experts, added to its own; see [experts](models.md#experts)."""

    load_balancing: float | None = None  # coefficient; None: the model's own where its routers train, else 0
    z_loss: float = 0.0  # coefficient


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run while it goes on."""

    every: int | None = None  # steps between checkpoints; None: only the last
    keep: int = 2  # newest checkpoints kept
    best_metric: str | None = None  # for example eval_loss: also keep the best by it
    best_mode: str = "min"


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; -1 takes all that remain."""

    auto: bool = False  # choose all axes by batch size and heads; then the others are not read
    slice: int = 1  # slices joined by the data-centre network: only gradients cross it
    data: int = 1  # other rows, all weights
    fsdp: int = -1  # other rows, a part of each weight, gathered for use
    expert: int = 1  # like fsdp, and each with other experts
    context: int = 1  # other positions of the same rows
    tensor: int = 1  # other heads and inner units of the same rows


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The held-out score by generation, before and after training."""

    metric: str | None = None
    limit: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written for others when training ends."""

    adapter: bool = True  # a PEFT folder, where an adapter was trained
    merged: bool = False  # a whole Hugging Face folder


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, whole."""

    output_dir: str = "runs/unnamed"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to `config.json` in the run folder."""
        return dataclasses.asdict(self)


def default_config() -> config_dict.ConfigDict:
    """A locked ConfigDict with every field of `RunConfig` at its default, for config files to fill."""
    config = config_dict.ConfigDict(_defaults(RunConfig)).lock()
    config.data.mixture.unlock()  # its names are the file's own
    return config


def mixture_set(**fields: Any) -> config_dict.ConfigDict:
    """A set for `config.data.mixture.NAME`, with every field of MixtureSet. Raises ConfigError for an unknown one."""
    out = config_dict.ConfigDict(_defaults(MixtureSet)).lock()
    for name, value in fields.items():
        if name not in out:
            raise ConfigError(f"a mixture set has no field {name!r}.{did_you_mean(name, out)}")
        _set(out, name, value)
    return out


def load(path_with_arg: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """The run that a config file describes.

    path_with_arg: `configs/NAME.py` or `configs/NAME.py:arg`.
    overrides: `{"train.batch_size": 4}` or `["train.batch_size=4"]`.
    Raises ConfigError for a missing file, an unknown key, a wrong type, a bad combination.
    """
    if isinstance(overrides, Mapping):
        values = load_file(path_with_arg, ())
        for key, value in overrides.items():
            _set(values, key, value)
        return resolve(values)
    return resolve(load_file(path_with_arg, overrides))


def load_file(path_with_arg: str, assignments: Sequence[str]) -> config_dict.ConfigDict:
    """The file's ConfigDict after `a.b=value` assignments, read by ml_collections' config flags."""
    path = path_with_arg.split(":", 1)[0]
    if not os.path.isfile(path):
        here = os.path.dirname(path) or "."
        known = sorted(f for f in os.listdir(here) if f.endswith(".py")) if os.path.isdir(here) else []
        hint = did_you_mean(os.path.basename(path), known)
        raise ConfigError(f"no config file {path!r}.{hint} Files there: {', '.join(known) or 'none'}.")
    for assignment in assignments:
        if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", assignment, re.DOTALL):
            raise ConfigError(f"override {assignment!r} is not of the form section.field=value")
        _check_assignment(*assignment.split("=", 1))
    # ml_collections has no way to say None for a field whose type is a number.
    emptied = [a.split("=", 1)[0] for a in assignments if a.endswith("=None")]
    kept = [a for a in assignments if not a.endswith("=None")]
    values = flags.FlagValues()
    argv = ["jaxft", f"--config={path_with_arg}", *(f"--config.{a}" for a in kept)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections wraps what a config file raises into its own traceback text.
        first = _first_of(error)
        if isinstance(first, ConfigError):
            raise first from error
        if isinstance(first, (AttributeError, KeyError)):
            raise ConfigError(_unknown_key(first)) from error
        raise ConfigError(f"{path_with_arg}: {first}") from error
    for key in emptied:
        _set(values.config, key, None)
    return values.config


def _check_assignment(key: str, text: str) -> None:
    kind = _kind(key)
    if kind is None:
        raise ConfigError(_unknown(key))
    base = _base(kind)
    if text == "None":
        if not _optional(kind):
            raise ConfigError(f"{key}=None: the field takes {base.__name__} and cannot be left out")
    elif base in (int, float):
        try:
            base(text)
        except ValueError:
            raise ConfigError(f"{key}={text}: the field takes {base.__name__}") from None


def _first_of(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error


def resolve(values: config_dict.ConfigDict | Mapping[str, Any]) -> RunConfig:
    """Checked, frozen form of a ConfigDict or of a nested mapping such as `RunConfig.to_dict()`."""
    nested = values.to_dict() if isinstance(values, config_dict.ConfigDict) else dict(values)
    config = _build(RunConfig, nested, prefix="")
    check(config)
    return config


def from_json(path: str) -> RunConfig:
    """The run written in a run folder's `config.json`."""
    with open(path, encoding="utf-8") as file:
        return resolve(json.load(file))


def _defaults(cls: type) -> dict[str, Any]:
    default, hints, out = cls(), typing.get_type_hints(cls), {}
    for spec in dataclasses.fields(cls):
        kind, value = hints[spec.name], getattr(default, spec.name)
        if dataclasses.is_dataclass(kind):
            out[spec.name] = _defaults(kind)
        elif named(kind):
            out[spec.name] = config_dict.ConfigDict()
        elif _optional(kind):
            # A placeholder keeps the type of a field whose default is None.
            ref = config_dict.placeholder(_base(kind))
            ref.set(value)
            out[spec.name] = ref
        else:
            out[spec.name] = value
    return out


def named(kind: Any) -> Any:
    """The dataclass of a field that holds sections under free names; None for other fields."""
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None


def _optional(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind)


def _base(kind: Any) -> type:
    return next(a for a in typing.get_args(kind) if a is not type(None)) if _optional(kind) else kind


def _set(values: config_dict.ConfigDict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    node = values
    for section in sections:
        if not isinstance(node, config_dict.ConfigDict) or section not in node:
            raise ConfigError(_unknown(key))
        node = node[section]
    if not isinstance(node, config_dict.ConfigDict) or name not in node:
        raise ConfigError(_unknown(key))
    if isinstance(node.get_ref(name).get_type(), type) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if node.get_ref(name).get_type() is float else value
    if key == "data.mixture":
        sets = {n: mixture_set(**_section(fields, f"{key}.{n}")) for n, fields in _section(value, key).items()}
        value = config_dict.ConfigDict(sets)
    try:
        node[name] = value
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r}: {error}") from error


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints, kwargs = typing.get_type_hints(cls), {}
    for name in values:
        if name not in hints:
            raise ConfigError(_unknown(prefix + name))
    for name, value in values.items():
        kind, key = hints[name], prefix + name
        if dataclasses.is_dataclass(kind):
            kwargs[name] = _build(kind, _section(value, key), key + ".")
        elif named(kind):
            kwargs[name] = {
                n: _build(named(kind), _section(v, f"{key}.{n}"), f"{key}.{n}.")
                for n, v in _section(value, key).items()
            }
        else:
            kwargs[name] = _typed(key, value, kind)
    return cls(**kwargs)


def _section(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config key {key!r} is a section; got {value!r}")
    return value


def _typed(key: str, value: Any, kind: Any) -> Any:
    if value is None and _optional(kind):
        return None
    base = _base(kind)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, base) or (isinstance(value, bool) and base is not bool):
        raise ConfigError(f"config key {key!r} takes {base.__name__}, got {value!r}")
    return value


def _kinds(cls: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The type of every field by its dotted key; of sections under free names, with `NAME` for the name."""
    out = {}
    for name, kind in typing.get_type_hints(cls).items():
        if named(kind):
            out |= _kinds(named(kind), f"{prefix}{name}.NAME.")
        else:
            out |= _kinds(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return out


def _kind(key: str) -> Any:
    """The type of a field; None where there is none."""
    parts = key.split(".")
    return _kinds().get(key) or _kinds().get(".".join([*parts[:-2], "NAME", *parts[-1:]]))


def _unknown(key: str) -> str:
    keys = list(_kinds())
    hint = did_you_mean(key, keys)
    if "." not in key or not hint:
        # By the field's own name: the section was left out, or is the wrong one.
        leaf = key.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(leaf, {k.rsplit(".", 1)[-1] for k in keys}, n=1, cutoff=0.6)
        found = [repr(k) for k in keys if k.rsplit(".", 1)[-1] in near]
        hint = f" Did you mean {' or '.join(found)}?" if found else hint
    return f"unknown config key {key!r}.{hint}"


def _unknown_key(error: BaseException) -> str:
    # The config file itself named a field that does not exist; ml_collections tells only its last part.
    found = re.search(r"[\"']([\w.]+)[\"']", str(error))
    return _unknown(found.group(1)) if found else str(error)
