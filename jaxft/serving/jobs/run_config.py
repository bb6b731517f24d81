"""The config of a job's run: which settings a client may give, and the whole of it for the worker.

Clients give settings by name from a list, which has nothing that names a path, a module, an address or a template.
"""

from collections.abc import Mapping
from typing import Any

from jaxft.config import RunConfig, resolve
from jaxft.config.fields import all_fields
from jaxft.config.reading.overrides import default_values, parse_assignment, set_value
from jaxft.errors import ConfigError, did_you_mean
from jaxft.serving.jobs.folder import JobFolder, JobSpec
from jaxft.serving.jobs.hyperparameters import RATES

SECTIONS = ("adapter.", "optim.", "method.sft.", "router.")
FIELDS = (
    "data.max_length", "data.truncation", "data.window_overlap", "data.packing", "data.train_on", "data.turns",
    "data.reasoning", "data.omissions", "data.boundary", "data.merge_turns", "data.bad_rows", "data.format",
    "data.prompt_field", "data.completion_field", "data.text_field", "data.messages_field", "data.system_field",
    "data.context_field", "data.roles", "data.marks", "data.ignored_columns", "data.eval_fraction", "data.limit",
    "data.eval_limit", "data.shuffle", "data.template_date", "model.dtype", "model.param_dtype", "model.quantization",
    "model.remat", "train.accumulation_steps", "train.gradient_dtype", "train.ema_decay", "train.use_ema",
    "train.log_every", "train.eval_every", "train.eval_every_epochs", "train.early_stopping_patience",
    "train.early_stopping_threshold", "train.on_spike", "train.spike_threshold", "train.spike_window",
    "checkpoint.every", "checkpoint.every_epochs", "checkpoint.best_metric", "checkpoint.best_mode",
    "export.checkpoint", "eval.metric", "eval.limit", "eval.max_new_tokens", "eval.batch_size",
)  # fmt: skip
# Set by a hyperparameter, and by nothing else.
BY_HYPERPARAMETER = {
    "train.epochs": "n_epochs", "train.steps": "n_epochs", "train.batch_size": "batch_size",
    "optim.learning_rate": "learning_rate_multiplier", "seed": "seed", "data.train": "training_file",
    "data.eval": "validation_file", "model.path": "model",
}  # fmt: skip
KEPT_CHECKPOINTS = 2  # of those that a run can go on from; exported ones are counted apart


def allowed_keys() -> list[str]:
    """The settings that a job may give."""
    fields = all_fields(RunConfig)
    keys = [key for key, field in fields.items() if key.startswith(SECTIONS) and not field.is_path]
    return sorted({*keys, *FIELDS} - BY_HYPERPARAMETER.keys())


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting that a job may not give, or whose value is of another type or not allowed."""
    known = allowed_keys()
    values = RunConfig().to_dict()
    for key, value in config.items():
        if key in BY_HYPERPARAMETER:
            raise ConfigError(f"{key} is set by {BY_HYPERPARAMETER[key]} of the job")
        if key not in known:
            raise ConfigError(f"{key[:80]!r} is no setting of a job.{did_you_mean(key[:80], known)}")
        set_value(values, key, value)
        all_fields(RunConfig)[key].check(value)


def config_of(
    spec: JobSpec, folder: JobFolder, *, positions: int | None = None, resolved: Mapping[str, Any] | None = None
) -> RunConfig:
    """The checked config of a job's run. Raises ConfigError for settings that do not fit to each other.

    positions: the longest sequence of the model. resolved: n_epochs, learning_rate_multiplier and sequences, the size
    of a batch; before they are known, the rows are examined with the settings that they do not change.
    """
    values = default_values()
    for override in spec.overrides:
        set_value(values, *parse_assignment(override))
    values["output_dir"], values["seed"], values["model"]["path"] = str(folder.run), spec.seed, spec.base
    set_value(values, "data.train", [str(folder.training)])
    if not any(override.startswith("data.max_length=") for override in spec.overrides):
        values["data"]["max_length"] = min(spec.context, positions or spec.context)
    values["checkpoint"].update(every_epochs=1.0, keep=KEPT_CHECKPOINTS)
    if folder.validation.is_file():
        set_value(values, "data.eval", [str(folder.validation)])
        values["train"]["eval_every_epochs"] = 1.0
    for key, value in _exclusive(spec.config).items():
        set_value(values, key, value)
    multiplier = (resolved or spec.hyperparameters).get("learning_rate_multiplier") or 1.0
    rate = RATES["none" if values["adapter"]["kind"] == "none" else "adapter"]
    values["optim"]["learning_rate"] = rate * multiplier
    if resolved is not None:
        values["train"].update(epochs=float(resolved["n_epochs"]), batch_size=resolved["sequences"], steps=None)
    return resolve(values)


def _exclusive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job, and with a period in steps, no period in epochs, which is the default of a job."""
    out = dict(config)
    for steps, epochs in (
        ("checkpoint.every", "checkpoint.every_epochs"),
        ("train.eval_every", "train.eval_every_epochs"),
    ):
        if out.get(steps) is not None:
            out.setdefault(epochs, None)
    return out
