"""The data section: where rows come from, how they are read, and in which mixture."""

import dataclasses
import datetime
import functools
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxft.config.fields import (
    ABOVE_ZERO,
    BETWEEN_ZERO_AND_ONE,
    BY_CONTENT,
    COMMA_SEPARATED,
    FREE_TO_CHANGE,
    JSON_LIST,
    NOT_NEGATIVE,
    PATH,
    ReadBy,
    Section,
    Spelling,
)
from jaxft.config.method import methods_on
from jaxft.errors import ConfigError, did_you_mean

Format = Literal["auto", "messages", "prompt_completion", "alpaca", "qa", "sharegpt", "segments", "text"]
SampleBy = Literal["document", "paragraph", "line"]
TrainOn = Literal["assistant", "last", "all"]
Truncation = Literal["refuse", "drop", "right", "left", "windows"]
CUTTING = ("right", "left", "windows")  # truncations after which an example is a part of a row
# Roles of messages.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PairsOf = Literal["best_worst", "best_others", "adjacent", "all"]
# Fields by which the columns of a set are read; every set of a mixture may have its own.
COLUMNS = (
    "format", "prompt_field", "completion_field", "text_field", "chosen_field", "rejected_field", "answers_field",
    "score_field", "pairs", "label_field", "rows_field", "sample_by", "messages_field", "system_field", "context_field",
    "roles", "marks", "ignored_columns",
)  # fmt: skip
BY_PAIRS = ReadBy("method.name", methods_on("pairs"), because="It is about rows with several answers to a prompt.")
BY_LABELS = ReadBy("method.name", methods_on("labelled"), because="It is about rows with a label.")


@dataclass(frozen=True, kw_only=True)
class MixtureSet(Section):
    """One of the sets of `data.mixture`, under a name of your choice. None: as the field of that name in `data`."""

    path: Annotated[str, BY_CONTENT, JSON_LIST, "where its rows come from, as `data.train`"] = ""
    weight: Annotated[
        float, NOT_NEGATIVE, "share of the tokens of training, relative to the weights of the other sets"
    ] = 1.0
    split: Annotated[str | None, "which part of a set that has parts; None: `data.train_split`"] = None
    format: Annotated[Format | None, "as `data.format`"] = None
    prompt_field: Annotated[str | None, "as `data.prompt_field`"] = None
    completion_field: Annotated[str | None, "as `data.completion_field`"] = None
    text_field: Annotated[str | None, "as `data.text_field`"] = None
    chosen_field: Annotated[str | None, "as `data.chosen_field`"] = None
    rejected_field: Annotated[str | None, "as `data.rejected_field`"] = None
    answers_field: Annotated[str | None, "as `data.answers_field`"] = None
    score_field: Annotated[str | None, "as `data.score_field`"] = None
    pairs: Annotated[PairsOf | None, "as `data.pairs`"] = None
    label_field: Annotated[str | None, "as `data.label_field`"] = None
    rows_field: Annotated[str | None, "as `data.rows_field`"] = None
    sample_by: Annotated[SampleBy | None, "as `data.sample_by`"] = None
    messages_field: Annotated[str | None, "as `data.messages_field`"] = None
    system_field: Annotated[str | None, "as `data.system_field`"] = None
    context_field: Annotated[str | None, "as `data.context_field`"] = None
    roles: Annotated[str | None, COMMA_SEPARATED, "as `data.roles`"] = None
    marks: Annotated[str | None, COMMA_SEPARATED, "as `data.marks`"] = None
    ignored_columns: Annotated[str | None, COMMA_SEPARATED, "as `data.ignored_columns`"] = None
    train_on: Annotated[TrainOn | None, "as `data.train_on`"] = None
    limit: Annotated[int | None, ABOVE_ZERO, "number of rows that are used, from the first; None: `data.limit`"] = None
    max_epochs: Annotated[
        float | None, ABOVE_ZERO, "refuse a run that would repeat the set more often than this; None: no limit"
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where rows come from and how they become token sequences."""

    train: Annotated[
        str,
        BY_CONTENT,
        JSON_LIST,
        "training rows: a file, a folder, `hf://owner/name`, `tfds:name`, a pattern such as `rows/*.jsonl`, or a list "
        "of these; see [formats](formats.md#where-rows-come-from)",
    ] = ""
    mixture: Annotated[
        dict[str, MixtureSet],
        "several training sets instead of `data.train`, each under a name; see [mixtures](mixtures.md)",
    ] = field(default_factory=dict)
    stages: Annotated[
        str | None,
        ReadBy("data.mixture", because="It weighs the sets of a mixture."),
        "`0.7: general, domain=2; 0.3: domain`: shares of the steps, and the sets of each share with their weights; "
        "None: all sets for the whole run",
    ] = None
    eval: Annotated[str | None, FREE_TO_CHANGE, JSON_LIST, "held-out rows, in the same forms as `data.train`"] = None
    train_split: Annotated[str, "which part of a training set that has parts (datasets, tfds)"] = "train"
    eval_split: Annotated[str, FREE_TO_CHANGE, "which part of a held-out set that has parts"] = "validation"
    rows_field: Annotated[
        str | None,
        "field of a .json file's object that holds the list of its rows, such as `data`, or `result.rows` within "
        "another object; None: the file is a list",
    ] = None
    sample_by: Annotated[
        SampleBy,
        "what a row of a text file (.txt) is. `document`: the whole file; `paragraph`: text up to a blank line; "
        "`line`: a line",
    ] = "document"
    tfds_data_dir: Annotated[str | None, BY_CONTENT, PATH, "folder of the `tfds:` sets; None: the default of TFDS"] = (
        None
    )
    eval_fraction: Annotated[
        float | None, BETWEEN_ZERO_AND_ONE, "share of the training rows that is held out if `data.eval` is None"
    ] = None
    limit: Annotated[int | None, ABOVE_ZERO, "number of training rows that are used, from the first; None: all"] = None
    eval_limit: Annotated[
        int | None, ABOVE_ZERO, FREE_TO_CHANGE, "number of held-out rows that are used, from the first; None: all"
    ] = None
    format: Annotated[Format, "form of the rows; `auto` goes by the keys of each row; see [formats](formats.md)"] = (
        "auto"
    )
    prompt_field: Annotated[str, "column of the prompts in prompt_completion rows, and in rows of preferences"] = (
        "prompt"
    )
    completion_field: Annotated[str, "column of the completions in prompt_completion rows"] = "completion"
    text_field: Annotated[str, "column of the text in text rows"] = "text"
    messages_field: Annotated[
        str | None, "column of the messages; None: `messages`, `conversations` or another of the usual names"
    ] = None
    system_field: Annotated[
        str | None, "column of a system prompt; None: one of the usual names, such as `system` and `system_prompt`"
    ] = None
    context_field: Annotated[
        str | None,
        "column of a text that belongs to the question of alpaca and qa rows; None: one of the usual names, such as "
        "`input` and `context`",
    ] = None
    roles: Annotated[
        str | None,
        COMMA_SEPARATED,
        "roles under names of your own: `customer=user, clerk=assistant`; None: the usual names alone",
    ] = None
    marks: Annotated[
        str | None,
        COMMA_SEPARATED,
        "marks of messages under names of your own, which say that 1 means `trained` or `untrained`: `learn=trained`; "
        "see [formats](formats.md#what-a-row-looks-like)",
    ] = None
    ignored_columns: Annotated[
        str | None,
        COMMA_SEPARATED,
        "columns that are not read, such as `notes, messages.rating`; `*`: all that nothing reads. None: a column that "
        "may carry meaning and that nothing reads is refused",
    ] = None
    bad_rows: Annotated[
        Literal["refuse", "skip"],
        "what happens to rows that cannot be trained on. `refuse`: all of them are named, and the run does not start; "
        "`skip`: they are left out and counted",
    ] = "refuse"
    merge_turns: Annotated[
        bool, "join consecutive messages of the same role, a blank line between them, for templates that refuse them"
    ] = False
    chosen_field: Annotated[str, BY_PAIRS, "column of the chosen answers in rows of [preferences](preferences.md)"] = (
        "chosen"
    )
    rejected_field: Annotated[str, BY_PAIRS, "column of the rejected answers"] = "rejected"
    answers_field: Annotated[
        str | None,
        BY_PAIRS,
        "column with a list of ranked answers; None: one of the usual names, such as `completions`",
    ] = None
    score_field: Annotated[
        str | None,
        BY_PAIRS,
        "the number by which the answers of a list are ranked, more is better unless its name ends in `rank`; None: "
        "one of the usual names, such as `overall_score`",
    ] = None
    pairs: Annotated[
        PairsOf,
        BY_PAIRS,
        "which pairs are made of a list of ranked answers, always of two that are ranked differently. `best_worst`: "
        "one; `best_others`: the best with each other one; `adjacent`: each with the next in rank; `all`: any two",
    ] = "best_worst"
    label_field: Annotated[str, BY_LABELS, "column of the labels of answers, true if good and false if bad"] = "label"
    chat_template: Annotated[
        str | None, BY_CONTENT, PATH, "path of a Jinja file that replaces the tokenizer's chat template"
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any],
        "variables of the chat template, such as `{'enable_thinking': False}`; those of a row come first. They are "
        "written into the template of the run and of its exports, so that these render in the same way",
    ] = field(default_factory=dict)
    template_date: Annotated[
        str | None,
        Spelling(r"\d{4}-\d\d-\d\d", ("a date such as 2026-11-29",)),
        "the date that a chat template which reads the clock shows, in training, evaluation and exports; None: the "
        "day on which the run started",
    ] = None
    train_on: Annotated[
        TrainOn, "which tokens are trained. `assistant`: every assistant turn; `last`: the last one; `all`: all tokens"
    ] = "assistant"
    turns: Annotated[
        Literal["auto", "together", "split"],
        "which answers of a row share a sequence. `auto`: those that read the same at inference; `together`: all, "
        "else the run is refused; `split`: none; see [formats](formats.md#which-tokens-are-trained)",
    ] = "auto"
    reasoning: Annotated[
        Literal["keep", "inline", "drop"],
        "what becomes of thoughts in a row. `keep`: they stay a field of their turn; `inline`: they are written into "
        "the content as `<think>`; `drop`: they are left out",
    ] = "keep"
    omissions: Annotated[
        Literal["refuse", "warn"],
        "what happens if the chat template leaves out a part of a row. `refuse`: an error; `warn`: training on what "
        "the template shows",
    ] = "refuse"
    boundary: Annotated[
        Literal["refuse", "separate"],
        "what happens if a token of plain text spans the end of a prompt and the start of its completion. `refuse`: "
        "an error that says where to cut; `separate`: each is encoded alone, as a prompt is at inference",
    ] = "refuse"
    max_length: Annotated[int, ABOVE_ZERO, "length of a training sequence in tokens"] = 1024
    truncation: Annotated[
        Truncation,
        "what happens to rows longer than `data.max_length`. `refuse`: the run does not start; `drop`: they are left "
        "out; `right`: their right end is cut off; `left`: their beginning is cut off, so that the last answers stay; "
        "`windows`: plain text becomes several rows, which train each of its tokens once",
    ] = "refuse"
    window_overlap: Annotated[
        int | None,
        ABOVE_ZERO,
        ReadBy("data.truncation", ("windows",)),
        "tokens of the window before that the next one shows again, without training them; None: an eighth of "
        "`data.max_length`",
    ] = None
    packing: Annotated[bool, "put several rows into a sequence, where none sees another; no row is ever split"] = True
    num_proc: Annotated[
        int | None,
        ABOVE_ZERO,
        FREE_TO_CHANGE,
        "number of processes that tokenise rows; None: as many as cores, one for few rows",
    ] = None
    cache: Annotated[
        str,
        PATH,
        FREE_TO_CHANGE,
        "where tokenised rows are kept for the next run. `auto`: the cache of the user, if there are many rows; "
        "`none`: nowhere; else a folder; see [formats](formats.md#many-rows)",
    ] = "auto"
    shuffle: Annotated[bool, "draw a new order of sequences for every epoch, from `seed`"] = True

    @property
    def ignored_names(self) -> frozenset[str]:
        """The names and patterns of `ignored_columns`."""
        return _names(self.ignored_columns)

    @property
    def role_names(self) -> Mapping[str, str]:
        """The role by each name of `roles`."""
        return _pairs("data.roles", self.roles, ROLES)

    @property
    def mark_names(self) -> Mapping[str, str]:
        """`trained` or `untrained`, whichever 1 means, by each name of `marks`."""
        return _pairs("data.marks", self.marks, ("trained", "untrained"))

    @property
    def schedule(self) -> tuple[tuple[float, dict[str, float]], ...]:
        """The stages of a mixture: (share of the steps, weight by set) each. Raises ConfigError as parse_stages."""
        return parse_stages(self.stages, {name: one.weight for name, one in self.mixture.items()})

    @property
    def overlap(self) -> int:
        """Tokens that a window shares with the one before."""
        return max(1, self.max_length // 8) if self.window_overlap is None else self.window_overlap

    def of_set(self, name: str) -> "DataConfig":
        """The settings by which one set of the mixture is read: these, replaced by the set's own."""
        own = dataclasses.asdict(self.mixture[name])
        renamed = {"train": own["path"], "train_split": own["split"]}
        given = renamed | {key: own[key] for key in (*COLUMNS, "train_on", "limit")}
        given = {key: value for key, value in given.items() if value is not None}
        return dataclasses.replace(self, **given, mixture={}, stages=None)

    def check(self) -> None:
        if self.template_date is not None:
            try:
                datetime.date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ConfigError(f"data.template_date={self.template_date!r} is no date: {error}") from error
        for data in (self, *map(self.of_set, self.mixture)):
            _ = data.role_names, data.mark_names
        if not self.train and not self.mixture:
            raise ConfigError(
                "data.train is empty: give a file, a folder, hf://owner/name or tfds:name, a list of them, or several "
                "with weights in data.mixture"
            )
        if self.mixture and self.train:
            raise ConfigError(f"data.train={self.train!r} and data.mixture both name training sets; set data.train=''")
        if self.eval is not None and self.eval_fraction is not None:
            raise ConfigError("data.eval and data.eval_fraction are two held-out sets; set one of them to None")
        if self.truncation == "windows" and self.overlap >= self.max_length:
            raise ConfigError(
                f"data.window_overlap={self.overlap} must be below data.max_length={self.max_length}: a window shows "
                "so many tokens again before the first new one"
            )
        for name, one in self.mixture.items():
            key = f"data.mixture.{name}"
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigError(
                    f"{key}: the name of a set must consist of letters, digits and _, so that the command line can "
                    "override its fields"
                )
            if not one.path:
                raise ConfigError(f"{key}.path is empty: give what data.train would take")
        idle = sorted(set(self.mixture) - {name for _, weights in self.schedule for name in weights})
        if idle:
            raise ConfigError(
                f"data.mixture: {', '.join(idle)} would never be trained on; remove it, or give it a weight"
            )


@functools.cache
def _names(text: str | None) -> frozenset[str]:
    return frozenset(name for part in (text or "").split(",") if (name := part.strip()))


@functools.cache
def _pairs(key: str, text: str | None, choices: tuple[str, ...]) -> Mapping[str, str]:
    """The pairs of a text such as `a=user, b=assistant`. Raises ConfigError for another form, or an unknown choice."""
    pairs = {}
    for part in _names(text):
        # A mapping of a file is written with colons.
        name, _, value = (piece.strip() for piece in part.partition("=" if "=" in part else ":"))
        if not name or value not in choices:
            raise ConfigError(
                f"{key}={text!r}: {part!r} is not of the form NAME={'|'.join(choices)}.{did_you_mean(value, choices)}"
            )
        pairs[name] = value
    return types.MappingProxyType(pairs)


def parse_stages(text: str | None, weights: Mapping[str, float]) -> tuple[tuple[float, dict[str, float]], ...]:
    """The stages that `data.stages` describes: (share of the steps, weight by set), without sets of weight 0.

    text: stages separated by `;`, each with its share of the steps and its sets: `0.7: general, domain=2; 0.3: domain`.
    A set without a weight of its own has the one in `weights`. None: one stage with all of `weights`.
    Raises ConfigError for a text that cannot be read, an unknown set, a stage without weight, and shares that do not
    add up to 1.
    """
    if text is None:
        stages = [(1.0, dict(weights))] if weights else []
    else:
        stages = [_parse_stage(part.strip(), weights) for part in text.split(";") if part.strip()]
        total = sum(share for share, _ in stages)
        if abs(total - 1) > 1e-6:
            raise ConfigError(f"data.stages={text!r}: the shares of the steps add up to {total:g}, not to 1")
    for share, stage in stages:
        if sum(stage.values()) <= 0:
            where = "data.mixture" if text is None else f"data.stages={text!r}: in the stage of {share:g}"
            raise ConfigError(f"{where}: no set has a weight above zero, so that there are no rows to train on")
    return tuple((share, {name: weight for name, weight in stage.items() if weight > 0}) for share, stage in stages)


def _parse_stage(text: str, weights: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    share, _, members = text.partition(":")
    stage: dict[str, float] = {}
    for member in members.split(","):
        name, given, weight = (piece.strip() for piece in member.partition("="))
        if name not in weights:
            hint = did_you_mean(name, weights)
            raise ConfigError(
                f"data.stages: the stage {text!r} has a set {name!r}, which is not in data.mixture.{hint} "
                f"Known: {', '.join(weights)}. A stage has the form '0.7: NAME, NAME=WEIGHT'."
            )
        if name in stage:
            raise ConfigError(f"data.stages: the stage {text!r} has {name!r} twice")
        stage[name] = _parse_number(weight, text) if given else weights[name]
    return _parse_number(share.strip(), text), stage


def _parse_number(text: str, stage: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"data.stages: in the stage {stage!r}, {text!r} must be a number that is not negative")
    return value
