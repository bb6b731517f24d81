"""What a run may say: permitted values, their ranges, and combinations that cannot be carried out."""

import dataclasses
import functools
import re
from typing import Any

from jaxft.errors import ConfigError, did_you_mean

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "attention", "dots", "offload")
ADAPTERS = ("none", "lora", "vera", "ia3", "prompt", "prefix")
QUANTIZATIONS = ("nf4", "nf4-dq", "int8", "int4")
# Name -> the fields of OptimConfig that it reads beside those that all do.
OPTIMIZERS = {
    "adamw": ("b1", "b2", "eps", "moments_dtype"),
    "adamw_8bit": ("b1", "b2", "eps"),
    "adafactor": ("scale_parameter",),
    "lion": ("b1", "b2", "moments_dtype"),
    "sgd": ("momentum", "moments_dtype"),
    "muon": ("momentum", "b1", "b2", "eps", "moments_dtype"),
    "apollo": ("rank", "b1", "b2", "eps", "moments_dtype"),
    "schedule_free_adamw": ("b1", "b2", "eps"),
}
# What these are where they are not set.
UNSET = {"b1": None, "b2": None, "eps": None, "momentum": None, "rank": None, "scale_parameter": False,
         "moments_dtype": "float32"}  # fmt: skip
SCHEDULES = ("constant", "linear", "cosine")
FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text")
TRAIN_ON = ("assistant", "last", "all")
TRUNCATION = ("refuse", "drop", "right")
TURNS = ("auto", "together", "split")
REASONING = ("keep", "inline", "drop")
OMISSIONS = ("refuse", "warn")
EVAL_FIGURES = ("eval_loss", "eval_perplexity", "eval_mean_token_accuracy")
LOSS_TYPES = ("nll", "dft")
METRICS = ("exact_match", "json_valid", "json_exact")
CHOICES = {
    "model.dtype": DTYPES, "model.param_dtype": DTYPES, "model.remat": REMAT_POLICIES,
    "model.quantization": QUANTIZATIONS, "adapter.kind": ADAPTERS,
    "data.format": FORMATS, "data.train_on": TRAIN_ON, "data.truncation": TRUNCATION, "data.turns": TURNS,
    "data.reasoning": REASONING, "data.omissions": OMISSIONS, "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES, "optim.moments_dtype": DTYPES, "train.gradient_dtype": DTYPES,
    "train.loss_type": LOSS_TYPES, "checkpoint.best_mode": ("min", "max"), "checkpoint.best_metric": EVAL_FIGURES,
    "eval.metric": METRICS,
}  # fmt: skip
LORA_STARTS = r"default|gaussian|(pissa|loftq|eva)(_niter_\d+)?|olora"
# Fields of the LoRA family, and what they are when nobody asked for it.
LORA_ALONE = {
    "use_rslora": False, "use_dora": False, "init_lora_weights": "default", "exclude_modules": None,
    "layers_to_transform": None, "rank_pattern": None, "alpha_pattern": None,
}  # fmt: skip
# (fields, what a value of theirs is, in words)
RANGES = (
    (("adapter.r", "adapter.alpha", "adapter.num_virtual_tokens", "data.max_length", "data.limit", "data.eval_limit",
      "data.eval_fraction", "optim.learning_rate", "optim.eps", "optim.clip_norm", "train.batch_size",
      "train.accumulation_steps", "train.epochs", "train.steps", "train.log_every", "train.eval_every",
      "checkpoint.every", "checkpoint.keep", "eval.limit", "eval.max_new_tokens", "eval.batch_size", "optim.rank",
      "optim.loraplus_lr_ratio", "train.neftune_noise_alpha"), lambda value: value > 0, "be above zero"),
    (("optim.warmup_steps", "optim.weight_decay", "router.load_balancing", "router.z_loss", "train.z_loss"),
     lambda value: value >= 0, "not be negative"),
    (("adapter.dropout", "data.eval_fraction", "optim.warmup_ratio", "optim.b1", "optim.b2", "optim.momentum",
      "train.label_smoothing_factor", "train.ema_decay"),
     lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    (("optim.layer_decay",), lambda value: 0 < value < 1, "be above 0 and below 1"),
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
    _check_mixture(config.data)
    _check_step(config)
    _check_optimizer(config)
    _check_loss(config.train)
    _check_held_out(config)
    _check_mesh(config.mesh)


def names_in(text: str | None) -> tuple[str, ...]:
    """The names of a comma-separated list."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def layers_in(text: str) -> tuple[int, ...]:
    """The layers of `0-3,8`, sorted. Raises ConfigError for what is neither a number nor a range."""
    numbers: set[int] = set()
    for part in names_in(text):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ConfigError(f"adapter.layers_to_transform={text!r}: {part!r} is no layer (8) and no range (0-3)")
        numbers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def pattern_in(key: str, text: str | None, kind: type) -> dict[str, Any]:
    """What `q_proj:8,o_proj:32` says, each value a `kind` above zero. Raises ConfigError for another form."""
    out = {}
    for part in names_in(text):
        pattern, _, value = part.rpartition(":")
        try:
            out[pattern.strip()] = kind(value)
            re.compile(pattern)
        except (ValueError, re.error):
            raise ConfigError(f"{key}={text!r}: {part!r} is not of the form pattern:{kind.__name__}") from None
        if not pattern.strip() or out[pattern.strip()] <= 0:
            raise ConfigError(f"{key}={text!r}: {part!r} wants a pattern and a number above zero")
    return out


def _value(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _check_step(config: Any) -> None:
    optim, train = config.optim, config.train
    if not config.model.path:
        raise ConfigError("model.path is empty: give a Hugging Face folder, a GGUF file or hf://owner/name")
    if not config.data.train and not config.data.mixture:
        raise ConfigError(
            "data.train is empty: give a .jsonl file, a datasets folder, hf://owner/name or tfds:name, or several of "
            "them in data.mixture"
        )
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
    if config.adapter.kind != "none" and config.model.trainable is not None:
        raise ConfigError(
            f"model.trainable={config.model.trainable!r} says which parameters of the model move, but "
            f"adapter.kind={config.adapter.kind!r} trains adapters beside it: set one of them to None"
        )
    _check_virtual_tokens(config)
    if config.adapter.init_lora_weights.startswith("loftq") and not config.model.quantization:
        raise ConfigError(
            f"adapter.init_lora_weights={config.adapter.init_lora_weights!r} makes up for what quantising loses, but "
            "model.quantization is None: set it, or begin with 'default'"
        )
    if config.adapter.init_lora_weights.startswith("loftq") and config.adapter.use_dora:
        raise ConfigError("adapter.use_dora takes its lengths from the quantised base, not from loftq's start: set one")
    _check_adapter(config.adapter)


def _check_adapter(adapter: Any) -> None:
    if adapter.kind == "none":
        return
    if not adapter.targets:
        raise ConfigError("adapter.target_modules is empty: give 'all-linear' or names such as 'q_proj,v_proj'")
    if not re.fullmatch(LORA_STARTS, adapter.init_lora_weights):
        raise ConfigError(
            f"adapter.init_lora_weights={adapter.init_lora_weights!r} is not one of default, gaussian, pissa, "
            "pissa_niter_N, olora, loftq, loftq_niter_N, eva, eva_niter_N"
        )
    _ = adapter.layers, adapter.ranks, adapter.alphas  # each refuses what it cannot read
    if adapter.layers == ():
        raise ConfigError("adapter.layers_to_transform is empty: give layers such as '0-3,8', or None for all")
    if adapter.kind == "lora":
        return
    for name, default in LORA_ALONE.items():
        if getattr(adapter, name) != default:
            raise ConfigError(f"adapter.{name} is read by adapter.kind='lora', not by adapter.kind={adapter.kind!r}")


def _check_optimizer(config: Any) -> None:
    optim, adapted = config.optim, config.adapter.kind != "none"
    for field, unset in UNSET.items():
        value = getattr(optim, field)
        if value != unset and field not in OPTIMIZERS[optim.name]:
            readers = ", ".join(name for name, fields in OPTIMIZERS.items() if field in fields)
            raise ConfigError(
                f"optim.{field}={value!r} does nothing with optim.name={optim.name!r}, which has no such setting; it "
                f"is read by {readers}. Set it to {unset!r}."
            )
    if optim.name == "schedule_free_adamw":
        if optim.schedule != "constant":
            raise ConfigError(
                f"optim.name='schedule_free_adamw' averages in place of a falling learning rate, so optim.schedule="
                f"{optim.schedule!r} would slow it down twice: set optim.schedule to 'constant'; warm-up may stay"
            )
        if optim.b1 == 0:
            raise ConfigError("optim.b1=0 leaves schedule_free_adamw without an average: usual are 0.9 to 0.98")
        if config.train.ema_decay is not None:
            raise ConfigError("schedule_free_adamw averages the weights itself: set train.ema_decay to None")
    if optim.name == "apollo" and adapted:
        raise ConfigError(
            f"optim.name='apollo' projects whole matrices to a low rank, and adapter.kind={config.adapter.kind!r} "
            "trains few numbers already: use another optimizer, or adapter.kind='none'"
        )
    if optim.loraplus_lr_ratio is not None and config.adapter.kind != "lora":
        raise ConfigError(
            f"optim.loraplus_lr_ratio={optim.loraplus_lr_ratio} is of LoRA's B against its A, and "
            f"adapter.kind={config.adapter.kind!r} has neither: set it to None"
        )


def _check_loss(train: Any) -> None:
    if train.loss_type == "dft" and train.label_smoothing_factor:
        raise ConfigError(
            f"train.loss_type='dft' weighs each target by its own probability, so that there is none to smooth: set "
            f"train.label_smoothing_factor={train.label_smoothing_factor} to 0"
        )
    if not train.use_ema and train.ema_decay is None:
        raise ConfigError("train.use_ema=False does nothing without train.ema_decay: there is no average to leave out")


def _check_virtual_tokens(config: Any) -> None:
    kind, count = config.adapter.kind, config.adapter.virtual_tokens
    if count and count >= config.data.max_length:
        raise ConfigError(
            f"adapter.num_virtual_tokens={count} leaves no room for rows in data.max_length={config.data.max_length}: "
            "every row begins with them"
        )
    if count and config.export.merged:
        raise ConfigError(
            f"export.merged=True, but adapter.kind={kind!r} cannot be merged into weights: set it to False"
        )
    if count and config.adapter.saved:
        raise ConfigError(
            f"adapter.modules_to_save={config.adapter.modules_to_save!r} has no place in PEFT's folders of "
            f"adapter.kind={kind!r}: set it to None"
        )
    if config.adapter.prompt_init_text is not None and kind != "prompt":
        raise ConfigError(f"adapter.prompt_init_text is of adapter.kind='prompt', not of {kind!r}: set it to None")


def _check_mixture(data: Any) -> None:
    if data.mixture and data.train:
        raise ConfigError(f"data.train={data.train!r} and data.mixture both name training sets; set data.train=''")
    for name, one in data.mixture.items():
        key = f"data.mixture.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(
                f"{key}: the name of a set is made of letters, digits and _, so that it can be overridden"
            )
        if not one.path:
            raise ConfigError(f"{key}.path is empty: give what data.train would take")
        for own, choices in (("format", FORMATS), ("train_on", TRAIN_ON)):
            value = getattr(one, own)
            if value is not None and value not in choices:
                raise ConfigError(f"{key}.{own}={value!r} is not one of {', '.join(choices)}")
        if one.weight < 0:
            raise ConfigError(f"{key}.weight={one.weight} must not be negative")
        for own in ("limit", "max_epochs"):
            if getattr(one, own) is not None and getattr(one, own) <= 0:
                raise ConfigError(f"{key}.{own}={getattr(one, own)} must be above zero")
    if data.stages is not None and not data.mixture:
        raise ConfigError(f"data.stages={data.stages!r} weighs the sets of data.mixture, which is empty")
    if data.mixture:
        taking_part = {name for _, weights in data.schedule for name in weights}
        idle = sorted(set(data.mixture) - taking_part)
        if idle:
            raise ConfigError(f"data.mixture: {', '.join(idle)} would never be trained on; leave it out, or weigh it")


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
