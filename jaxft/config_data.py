"""The data section of a run: where rows come from, how they are read, and in which mixture."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxft.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class MixtureSet:
    """One of the sets of `data.mixture`, under a name of your choice. None: as the field of that name in `data`."""

    path: str = ""  # as `data.train`
    weight: float = 1.0  # share of the tokens of training, relative to the weights of the other sets
    split: str | None = None  # part of a set that has parts; None: data.train_split
    format: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    text_field: str | None = None
    train_on: str | None = None
    limit: int | None = None  # use only the first rows
    max_epochs: float | None = None  # refuse a run that would see the set more often


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become token sequences."""

    train: str = ""  # .jsonl file, datasets folder, hf://owner/name, or tfds:name
    mixture: dict[str, MixtureSet] = field(default_factory=dict)  # several training sets in place of `train`
    stages: str | None = None  # which of them take part when; None: all of them all the time
    eval: str | None = None
    train_split: str = "train"  # for datasets and tfds
    eval_split: str = "validation"
    tfds_data_dir: str | None = None  # where tfds: sets stand; None: the default of TFDS
    eval_fraction: float | None = None  # hold this share of `train` out when `eval` is not given
    limit: int | None = None  # use only the first rows of train
    eval_limit: int | None = None
    format: str = "auto"
    prompt_field: str = "prompt"  # columns of a prompt/completion set
    completion_field: str = "completion"
    text_field: str = "text"
    chat_template: str | None = None  # path of a Jinja file that replaces the tokenizer's
    train_on: str = "assistant"  # assistant turns, the last assistant turn, or all tokens
    turns: str = "auto"  # answers that share a sequence: those that inference would see so; all, or refuse; none
    reasoning: str = "keep"  # thoughts as the row has them; written into the content as <think>; left out
    omissions: str = "refuse"  # where the chat template leaves a part of a row out: refuse, or warn
    max_length: int = 1024  # tokens in a training sequence
    truncation: str = "refuse"  # rows longer than max_length: refuse to start, drop, cut the right
    packing: bool = True
    shuffle: bool = True

    @property
    def schedule(self) -> tuple[tuple[float, dict[str, float]], ...]:
        """The stages of a mixture as (share of the steps, weight of every set that takes part). Raises ConfigError."""
        return stages_of(self.stages, {name: one.weight for name, one in self.mixture.items()})

    def of_set(self, name: str) -> "DataConfig":
        """How one set of the mixture is read: these settings, with the set's own in their place."""
        own = dataclasses.asdict(self.mixture[name])
        renamed = {"train": own["path"], "train_split": own["split"]}
        columns = ("format", "prompt_field", "completion_field", "text_field", "train_on", "limit")
        given = renamed | {key: own[key] for key in columns}
        given = {key: value for key, value in given.items() if value is not None}
        return dataclasses.replace(self, **given, mixture={}, stages=None)


def stages_of(text: str | None, weights: Mapping[str, float]) -> tuple[tuple[float, dict[str, float]], ...]:
    """The stages that `data.stages` describes: (share of the steps, weight by set), without sets of weight 0.

    text: `0.7: general, domain=2; 0.3: domain`: stages with `;` between them, each with its share of the steps and
    its sets, which have a weight of their own there or the one in weights; None: one stage with all of weights.
    Raises ConfigError for what cannot be read, an unknown set, a stage without weight, shares that are not 1 together.
    """
    if text is None:
        stages = [(1.0, dict(weights))] if weights else []
    else:
        stages = [_stage(part.strip(), weights) for part in text.split(";") if part.strip()]
        total = sum(share for share, _ in stages)
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"data.stages={text!r}: the shares of the steps add up to {total:g}, not to 1")
    for share, taking_part in stages:
        if sum(taking_part.values()) <= 0:
            raise ConfigError(f"data.stages={text!r}: no set has a weight above zero in the stage of {share:g}")
    return tuple((share, {name: w for name, w in taking_part.items() if w > 0}) for share, taking_part in stages)


def _stage(text: str, weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    share, _, members = text.partition(":")
    taking_part: dict[str, float] = {}
    for member in members.split(","):
        name, given, weight = (piece.strip() for piece in member.partition("="))
        if name not in weights:
            hint = did_you_mean(name, weights)
            raise ConfigError(
                f"data.stages: the stage {text!r} has a set {name!r}, which data.mixture has not.{hint} "
                f"Known: {', '.join(weights)}. A stage reads '0.7: NAME, NAME=WEIGHT'."
            )
        if name in taking_part:
            raise ConfigError(f"data.stages: the stage {text!r} has {name!r} twice")
        taking_part[name] = _number(weight, text) if given else weights[name]
    return _number(share.strip(), text), taking_part


def _number(text: str, stage: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"data.stages: in the stage {stage!r}, {text!r} must be a number that is not negative")
    return value
