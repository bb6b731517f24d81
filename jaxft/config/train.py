"""The sections train, router, checkpoint, eval and export: the course of a run and what is kept of it."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxft.config.adapter import split_names
from jaxft.config.fields import (
    ABOVE_ZERO,
    BELOW_ONE,
    COMMA_SEPARATED,
    FREE_TO_CHANGE,
    NOT_NEGATIVE,
    PATH,
    Range,
    ReadBy,
    Section,
    Spelling,
)
from jaxft.config.model import Dtype
from jaxft.errors import ConfigError

ON_SPIKE = ReadBy("train.on_spike", ("warn", "skip", "stop"))
FEWEST = Range(lambda value: value >= 8, "8 or more")  # of fewer steps, the median deviation says little


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long training lasts and how a step is divided."""

    batch_size: Annotated[int, ABOVE_ZERO, "sequences per optimizer step, over all devices"] = 16
    accumulation_steps: Annotated[
        int,
        ABOVE_ZERO,
        "micro-batches that each step's batch is divided into, one after another; the result is the same",
    ] = 1
    epochs: Annotated[float, ABOVE_ZERO, FREE_TO_CHANGE, "passes over the training sequences; may be a fraction"] = 1.0
    steps: Annotated[
        int | None, ABOVE_ZERO, FREE_TO_CHANGE, "length of the run in steps; None: `train.epochs` decides"
    ] = None
    gradient_dtype: Annotated[
        Dtype | None, "number type in which gradients of matrices are summed over devices; None: `model.dtype`"
    ] = None
    matmul_dtype: Annotated[
        Literal["int8", "fp8"] | None,
        ReadBy("method.name", ("sft",), because="It was tested with this method alone."),
        "number type to which operands of layers' products, and of the gradients of their inputs, are rounded; None: "
        "`model.dtype`; see [8-bit products](quantization.md#8-bit-products)",
    ] = None
    ema_decay: Annotated[
        float | None,
        BELOW_ONE,
        "decay of an exponential moving average of the trained weights, which is evaluated and exported in their "
        "place; None: no average",
    ] = None
    use_ema: Annotated[
        bool,
        ReadBy("train.ema_decay", because="There is no average to leave out."),
        "whether the average is evaluated and exported instead of the trained weights",
    ] = True
    log_every: Annotated[int, ABOVE_ZERO, FREE_TO_CHANGE, "steps between logged metrics"] = 10
    log_every_epochs: Annotated[
        float | None, ABOVE_ZERO, FREE_TO_CHANGE, "epochs between logged metrics, in place of `train.log_every`"
    ] = None
    eval_every: Annotated[
        int | None, ABOVE_ZERO, FREE_TO_CHANGE, "steps between held-out losses; None: only at the end"
    ] = None
    eval_every_epochs: Annotated[
        float | None,
        ABOVE_ZERO,
        FREE_TO_CHANGE,
        "epochs between held-out losses, in place of `train.eval_every`; may be a fraction",
    ] = None
    early_stopping_patience: Annotated[
        int | None,
        ABOVE_ZERO,
        FREE_TO_CHANGE,
        "training ends early after so many evaluations in a row in which `checkpoint.best_metric` did not get better "
        "than ever before; None: never",
    ] = None
    early_stopping_threshold: Annotated[
        float,
        NOT_NEGATIVE,
        FREE_TO_CHANGE,
        ReadBy("train.early_stopping_patience"),
        "a change of the metric by no more than this is not better",
    ] = 0.0
    on_spike: Annotated[
        Literal["off", "warn", "skip", "stop"],
        FREE_TO_CHANGE,
        "what is done about a step whose loss or gradient norm is far above those before, or not finite: `warn` says "
        "so, `skip` leaves its update out, `stop` saves the step before and ends; see [spikes](checkpoints.md#spikes)",
    ] = "off"
    spike_threshold: Annotated[
        float,
        ABOVE_ZERO,
        FREE_TO_CHANGE,
        ON_SPIKE,
        "how far above the median of the last steps a spike is, in robust standard deviations",
    ] = 10.0
    spike_window: Annotated[
        int, FEWEST, FREE_TO_CHANGE, ON_SPIKE, "number of last steps that the next one is compared with"
    ] = 50

    report_to: Annotated[
        str | None,
        FREE_TO_CHANGE,
        COMMA_SEPARATED,
        Spelling(
            r"(wandb|mlflow|trackio)( *, *(wandb|mlflow|trackio))*", ("wandb", "mlflow", "trackio", "a list of these")
        ),
        "trackers of experiments that get the metrics too, comma separated: `wandb,mlflow`; see "
        "[trackers](checkpoints.md#trackers)",
    ] = None

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in report_to, each once."""
        return tuple(dict.fromkeys(split_names(self.report_to)))

    def check(self) -> None:
        if self.eval_every is not None and self.eval_every_epochs is not None:
            raise ConfigError(
                f"train.eval_every={self.eval_every} counts steps and train.eval_every_epochs={self.eval_every_epochs} "
                "epochs: set one of them to None"
            )
        if self.batch_size % self.accumulation_steps:
            raise ConfigError(
                f"train.batch_size={self.batch_size} does not divide into train.accumulation_steps="
                f"{self.accumulation_steps} equal micro-batches: make the former a multiple of the latter"
            )


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Section):
    """Losses on the routers of a model with experts, added to the method's; see [experts](models.md#experts)."""

    load_balancing: Annotated[
        float | None,
        NOT_NEGATIVE,
        "coefficient of the load-balancing loss; None: the model's own if its routers are trained, else 0",
    ] = None
    z_loss: Annotated[float, NOT_NEGATIVE, "coefficient of the routers' z-loss"] = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Which checkpoints are written and kept."""

    every: Annotated[int | None, ABOVE_ZERO, FREE_TO_CHANGE, "steps between checkpoints; None: only the last"] = None
    every_epochs: Annotated[
        float | None,
        ABOVE_ZERO,
        FREE_TO_CHANGE,
        "epochs between checkpoints, in place of `checkpoint.every`; may be a fraction",
    ] = None
    keep: Annotated[int, ABOVE_ZERO, FREE_TO_CHANGE, "number of newest checkpoints that are kept"] = 2
    best_metric: Annotated[
        Literal[
            "eval_loss",
            "eval_perplexity",
            "eval_mean_token_accuracy",
            "eval_rewards/accuracies",
            "eval_rewards/margins",
            "eval_nll_loss",
            "eval_divergence",
            "eval_nll",
            "eval_teacher_agreement",
            "eval_accuracy",
            "eval_margin",
            "eval_reward",
        ]
        | None,
        FREE_TO_CHANGE,
        "held-out metric whose best checkpoint is kept as well; perplexity and accuracy of tokens are reported by sft, "
        "rewards by methods on pairs, nll_loss by orpo, accuracy and margin of scores by reward, divergence, "
        "nll, accuracy of tokens and agreement by distill, reward by methods that sample answers; None: only the "
        "newest are kept",
    ] = None
    best_mode: Annotated[
        Literal["min", "max"],
        FREE_TO_CHANGE,
        ReadBy("checkpoint.best_metric", refuse=False),
        "whether the smallest or the largest value is the best",
    ] = "min"

    def check(self) -> None:
        if self.every is not None and self.every_epochs is not None:
            raise ConfigError(
                f"checkpoint.every={self.every} counts steps and checkpoint.every_epochs={self.every_epochs} epochs: "
                "set one of them to None"
            )


METRICS = (
    "exact_match", "json_valid", "json_exact", "json_schema", "json_fields", "classification", "regex", "rouge1",
    "rouge2", "rougeL", "chrf",
)  # fmt: skip
METRIC = rf"({'|'.join(METRICS)}|[^,=:]+\.py:\w+)"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """The score of generated answers to held-out rows, before and after training."""

    metric: Annotated[
        str | None,
        COMMA_SEPARATED,
        Spelling(rf"{METRIC}( *, *{METRIC})*", (*METRICS, "FILE.py:NAME", "a list of these")),
        "how an answer is scored, see [formats](formats.md#scores); of several, comma separated, the first one is told "
        "first; None: only the held-out loss is measured",
    ] = None
    schema: Annotated[
        str | None,
        PATH,
        ReadBy("eval.metric"),
        "a file with the JSON Schema of the metrics `json_schema` and `json_fields`",
    ] = None
    pattern: Annotated[str | None, ReadBy("eval.metric"), "the regular expression of the metric `regex`"] = None
    limit: Annotated[int | None, ABOVE_ZERO, "number of held-out rows that are answered, from the first; None: all"] = (
        None
    )
    max_new_tokens: Annotated[int, ABOVE_ZERO, "length at which an answer is cut off, in tokens"] = 128
    batch_size: Annotated[int, ABOVE_ZERO, "answers that are generated at the same time"] = 32

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names in metric, each once."""
        return tuple(dict.fromkeys(split_names(self.metric)))

    def check(self) -> None:
        if "json_schema" in self.metrics and self.schema is None:
            raise ConfigError("eval.metric='json_schema' needs a schema: set eval.schema to a file with a JSON Schema")
        if self.schema is not None and not {"json_schema", "json_fields"} & {*self.metrics}:
            raise ConfigError(
                f"eval.schema={self.schema!r} is read by the metrics json_schema and json_fields, and eval.metric="
                f"{self.metric!r} is neither: add one of them, or set eval.schema to None"
            )
        if ("regex" in self.metrics) != (self.pattern is not None):
            raise ConfigError(
                f"eval.metric={self.metric!r} and eval.pattern={self.pattern!r}: the metric regex and its pattern "
                "belong together. Set both, or neither"
            )
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ConfigError(f"eval.pattern={self.pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """What is written when training ends, for other programs to read."""

    adapter: Annotated[bool, "write a PEFT folder if an adapter was trained"] = True
    checkpoint: Annotated[
        Literal["last", "best"],
        "which checkpoint is scored and exported when training ends; `best`: by `checkpoint.best_metric`",
    ] = "last"
    merged: Annotated[bool, "write a whole Hugging Face folder, with the adapter merged into the weights"] = False
