"""The run as one page: report.html and loss.png, made from the files of a run folder."""

import os
from collections.abc import Mapping
from pathlib import Path

import jinja2

from jaxft.assets import ASSETS
from jaxft.errors import DataError
from jaxft.files.atomic import write_text
from jaxft.files.run_folder import CONFIG, DATA, LOSS_PLOT, REPORT, SCORES
from jaxft.methods import find_method
from jaxft.methods.method import Method
from jaxft.runs.report.answers import changing_answers
from jaxft.runs.report.charts import DARK, LIGHT, draw_charts, draw_method_charts, write_png
from jaxft.runs.report.files import Row, as_list, read_held_out_completions, read_json, read_rows
from jaxft.runs.report.texts import data_facts, dotted, sample_texts, score_sections, tiles
from jaxft.terminal.text import safe_text
from jaxft.training.likelihoods import FallingLikelihoods
from jaxft.training.reward_watch import RewardWatch

SAMPLES_SHOWN = 12


def write_report(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write report.html and loss.png into a run folder and return their paths.

    Reads config.json, metrics.jsonl, data.json, scores.json and held_out_completions.jsonl. A section whose file is
    missing or unreadable says so. The page is one file without outside references; equal files give equal pages. Raises
    DataError if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no run folder {str(folder)!r}: give the output_dir of a run")
    config, config_gap = read_json(folder / CONFIG)
    data, data_gap = read_json(folder / DATA)
    scores, scores_gap = read_json(folder / SCORES)
    rows, metrics_gap = read_rows(folder)
    completions, completions_gap = read_held_out_completions(folder)
    samples = [sample_texts(s) for s in as_list(scores.get("samples")) if isinstance(s, Mapping)]
    method = find_method(_method_name(config))
    loss_title = f"Loss, {method.loss_unit if method else Method.loss_unit}"
    page = _template().render(
        name=folder.resolve().name,
        light=LIGHT,
        dark=DARK,
        tiles=tiles(config, rows, scores),
        scores=score_sections(scores),
        charts=draw_charts(rows, data),
        loss_title=loss_title,
        charts_of_method=draw_method_charts(rows, method.charts if method else ()),
        warnings_of_training=[
            warning
            for watch in (FallingLikelihoods, RewardWatch)
            if (warning := watch.warning_of(rows)) is not None
        ],
        warnings=[str(w) for w in as_list(data.get("warnings"))],
        facts_of_data=data_facts(data),
        answers=changing_answers(completions),
        samples=samples[:SAMPLES_SHOWN],
        more_samples=max(0, len(samples) - SAMPLES_SHOWN),
        config_text="\n".join(dotted(config)),
        gaps={
            "config": config_gap, "data": data_gap, "metrics": metrics_gap, "scores": scores_gap,
            "answers": completions_gap,
            "samples": scores_gap or f"{SCORES} holds no samples.",
        },
    )  # fmt: skip
    html_path, png_path = folder / REPORT, folder / LOSS_PLOT
    write_text(html_path, safe_text(page))
    write_png(png_path, rows, metrics_gap, loss_title)
    return html_path, png_path


def _method_name(config: Row) -> str:
    method = config.get("method")
    return str((method.get("name") if isinstance(method, Mapping) else None) or "sft")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,  # generated text may contain anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
