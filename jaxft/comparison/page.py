"""compare.html: the verdict on top, then the ways with their intervals, costs, and the rows that changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from jaxft.assets import ASSETS
from jaxft.files.atomic import write_text
from jaxft.runs.report.charts import DARK, LIGHT, svg
from jaxft.terminal.text import safe_text

# Entries of compare.json.
Entry = Mapping[str, Any]


def write_page(path: Path, result: Entry, *, hide_rows: bool = False) -> None:
    """Writes the page of a compare.json: one file without outside references; equal results give equal pages.

    hide_rows: leaves out the rows that changed, which have texts of the data.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,  # generated text may contain anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "p": _p, "signed": _signed}
    bars, method = bars_of(result), (result["main"] or {}).get("method")
    page = environment.get_template("compare.html.j2").render(
        r=result,
        light=LIGHT,
        dark=DARK,
        bars=bars,
        average=next((bar for bar in bars if bar["average_of"] and bar["average_of"] == method), None),
        fields=field_table(result["ways"]),
        cost_chart=_cost_chart(result),
        curve=_curve(result),
        changed=None if hide_rows else result["changed"],
    )
    write_text(path, safe_text(page))


def bars_of(result: Entry) -> list[dict[str, Any]]:
    """The rows of the table of ways. Trainings of one method stand together, below their average."""
    by_name = {way["name"]: way for way in result["ways"]}
    method_of = {name: method for method, one in result["seeds"].items() for name in one["ways"]}
    out: list[dict[str, Any]] = []
    for way in result["ways"]:
        method = method_of.get(way["name"])
        if method is None:
            out.append(bar_of(way))
        elif way["name"] == result["seeds"][method]["ways"][0]:
            one = result["seeds"][method]
            out.append(_average_bar(method, one, passes="correct" in way))
            out += [bar_of(by_name[name]) | {"of": method} for name in one["ways"]]
    return out


def bar_of(way: Entry) -> dict[str, Any]:
    """A way as a row of the table: texts, and the bar and its whiskers in percent. of: the method of a training."""
    passes = "correct" in way
    count = f"{way['correct']} of {way['total']}" if passes else f"{way['total']} rows"
    texts = {"name": way["name"], "side": way["side"], "count": count, "of": None, "average_of": None}
    return texts | _bar(way["value"], way["interval"], passes)


def _average_bar(method: str, one: Entry, passes: bool) -> dict[str, Any]:
    """The average of the trainings of a method; its whiskers are their range. one: their entry of compare.json."""
    name, count = f"{method}, average of {one['runs']} trainings", f"{one['runs']} runs"
    texts = {"name": name, "side": "tuned", "count": count, "of": None, "average_of": method}
    return texts | _bar(one["mean"], (one["low"], one["high"]), passes)


def _bar(value: float, ends: Sequence[float] | None, passes: bool) -> dict[str, Any]:
    show = (lambda value: f"{value:.1%}") if passes else (lambda value: f"{value:.3g}")
    whisker = None
    if ends is not None:
        low, high = (min(1.0, max(0.0, end)) for end in ends)
        whisker = (100 * low, 100 * (high - low))
    return {
        "value": show(value),
        "width": 100 * min(1.0, max(0.0, value)),
        "whisker": whisker,
        "ends": "" if ends is None else f"{show(ends[0])} to {show(ends[1])}",
    }


def field_table(ways: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """The fields of JSON, macro-F1 and the other metrics, each with its interval in every way."""
    out: dict[str, list[str]] = {}
    for number, way in enumerate(ways):
        parts = {f"field {key}": (value, way["field_intervals"][key]) for key, value in way.get("fields", {}).items()}
        parts |= {"macro-F1": (way["macro_f1"], way["macro_f1_interval"])} if "macro_f1" in way else {}
        parts |= {name: (one["value"], one["interval"]) for name, one in way["metrics"].items()}
        for name, (value, ends) in parts.items():
            told = "" if ends is None else f" ({ends[0]:.1%} to {ends[1]:.1%})"
            out.setdefault(name, ["—"] * len(ways))[number] = f"{value:.1%}{told}"
    return list(out.items())


def _cost_chart(result: Entry) -> Any:
    """USD against calls, of the two sides of the verdict; None if a price is not known."""
    cost, main = result["cost"], result["main"]
    if main is None or cost["training"]["usd"] is None:
        return None
    by_name = {way["name"]: way["usd_per_1000"] for way in result["ways"]}
    prompt, tuned = by_name[main["prompt"]], by_name[main["tuned"]]
    if prompt is None or tuned is None:
        return None
    calls = cost["break_even_calls"]
    most = 2 * calls if isinstance(calls, float) and calls > 0 else 1_000_000

    def draw(axes: Axes, content: Any) -> None:
        x = np.array([0.0, most])
        axes.plot(x, x * prompt / 1000, color=LIGHT["eval"], label=f"prompt: {main['prompt']}")
        axes.plot(x, cost["training"]["usd"] + x * tuned / 1000, color=LIGHT["train"], label=f"tuned: {main['tuned']}")
        axes.set_xlabel("calls", color=LIGHT["quiet"])
        axes.set_ylabel("USD", color=LIGHT["quiet"])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _dress(axes)

    return svg("cost against calls", 2.8, draw, None)


def _curve(result: Entry) -> Any:
    """The score and the held-out loss against the number of training rows; None without a learning curve."""
    curve = result.get("curve")
    if not curve or len(curve["points"]) < 2:
        return None

    def draw(axes: Axes, content: Any) -> None:
        rows = [point["rows"] for point in curve["points"]]
        axes.plot(rows, [point["loss"] for point in curve["points"]], "o-", color=LIGHT["eval"], label="held-out loss")
        axes.set_xlabel("training rows", color=LIGHT["quiet"])
        _dress(axes)
        right = axes.twinx()
        right.plot(rows, [point["value"] for point in curve["points"]], "s--", color=LIGHT["train"], label="score")
        right.tick_params(colors=LIGHT["quiet"], length=0)
        right.spines[["top", "right", "left", "bottom"]].set_visible(False)
        right.legend(frameon=False, labelcolor=LIGHT["ink"], loc="center right", fontsize=8)

    return svg("learning curve", 2.8, draw, None)


def _dress(axes: Axes) -> None:
    axes.tick_params(colors=LIGHT["quiet"], length=0, pad=6)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["faint"])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=LIGHT["ink"], loc="upper left", fontsize=8)


def _number(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:,.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"
