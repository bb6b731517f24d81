"""What a run may say: permitted values, their ranges, and combinations that cannot be carried out."""

import dataclasses
import functools
from typing import Any

from jaxft.errors import ConfigError, did_you_mean

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "attention", "dots", "offload")
ADAPTERS = ("none", "lora")
QUANTIZATIONS = ("nf4", "nf4-dq", "int8", "int4")
OPTIMIZERS = ("adamw",)
SCHEDULES = ("constant", "linear", "cosine")
FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text")
TRAIN_ON = ("assistant", "last", "all")
TRUNCATION = ("refuse", "drop", "right")
EVAL_FIGURES = ("eval_loss", "eval_perplexity", "eval_mean_token_accuracy")
METRICS = ("exact_match", "json_valid", "json_exact")
CHOICES = {
    "model.dtype": DTYPES, "model.param_dtype": DTYPES, "model.remat": REMAT_POLICIES,
    "model.quantization": QUANTIZATIONS, "adapter.kind": ADAPTERS,
    "data.format": FORMATS, "data.train_on": TRAIN_ON, "data.truncation": TRUNCATION, "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES, "optim.moments_dtype": DTYPES, "train.gradient_dtype": DTYPES,
    "checkpoint.best_mode": ("min", "max"), "checkpoint.best_metric": EVAL_FIGURES, "eval.metric": METRICS,
}  # fmt: skip
# (fields, what a value of theirs is, in words)
RANGES = (
    (("adapter.r", "adapter.alpha", "data.max_length", "data.limit", "data.eval_limit", "data.eval_fraction",
      "optim.learning_rate", "optim.eps", "optim.clip_norm", "train.batch_size", "train.accumulation_steps",
      "train.epochs", "train.steps", "train.log_every", "train.eval_every", "checkpoint.every", "checkpoint.keep",
      "eval.limit", "eval.max_new_tokens", "eval.batch_size"), lambda value: value > 0, "be above zero"),
    (("optim.warmup_steps", "optim.weight_decay", "router.load_balancing", "router.z_loss"),
     lambda value: value >= 0, "not be negative"),
    (("adapter.dropout", "data.eval_fraction", "optim.warmup_ratio", "optim.b1", "optim.b2"),
     lambda value: 0 <= value < 1, "be at least 0 and below 1"),
)  # fmt: skip


def check(config: Any) -> None:
    """Raises ConfigError for the first thing in a RunConfig that cannot be carried out."""
    for key, choices in CHOICES.items():
        value = _value(config, key)
        if value is not None and value not in choices:
            raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}")
    for keys, fits, must in RANGES:
        for key in keys:
            value = _value(config, key)
            if value is not None and not fits(value):
                raise ConfigError(f"{key}={value} must {must}")
    _check_step(config)
    _check_held_out(config)
    _check_mesh(config.mesh)


def _value(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _check_step(config: Any) -> None:
    optim, train = config.optim, config.train
    if not config.model.path:
        raise ConfigError("model.path is empty: give a Hugging Face folder, a GGUF file or hf://owner/name")
    if not config.data.train:
        raise ConfigError("data.train is empty: give a .jsonl file, a datasets folder, hf://owner/name or tfds:name")
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        raise ConfigError("give at most one of optim.warmup_steps and optim.warmup_ratio; set the other to None")
    if not 0 <= optim.min_ratio <= 1:
        raise ConfigError(f"optim.min_ratio={optim.min_ratio} must be from 0 to 1, a share of optim.learning_rate")
    if train.batch_size % train.accumulation_steps:
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide into "
            f"train.accumulation_steps={train.accumulation_steps} equal micro-batches"
        )
    if config.model.quantization and config.adapter.kind == "none":
        raise ConfigError(
            f"model.quantization={config.model.quantization!r} is of weights that stand still, but adapter.kind='none' "
            "trains them all: set adapter.kind='lora', or model.quantization to None"
        )
    if config.adapter.kind != "none" and not config.adapter.targets:
        raise ConfigError("adapter.target_modules is empty: give 'all-linear' or names such as 'q_proj,v_proj'")


def _check_held_out(config: Any) -> None:
    data, checkpoint = config.data, config.checkpoint
    if data.eval is not None and data.eval_fraction is not None:
        raise ConfigError("data.eval and data.eval_fraction are two held-out sets; set one of them to None")
    if config.eval.metric and data.eval is None and data.eval_fraction is None:
        raise ConfigError("eval.metric scores held-out rows, but data.eval and data.eval_fraction are both None")
    if config.eval.metric and data.format == "text":
        raise ConfigError("eval.metric compares an answer with a reference; data.format='text' has no answers")
    if checkpoint.best_metric is None:
        return
    if data.eval is None and data.eval_fraction is None:
        raise ConfigError(
            f"checkpoint.best_metric={checkpoint.best_metric!r} needs held-out rows: set data.eval or "
            "data.eval_fraction"
        )
    if checkpoint.every is not None and (config.train.eval_every is None or checkpoint.every % config.train.eval_every):
        raise ConfigError(
            f"checkpoint.best_metric ranks checkpoints by held-out figures of their own step, but "
            f"checkpoint.every={checkpoint.every} is no multiple of train.eval_every={config.train.eval_every}"
        )


def _check_mesh(mesh: Any) -> None:
    sizes = {axis: size for axis, size in dataclasses.asdict(mesh).items() if axis != "auto"}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{axis}={size} must be a positive number of devices, or -1 for the rest")
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError("only one mesh axis may be -1 (the devices that remain)")
