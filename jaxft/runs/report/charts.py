"""The charts of the page, as SVG, and the picture of the loss."""

import io
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from jaxft.files.run_folder import METRICS
from jaxft.methods.parts.charts import Chart
from jaxft.runs.report.files import Row, as_list, is_number, series

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


def draw_charts(rows: Sequence[Row], data: Row) -> dict[str, Markup | None]:
    """The charts that every run has, by name; None for those without values."""
    bins = [b for b in as_list(data.get("histogram")) if isinstance(b, list) and len(b) == 3]
    bins = [b for b in bins if all(map(is_number, b))]
    has = {key: bool(series(rows, key)[0]) for key in ("loss", "eval_loss", "learning_rate", "tokens_per_second")}
    return {
        "loss": svg("loss", 3.4, _draw_loss, rows) if has["loss"] or has["eval_loss"] else None,
        "rate": svg("learning rate", 1.9, _draw_rate, rows) if has["learning_rate"] else None,
        "throughput": svg("throughput", 1.9, _draw_throughput, rows) if has["tokens_per_second"] else None,
        "lengths": svg("length histogram", 2.2, _draw_lengths, bins) if bins else None,
    }


def draw_method_charts(rows: Sequence[Row], charts: Sequence[Chart]) -> list[tuple[str, Markup]]:
    """(title, chart) of each of a method's own charts of which the run has logged a metric."""

    def is_logged(chart: Chart) -> bool:
        return any(series(rows, prefix + name)[0] for name in chart.metrics for prefix in ("", "eval_"))

    return [
        (chart.title, svg(chart.title.lower(), 2.4, partial(_draw_metrics, chart), rows))
        for chart in charts
        if is_logged(chart)
    ]


def _draw_loss(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_curve(axes, *series(rows, "loss"), "training", LIGHT["train"])
    eval_steps, eval_losses = series(rows, "eval_loss")
    if eval_losses:
        axes.plot(eval_steps, eval_losses, color=LIGHT["eval"], label="held out", marker="o", markersize=4.5)
    _dress(axes, rows)
    axes.legend(frameon=False, labelcolor=LIGHT["ink"], loc="upper right")


def _draw_metrics(chart: Chart, axes: Axes, rows: Sequence[Row]) -> None:
    colors = [LIGHT[name] for name in ("train", "eval", "quiet")]
    for metric, color in zip(chart.metrics, colors, strict=False):
        label = metric.rpartition("/")[2].replace("_", " ")
        _draw_curve(axes, *series(rows, metric), label, color)
        steps, values = series(rows, f"eval_{metric}")
        if values:
            axes.plot(
                steps, values, color=color, label=f"{label}, held out", marker="o", markersize=4.5, linestyle="--"
            )
    _dress(axes, rows)
    axes.legend(frameon=False, labelcolor=LIGHT["ink"], loc="best", fontsize=8)


def _draw_curve(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, color: str) -> None:
    width = max(1, len(values) // 30)
    if width > 1:
        # The window shrinks on both sides alike near the ends: a lopsided mean would hide the first value.
        halves = [min(width, i, len(values) - 1 - i) for i in range(len(values))]
        smooth = [statistics.fmean(values[i - half : i + half + 1]) for i, half in enumerate(halves)]
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color=color, label=f"{label}, mean of {2 * width + 1} logged steps")
    elif values:
        axes.plot(steps, values, color=color, label=label, marker="o" if len(values) < 3 else "")


def _draw_rate(axes: Axes, rows: Sequence[Row]) -> None:
    steps, rates = series(rows, "learning_rate")
    axes.plot(steps, rates, color=LIGHT["quiet"], marker="o" if len(rates) < 3 else "")
    _dress(axes, rows, from_zero=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))


def _draw_throughput(axes: Axes, rows: Sequence[Row]) -> None:
    steps, rates = series(rows, "tokens_per_second")
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


def svg(name: str, height: float, draw: Callable[[Axes, Any], None], content: Any) -> Markup:
    """One chart as inline SVG: `draw` is called with its axes and the content. height: in inches at a width of 9."""
    figure = Figure(figsize=(9, height), facecolor="none")
    # Margins in inches, not fitted to the labels: equal axes in all charts.
    figure.subplots_adjust(left=0.75 / 9, right=1 - 0.05 / 9, bottom=0.5 / height, top=1 - 0.1 / height)
    axes = figure.add_subplot(facecolor="none")
    draw(axes, content)
    buffer = io.StringIO()
    # Text stays text, in the page's font; the salt keeps element ids stable and apart between charts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', rf'<svg role="img" aria-label="{name}"\1', text, count=1)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for key, color in LIGHT.items():
        text = text.replace(color, f"var(--{key})")
    return Markup(text)


def write_png(path: Path, rows: Sequence[Row], gap: str | None, loss_title: str) -> None:
    """Writes the picture of the loss and the learning rate; a gap says why there are no rows."""
    figure = Figure(figsize=(9, 6), facecolor=LIGHT["ground"])
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.09, top=0.94, hspace=0.25)
    for axes, title, keys, draw in (
        (loss, loss_title, ("loss", "eval_loss"), _draw_loss),
        (rate, "Learning rate", ("learning_rate",), _draw_rate),
    ):
        axes.set_title(title, loc="left", color=LIGHT["ink"], fontsize=12, pad=10)
        if any(series(rows, key)[0] for key in keys):
            draw(axes, rows)
        else:
            axes.set_axis_off()
            words = textwrap.fill(gap or f"{METRICS} holds no {' or '.join(keys)}.", 90)
            axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=LIGHT["quiet"])
    loss.set_xlabel("")
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
