"""The texts and numbers of the page, from the files of a run folder."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.adapters.make import describe
from jaxft.config import AdapterConfig
from jaxft.evaluation.statistics import Interval, wilson_interval
from jaxft.runs.report.files import Row, is_number, series
from jaxft.training.goodput import goodput, seconds_of_rows, sentence

MISTAKES_SHOWN = 10
HELD_OUT_COUNTS = ("rows", "tokens", "trained_tokens", "truncated", "dropped")


def tiles(config: Row, rows: Sequence[Row], scores: Row) -> list[dict[str, str]]:
    """Label, value and detail of the figures at the top of the page."""
    model, train = config.get("model") or {}, config.get("train") or {}
    path = str(model.get("path") or "—")
    losses, (eval_steps, evals) = series(rows, "loss")[1], series(rows, "eval_loss")
    steps, tokens = [row["step"] for row in rows], series(rows, "num_tokens")[1]
    rates = series(rows, "tokens_per_second")[1]
    at_first = f"{evals[0]:.3f} at step {eval_steps[0]}" if len(evals) > 1 else ""
    ends = [_score_value(scores[key]) if isinstance(scores.get(key), Mapping) else "—" for key in ("base", "tuned")]
    batch = f"sequences in each: {train['batch_size']}" if "batch_size" in train else ""
    shown = [
        (
            "Score before → after",
            " → ".join(ends) if ends != ["—", "—"] else "—",
            str(scores.get("metric") or "not scored"),
        ),
        ("Held-out loss", f"{evals[-1]:.3f}" if evals else "—", at_first),
        ("Training loss", f"{losses[-1]:.3f}" if losses else "—", f"{losses[0]:.3f} at first" if losses else ""),
        ("Model", path.rstrip("/").rsplit("/", 1)[-1], f"computes in {model['dtype']}" if "dtype" in model else ""),
        ("Method", *_method(config)),
        ("Steps", f"{steps[-1]:,}" if steps else "—", batch),
        ("Tokens seen", f"{tokens[-1]:,.0f}" if tokens else "—", ""),
        ("Throughput", f"{statistics.median(rates):,.0f}" if rates else "—", "tokens per second, median"),
        *_time_tile(rows),
        *_spike_tile(rows),
    ]
    return [{"label": label, "value": value, "detail": detail} for label, value, detail in shown]


def _time_tile(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    seconds = seconds_of_rows(rows)
    return [] if seconds is None else [("Goodput", f"{goodput(seconds):.0%}", sentence(seconds).partition(": ")[2])]


def _spike_tile(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    spikes, skipped = series(rows, "spikes")[1], series(rows, "skipped_updates")[1]
    shown = [("Spikes", f"{spikes[-1]:,.0f}", "of loss or gradient")] if spikes else []
    return shown + ([("Updates left out", f"{skipped[-1]:,.0f}", "spikes, or nothing to train")] if skipped else [])


def _method(config: Row) -> tuple[str, str]:
    """The training method, and the part of the model that it trains."""
    adapter, model = config.get("adapter") or {}, config.get("model") or {}
    if not adapter:
        return "—", ""
    name = str((config.get("method") or {}).get("name") or "sft").upper()
    if adapter.get("kind") == "none":
        return name, f"training {model['trainable']}" if model.get("trainable") else "every weight is trained"
    fields = {spec.name for spec in dataclasses.fields(AdapterConfig)}
    return name, describe(AdapterConfig(**{key: value for key, value in adapter.items() if key in fields}))


def _score_value(entry: Mapping[str, Any]) -> str:
    value = entry.get("value")
    if not is_number(value) and _counts(entry):
        value = entry["correct"] / entry["total"]
    if not is_number(value):
        return "—"
    return f"{value:.1%}" if _counts(entry) else f"{value:.4g}"


def _counts(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    correct, total = entry.get("correct"), entry.get("total")
    if isinstance(correct, int) and isinstance(total, int) and 0 <= correct <= total and total > 0:
        return correct, total
    return None


def score_sections(scores: Row) -> list[dict[str, Any]]:
    """Every metric with the scores before and after training, the main one first; none if nothing was scored."""
    ways = {way: scores[way] for way in ("base", "tuned") if isinstance(scores.get(way), Mapping)}
    main = str(scores.get("metric") or "unnamed")
    of_metric: dict[str, dict[str, Row]] = {main: dict(ways)}
    for way, entry in ways.items():
        others = entry.get("metrics")
        for name, other in others.items() if isinstance(others, Mapping) else ():
            if isinstance(other, Mapping):
                of_metric.setdefault(str(name), {})[way] = dict(other)
    return [_score_section(name, entries) for name, entries in of_metric.items() if entries]


def _score_section(metric: str, entries: Mapping[str, Row]) -> dict[str, Any]:
    """One metric: the score of each way, the parts of it (fields of JSON, macro-F1), and what was taken for what."""
    shown = []
    for way, entry in entries.items():
        counts, interval = _counts(entry), _interval(entry)
        ends = None if interval is None else [f"{end:.1%}" if counts else f"{end:.4g}" for end in interval]
        one = {"kind": way, "value": _score_value(entry), "counts": counts, "interval": interval if counts else None}
        shown.append(one | {"ends": ends})
    parts: dict[str, dict[str, str]] = {}
    for way, entry in entries.items():
        fields, intervals = entry.get("fields"), entry.get("field_intervals")
        given = dict(fields) if isinstance(fields, Mapping) else {}
        ends_of = dict(intervals) if isinstance(intervals, Mapping) else {}
        if is_number(entry.get("macro_f1")):
            given["macro-F1"], ends_of["macro-F1"] = entry["macro_f1"], entry.get("macro_f1_interval")
        for key, value in given.items():
            parts.setdefault(str(key), {})[way] = _part(value, ends_of.get(key))
    return {"metric": metric, "entries": shown, "parts": parts, "mistakes": _mistakes(entries)}


def _part(value: Any, interval: Any) -> str:
    """A share with its interval, if it has one; a dash for anything else."""
    if not is_number(value):
        return "—"
    ends = _ends(interval)
    return f"{value:.1%}" if ends is None else f"{value:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def _interval(entry: Mapping[str, Any]) -> Interval | None:
    counts = _counts(entry)
    return _ends(entry.get("interval")) or (wilson_interval(*counts) if counts else None)


def _ends(given: Any) -> Interval | None:
    """The ends of an interval that was read; None if it is none."""
    if isinstance(given, list) and len(given) == 2 and all(map(is_number, given)):
        return given[0], given[1]
    return None


def _mistakes(entries: Mapping[str, Row]) -> list[tuple[str, str, int]]:
    """The labels that the tuned model most often takes for another: (right, given, rows)."""
    confusion = entries.get("tuned", {}).get("confusion")
    mistakes = [
        (str(right), str(given), count)
        for right, row in (confusion.items() if isinstance(confusion, Mapping) else ())
        for given, count in (row.items() if isinstance(row, Mapping) else ())
        if right != given and isinstance(count, int)
    ]
    return sorted(mistakes, key=lambda one: -one[2])[:MISTAKES_SHOWN]


def sample_texts(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with all that it holds as text, and whether it is correct."""
    texts = {key: sample.get(key) for key in ("prompt", "reference", "base", "tuned")}
    texts = {k: v if isinstance(v, str) else "" if v is None else json.dumps(v, indent=2) for k, v in texts.items()}
    return texts | {"correct": sample.get("correct")}


def data_facts(data: Row) -> list[tuple[str, str]]:
    """Label and text of every count in data.json, whether its key is known here or not."""
    facts = []
    for key, value in data.items():
        label = key.replace("_", " ").capitalize()
        if key == "trained_tokens" and is_number(value) and is_number(data.get("tokens")) and data["tokens"] > 0:
            facts.append((label, f"{value:,} ({value / data['tokens']:.1%} of all tokens)"))
        elif key == "fill" and is_number(value):
            facts.append((label, f"{value:.1%} of the sequences' tokens"))
        elif is_number(value):
            facts.append((label, f"{value:,}"))
        elif isinstance(value, str):
            facts.append((label, value))
        elif key == "eval" and isinstance(value, Mapping):
            counted = {k: v for k, v in value.items() if is_number(v) and k in HELD_OUT_COUNTS}
            facts.append(("Held out", ", ".join(f"{k.replace('_', ' ')}: {v:,}" for k, v in counted.items())))
        elif key == "pairs" and isinstance(value, Mapping):
            facts += [(f"{label}, {part.lower()}", text) for part, text in data_facts(dict(value))]
        elif isinstance(value, Mapping) and value:
            facts.append((label, ", ".join(f"{k}: {v:,}" if is_number(v) else f"{k}: {v}" for k, v in value.items())))
    return facts


def dotted(config: Row, prefix: str = "") -> list[str]:
    """`train.batch_size = 16`: the names that overrides on the command line use."""
    lines = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        lines += dotted(value, f"{prefix}{key}.") if nested else [f"{prefix}{key} = {json.dumps(value)}"]
    return lines
