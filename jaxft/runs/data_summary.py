"""A summary of a run's data for data.json and the console: the examination, and the share of each set in a mixture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxft.data import Prepared
from jaxft.data.batch_source import BatchSource
from jaxft.data.mixture import Mixture, Share
from jaxft.errors import counted
from jaxft.runs.course import Course
from jaxft.terminal.console import cell, say


def data_summary(data: Prepared, source: BatchSource, course: Course, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """What data.json and --json say of a run's data. warnings: beside those of the examination.

    `course` has the steps of the run. Of a mixture, `mixture` says in words what the run takes of each set, `sets`
    holds their examinations, and `stages` the counts of every stage.
    """
    summary = data.examination.to_dict() | {"course": course.to_dict()}
    summary["warnings"] = [*summary["warnings"], *warnings]
    if isinstance(source, Mixture):
        shares = source.shares(0, source.total_steps)
        summary["mixture"] = {share.name: _sentence(share) for share in shares}
        summary["sets"] = [{"name": one.name, **one.examination.to_dict()} for one in data.sets]
        summary["stages"] = [
            {"steps": [start, end], "sets": [dataclasses.asdict(share) for share in source.shares(start, end)]}
            for start, end, _ in source.stages()
        ]
        summary["warnings"] = [*summary["warnings"], *_unused_sets(shares)]
    if data.eval_examination is not None:
        summary["eval"] = data.eval_examination.to_dict()
    return summary


def data_notes(data: Prepared) -> list[str]:
    """What of a run's rows is not trained on, for its start: rows that are left out, and columns that are ignored."""
    notes = []
    for one in (data.examination, data.eval_examination):
        if one is not None and one.skipped:
            notes.append(f"left out, as data.bad_rows says: {counted(one.skipped, 'row')} of {one.source}")
    ignored = [column.name for column in data.examination.unread if column.treatment == "ignored"]
    if ignored:
        notes.append(f"columns that are not read, as data.ignored_columns says: {', '.join(ignored)}")
    return notes


def print_mixture(source: BatchSource, console: Console) -> None:
    """Prints a table of what a run takes of each set, by stage and in all; nothing if there is one set."""
    if not isinstance(source, Mixture):
        return
    table = Table(
        "steps", "set", "weight", "rows", "sequences", "epochs", "tokens", "trained", box=None, pad_edge=False
    )
    stages = source.stages()
    spans = stages if len(stages) == 1 else [*stages, (0, source.total_steps, {})]
    for start, end, weights in spans:
        total = sum(weights.values())
        for share in source.shares(start, end):
            weight = f"{weights.get(share.name, 0.0) / total:.1%}" if total else ""
            steps = f"{start + 1:,}-{end:,}" if weights else "all"
            table.add_row(
                steps, cell(share.name), weight, f"{share.rows:,}", f"{share.sequences:,}",
                f"{share.epochs:.2f}", f"{share.token_share:.1%}", f"{share.trained_share:.1%}",
            )  # fmt: skip
    console.print()
    say(console, "what training takes of each set (weights are shares of tokens):")
    console.print(table)
    for warning in _unused_sets(source.shares(0, source.total_steps)):
        say(console, f"warning: {warning}", style="yellow")


def _unused_sets(shares: list[Share]) -> list[str]:
    return [
        f"the set {share.name!r} is never seen in so few steps: raise train.steps, or its weight"
        for share in shares
        if not share.sequences
    ]


def _sentence(share: Share) -> str:
    return (
        f"{counted(share.rows, 'row')} in {counted(share.sequences, 'sequence')}, {share.epochs:.2f} epochs, "
        f"{share.token_share:.1%} of tokens, {share.trained_share:.1%} of trained tokens"
    )
