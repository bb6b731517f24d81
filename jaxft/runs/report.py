"""The run as one page: report.html and loss.png, made from the files of a run folder."""

import dataclasses
import io
import json
import math
import os
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from jaxft.adapters.make import describe
from jaxft.config import AdapterConfig
from jaxft.errors import DataError
from jaxft.files.run_folder import CONFIG, DATA, LOSS_PLOT, METRICS, REPORT, SCORES
from jaxft.training.log import read_metrics

Row = dict[str, Any]

# Charts are drawn in the light colours; in the page each becomes a CSS variable of its name, so that a dark
# page recolours them. The two series colours keep apart for colour-blind readers.
LIGHT = {
    "ground": "#ffffff", "panel": "#f5f6f8", "ink": "#1c2127", "quiet": "#5d6673", "line": "#e1e4e9",
    "faint": "#b3bac4", "train": "#2e6db4", "eval": "#c9651a", "good": "#1e7b4c", "bad": "#b23a2e",
}  # fmt: skip
DARK = {
    "ground": "#15181d", "panel": "#1e2228", "ink": "#e7e9ec", "quiet": "#9aa3af", "line": "#2e343c",
    "faint": "#5b6470", "train": "#6aa5e8", "eval": "#e8955a", "good": "#5fbf8d", "bad": "#e58074",
}  # fmt: skip

ABSENT = {
    CONFIG: f"{CONFIG} is missing: the settings of the run are not known.",
    METRICS: f"{METRICS} is missing: no training step has been logged.",
    DATA: f"{DATA} is missing: the training data have not been examined.",
    SCORES: f"{SCORES} is missing: the model has not been scored. Set eval.metric to score it.",
}
SAMPLES_SHOWN = 12


def write_report(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write report.html and loss.png into a run folder and return their paths.

    Reads config.json, metrics.jsonl, data.json and scores.json. A section whose file is missing or unreadable says so.
    The page is one file without outside references; equal files give equal pages. Raises DataError if the folder does
    not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no run folder {str(folder)!r}: give the output_dir of a run")
    config, config_gap = _read_json(folder / CONFIG)
    data, data_gap = _read_json(folder / DATA)
    scores, scores_gap = _read_json(folder / SCORES)
    rows, metrics_gap = _read_rows(folder)
    samples = [_sample(s) for s in _listed(scores.get("samples")) if isinstance(s, Mapping)]
    page = _template().render(
        name=folder.resolve().name,
        light=LIGHT,
        dark=DARK,
        tiles=_tiles(config, rows, scores),
        scores=_score_section(scores),
        charts=_charts(rows, data),
        warnings=[str(w) for w in _listed(data.get("warnings"))],
        facts_of_data=_data_facts(data),
        samples=samples[:SAMPLES_SHOWN],
        more_samples=max(0, len(samples) - SAMPLES_SHOWN),
        config_text="\n".join(_dotted(config)),
        gaps={
            "config": config_gap, "data": data_gap, "metrics": metrics_gap, "scores": scores_gap,
            "samples": scores_gap or f"{SCORES} holds no samples.",
        },
    )  # fmt: skip
    html_path, png_path = folder / REPORT, folder / LOSS_PLOT
    html_path.write_text(page, encoding="utf-8")
    _write_png(png_path, rows, metrics_gap)
    return html_path, png_path


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The confidence interval of the share of right answers, given `correct` of `total`; 95% by default.

    Unlike the normal interval it stays inside [0, 1] and has a width at 0 and at total.
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953. Raises ValueError unless
    0 <= correct <= total and total > 0.
    """
    if not (0 <= correct <= total and total > 0):
        raise ValueError(f"{correct} right answers of {total} is no share")
    share, widening = correct / total, z * z / total
    center = (share + widening / 2) / (1 + widening)
    half = z / (1 + widening) * math.sqrt(share * (1 - share) / total + widening / (4 * total))
    return max(0.0, center - half), min(1.0, center + half)


def _template() -> jinja2.Template:
    assets = Path(__file__).parents[1] / "assets"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets),
        autoescape=True,  # generated text may contain anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


# Reading


def _read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a file, or an empty one and the reason."""
    if not path.is_file():
        return {}, ABSENT[path.name]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"{path.name} could not be read: {error}"
    if not isinstance(value, dict):
        return {}, f"{path.name} could not be read: it holds a {type(value).__name__}, not an object"
    return value, None


def _read_rows(folder: Path) -> tuple[list[Row], str | None]:
    if not (folder / METRICS).is_file():
        return [], ABSENT[METRICS]
    try:
        rows = read_metrics(folder)
    except DataError as error:
        return [], str(error)
    return rows, None if rows else f"{METRICS} is empty: no training step has been logged."


def _series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    with_key = [row for row in rows if _is_number(row.get(key))]
    return [row["step"] for row in with_key], [row[key] for row in with_key]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# Texts


def _tiles(config: Row, rows: Sequence[Row], scores: Row) -> list[dict[str, str]]:
    model, train = config.get("model") or {}, config.get("train") or {}
    path = str(model.get("path") or "—")
    losses, (eval_steps, evals) = _series(rows, "loss")[1], _series(rows, "eval_loss")
    steps, tokens = [row["step"] for row in rows], _series(rows, "num_tokens")[1]
    rates = _series(rows, "tokens_per_second")[1]
    at_first = f"{evals[0]:.3f} at step {eval_steps[0]}" if len(evals) > 1 else ""
    ends = [_score_value(scores[key]) if isinstance(scores.get(key), Mapping) else "—" for key in ("base", "tuned")]
    batch = f"sequences in each: {train['batch_size']}" if "batch_size" in train else ""
    tiles = [
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
    ]
    return [{"label": label, "value": value, "detail": detail} for label, value, detail in tiles]


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
    if not _is_number(value) and _counts(entry):
        value = entry["correct"] / entry["total"]
    if not _is_number(value):
        return "—"
    return f"{value:.1%}" if _counts(entry) else f"{value:.4g}"


def _counts(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    correct, total = entry.get("correct"), entry.get("total")
    if isinstance(correct, int) and isinstance(total, int) and 0 <= correct <= total and total > 0:
        return correct, total
    return None


def _score_section(scores: Row) -> dict[str, Any] | None:
    entries = []
    for key in ("base", "tuned"):
        if isinstance(scores.get(key), Mapping):
            counts = _counts(scores[key])
            interval = wilson_interval(*counts) if counts else None
            entries.append({"kind": key, "value": _score_value(scores[key]), "counts": counts, "interval": interval})
    return {"metric": str(scores.get("metric") or "unnamed"), "entries": entries} if entries else None


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: sample.get(key) for key in ("prompt", "reference", "base", "tuned")}
    texts = {k: v if isinstance(v, str) else "" if v is None else json.dumps(v, indent=2) for k, v in texts.items()}
    return texts | {"correct": sample.get("correct")}


HELD_OUT_COUNTS = ("rows", "tokens", "trained_tokens", "truncated", "dropped")


def _data_facts(data: Row) -> list[tuple[str, str]]:
    """Label and text of every count in data.json, whether its key is known here or not."""
    facts = []
    for key, value in data.items():
        label = key.replace("_", " ").capitalize()
        if key == "trained_tokens" and _is_number(value) and _is_number(data.get("tokens")) and data["tokens"] > 0:
            facts.append((label, f"{value:,} ({value / data['tokens']:.1%} of all tokens)"))
        elif key == "fill" and _is_number(value):
            facts.append((label, f"{value:.1%} of the sequences' tokens"))
        elif _is_number(value):
            facts.append((label, f"{value:,}"))
        elif isinstance(value, str):
            facts.append((label, value))
        elif key == "eval" and isinstance(value, Mapping):
            counted = {k: v for k, v in value.items() if _is_number(v) and k in HELD_OUT_COUNTS}
            facts.append(("Held out", ", ".join(f"{k.replace('_', ' ')}: {v:,}" for k, v in counted.items())))
        elif isinstance(value, Mapping) and value:
            facts.append((label, ", ".join(f"{k}: {v:,}" if _is_number(v) else f"{k}: {v}" for k, v in value.items())))
    return facts


def _dotted(config: Row, prefix: str = "") -> list[str]:
    """`train.batch_size = 16`: the names that overrides on the command line use."""
    lines = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        lines += _dotted(value, f"{prefix}{key}.") if nested else [f"{prefix}{key} = {json.dumps(value)}"]
    return lines


# Charts


def _charts(rows: Sequence[Row], data: Row) -> dict[str, Markup | None]:
    bins = [b for b in _listed(data.get("histogram")) if isinstance(b, list) and len(b) == 3]
    bins = [b for b in bins if all(map(_is_number, b))]
    has = {key: bool(_series(rows, key)[0]) for key in ("loss", "eval_loss", "learning_rate", "tokens_per_second")}
    return {
        "loss": _svg("loss", 3.4, _draw_loss, rows) if has["loss"] or has["eval_loss"] else None,
        "rate": _svg("learning rate", 1.9, _draw_rate, rows) if has["learning_rate"] else None,
        "throughput": _svg("throughput", 1.9, _draw_throughput, rows) if has["tokens_per_second"] else None,
        "lengths": _svg("length histogram", 2.2, _draw_lengths, bins) if bins else None,
    }


def _draw_loss(axes: Axes, rows: Sequence[Row]) -> None:
    steps, losses = _series(rows, "loss")
    width = max(1, len(losses) // 30)
    if width > 1:
        # The window shrinks on both sides alike near the ends: a lopsided mean would hide the first loss.
        halves = [min(width, i, len(losses) - 1 - i) for i in range(len(losses))]
        smooth = [statistics.fmean(losses[i - half : i + half + 1]) for i, half in enumerate(halves)]
        axes.plot(steps, losses, color=LIGHT["train"], alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color=LIGHT["train"], label=f"training, mean of {2 * width + 1} logged steps")
    elif losses:
        axes.plot(steps, losses, color=LIGHT["train"], label="training", marker="o" if len(losses) < 3 else "")
    eval_steps, eval_losses = _series(rows, "eval_loss")
    if eval_losses:
        axes.plot(eval_steps, eval_losses, color=LIGHT["eval"], label="held out", marker="o", markersize=4.5)
    _dress(axes, rows)
    axes.legend(frameon=False, labelcolor=LIGHT["ink"], loc="upper right")


def _draw_rate(axes: Axes, rows: Sequence[Row]) -> None:
    steps, rates = _series(rows, "learning_rate")
    axes.plot(steps, rates, color=LIGHT["quiet"], marker="o" if len(rates) < 3 else "")
    _dress(axes, rows, from_zero=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))


def _draw_throughput(axes: Axes, rows: Sequence[Row]) -> None:
    steps, rates = _series(rows, "tokens_per_second")
    axes.plot(steps, rates, color=LIGHT["train"], marker="o" if len(rates) < 3 else "")
    _dress(axes, rows, from_zero=True)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_lengths(axes: Axes, bins: Sequence[Sequence[float]]) -> None:
    lows, highs, counts = zip(*bins, strict=True)
    widths = [high - low + 1 for low, high in zip(lows, highs, strict=True)]
    axes.bar(lows, counts, widths, align="edge", color=LIGHT["train"], edgecolor=LIGHT["ground"], linewidth=1.5)
    _dress(axes, from_zero=True)
    axes.set_xlabel("tokens", color=LIGHT["quiet"])


def _dress(axes: Axes, rows: Sequence[Row] = (), *, from_zero: bool = False) -> None:
    axes.set_xlabel("step", color=LIGHT["quiet"])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(colors=LIGHT["quiet"], length=0, pad=6)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["faint"])
    axes.margins(x=0.015, y=0.08)
    if from_zero:
        axes.set_ylim(bottom=0)
    if rows:
        # The whole run in every chart, so that charts stand step below step.
        first, last = rows[0]["step"], rows[-1]["step"]
        edge = 0.015 * max(1, last - first)
        axes.set_xlim(first - edge, last + edge)


def _svg(name: str, height: float, draw: Callable[[Axes, Any], None], content: Any) -> Markup:
    """One chart as inline SVG; `height` in inches at a width of 9."""
    figure = Figure(figsize=(9, height), facecolor="none")
    # Margins in inches, not fitted to the labels: equal axes in all charts.
    figure.subplots_adjust(left=0.75 / 9, right=1 - 0.05 / 9, bottom=0.5 / height, top=1 - 0.1 / height)
    axes = figure.add_subplot(facecolor="none")
    draw(axes, content)
    buffer = io.StringIO()
    # Text stays text, in the page's font; the salt keeps element ids stable and apart between charts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', rf'<svg role="img" aria-label="{name}"\1', svg, count=1)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for key, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{key})")
    return Markup(svg)


def _write_png(path: Path, rows: Sequence[Row], gap: str | None) -> None:
    figure = Figure(figsize=(9, 6), facecolor=LIGHT["ground"])
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.09, top=0.94, hspace=0.25)
    for axes, title, keys, draw in (
        (loss, "Loss, nats per trained token", ("loss", "eval_loss"), _draw_loss),
        (rate, "Learning rate", ("learning_rate",), _draw_rate),
    ):
        axes.set_title(title, loc="left", color=LIGHT["ink"], fontsize=12, pad=10)
        if any(_series(rows, key)[0] for key in keys):
            draw(axes, rows)
        else:
            axes.set_axis_off()
            words = textwrap.fill(gap or f"{METRICS} holds no {' or '.join(keys)}.", 90)
            axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=LIGHT["quiet"])
    loss.set_xlabel("")
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
