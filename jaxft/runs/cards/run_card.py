"""The model card of an export: what was trained, on what, with which settings, and how well it does."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.adapters.make import describe as describe_adapter
from jaxft.checkpoint.gguf.names import WRITTEN
from jaxft.checkpoint.hub.base import BaseFacts, base_facts
from jaxft.checkpoint.hub.card import Card, Result, markdown_code
from jaxft.checkpoint.load import LoadedModel, resolve
from jaxft.checkpoint.steps.access import steps_in
from jaxft.checkpoint.verify import Check, is_score_model
from jaxft.config import RunConfig
from jaxft.data.sources.listing import names_in
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import JaxftError
from jaxft.evaluation.statistics import wilson_interval
from jaxft.files.buckets.working_copy import checkpoints_of
from jaxft.files.paths import HUB
from jaxft.files.run_folder import DATA, METRICS, read_if_whole
from jaxft.methods import method_of
from jaxft.runs.cards.command import changed_fields, command_of, public_text
from jaxft.runs.folder import run_config
from jaxft.runs.identity.record import record_of
from jaxft.runs.scores import scores_of
from jaxft.terminal.text import safe_line
from jaxft.training.log import read_metrics

COUNTS = {
    "rows": "rows", "tokens": "tokens", "trained_tokens": "tokens of them that the loss is taken on",
    "sequences": "sequences",
}  # fmt: skip


def card_of(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    checks: Sequence[Check],
    *,
    form: str,
    base: BaseFacts,
    run: Path | None = None,
    step: int | None = None,
) -> Card:
    """The card of an export that was written and read back.

    form: `adapter` or `merged`. base: from `base_of_export`. run: the folder of the run that trained the model; None
    for a model that is only written in another form. step: that of its weights; None: the one that the run exports, or
    its newest checkpoint.
    """
    sections: list[tuple[str, str]] = []
    facts: dict[str, Any] = {}
    kind = "lora"
    if run is not None:
        config = run_config(run)
        step = step or record_of(run).exported or newest_step(run)
        results, kind = _results(run, step), config.adapter.kind
        sections = [("Training", _training(_named(config, base), run, step)), *_results_section(results)]
        facts = {"results": results, "datasets": _datasets(config), "tags": (config.method.name,)}
    sections.append(("Checks", _checks(checks, is_score_model(loaded))))
    return Card(
        title=_title(base, run),
        form="adapter" if form == "adapter" else "merged",
        base=base,
        peft_type={"prompt": "prompt-tuning", "prefix": "prefix-tuning"}.get(kind, kind),
        classifies=is_score_model(loaded),
        chats=tokenizer.chat_template is not None,
        trained=run is not None or loaded.adapter is not None,
        gguf=_has_gguf(loaded) and (form == "merged" or kind == "lora"),
        sections=tuple(sections),
        **facts,
    )


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none."""
    return max(steps_in(checkpoints_of(run)).whole(), default=0)


def base_of_export(loaded: LoadedModel) -> BaseFacts:
    """What is known of the base of a model in memory."""
    try:
        return base_facts(loaded.base, resolve(loaded.base) if loaded.base.startswith(HUB) else None)
    except JaxftError:  # the base is not there any more, and nothing of it is needed
        return base_facts(loaded.base, "")


def _has_gguf(loaded: LoadedModel) -> bool:
    return loaded.hf_config.get("model_type") in WRITTEN and not is_score_model(loaded)


def _title(base: BaseFacts, run: Path | None) -> str:
    if run is not None:
        return os.path.basename(os.path.abspath(run))
    return (base.name or "a local model").rpartition("/")[2]


def _named(config: RunConfig, base: BaseFacts) -> RunConfig:
    """The config with the base's name on the hub in place of a folder of this machine."""
    if base.name is None or config.model.path.startswith(HUB):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=HUB + base.name))


def _training(config: RunConfig, folder: Path, step: int) -> str:
    record, data = record_of(folder), read_if_whole(folder / DATA)
    train = config.train
    what = "all weights" if config.model.trainable is None else config.model.trainable
    rows = [
        ("method", method_of(config).describe(config)),
        ("trained", describe_adapter(config.adapter) if config.adapter.kind != "none" else what),
        ("steps", f"{step:,}" + ("" if record.steps in (None, step) else f" of {record.steps:,}")),
        ("batch", f"{train.batch_size} sequences of at most {config.data.max_length} tokens"),
        *((label, f"{data[name]:,}") for name, label in COUNTS.items() if isinstance(data.get(name), int)),
        *(
            (f"data, {markdown_code(key)}", _source(one))
            for key, one in record.reads.items()
            if key.startswith("data.")
        ),
    ]
    given = changed_fields(config, public=True)
    shown = "\n".join(f"| `{key}` | {markdown_code(text)} |" for key, text in given.items())
    return (
        "| | |\n|---|---|\n" + "\n".join(f"| {label} | {text} |" for label, text in rows)
        + "\n\nThe settings that are not jaxft's defaults:\n\n| setting | value |\n|---|---|\n" + shown
        + "\n\nThe run is repeated by this command, where local paths are shortened to their last part:\n\n    "
        + safe_line(command_of(config, public=True), most=20_000)
    )  # fmt: skip


def _source(read: Mapping[str, Any]) -> str:
    counts = f", {read['examples']:,} examples of {read['tokens']:,} tokens" if "tokens" in read else ""
    source = markdown_code(public_text(str(read["path"])))
    return f"{source}{counts}, SHA-256 of the token sequences `{str(read['digest'])[:16]}`"


def _datasets(config: RunConfig) -> tuple[str, ...]:
    """The training sets that have a name on the hub."""
    given = [config.data.train, *(one.path for one in config.data.mixture.values())]
    paths = [path for text in given for path in names_in(text)]
    names = [path.removeprefix(HUB).partition("@")[0].partition(":")[0] for path in paths if path.startswith(HUB)]
    return tuple(dict.fromkeys(names))


def _results(folder: Path, step: int) -> tuple[Result, ...]:
    """The held-out metrics that were measured after `step`, and the scores of the finished run."""
    out: list[Result] = []
    held_out = read_if_whole(folder / DATA).get("eval")
    rows = held_out.get("rows") if isinstance(held_out, dict) else None
    if (folder / METRICS).is_file():
        measured = [row for row in read_metrics(folder) if row["step"] == step and "eval_loss" in row]
        skipped = ("eval_seconds", "eval_tokens", "eval_rows")
        for name, value in (measured[-1] if measured else {}).items():
            if name.startswith("eval_") and name not in skipped:
                out.append(Result(metric=name.removeprefix("eval_"), value=value, rows=rows))
    scores = scores_of(folder)
    record = record_of(folder)
    if (record.exported or record.steps) in (None, step) and "tuned" in scores:
        out.append(_score(scores, "tuned"))
    return tuple(out)


def _score(scores: Mapping[str, Any], which: str) -> Result:
    own, details = scores[which], {}
    interval = own.get("interval")
    if isinstance(own.get("correct"), int) and own["total"]:
        interval, details["correct"] = wilson_interval(own["correct"], own["total"]), own["correct"]
    if interval:
        details["ci95"] = [round(end, 4) for end in interval]
    if which == "tuned" and "base" in scores:
        details["base_model"] = scores["base"]["value"]
    return Result(metric=scores["metric"], value=own["value"], rows=own.get("total"), details=details)


def _results_section(results: Sequence[Result]) -> list[tuple[str, str]]:
    if not results:
        return []
    lines = ["| metric | value | held-out rows | |", "|---|---|---|---|"]
    for one in results:
        details = dict(one.details or {})
        words = []
        if "ci95" in details:
            low, high = details["ci95"]
            words.append(f"{details['correct']} right, 95% interval {low:.3f} to {high:.3f}")
        if "base_model" in details:
            words.append(f"base model {details['base_model']:.4g}")
        lines.append(
            f"| {one.metric} | {one.value:.4g} | {'' if one.rows is None else one.rows} | {'; '.join(words)} |"
        )
    return [("Results", "\n".join(lines))]


def _checks(checks: Sequence[Check], scores: bool) -> str:
    what = "scores" if scores else "logits"
    lines = [f"- {one.reader}: {what} within {one.difference:.1e} of the model in memory" for one in checks]
    return "The files were read back after they had been written:\n\n" + "\n".join(lines)
