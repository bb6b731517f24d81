"""The verbs that look at what was written: runs."""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxft.terminal import text as terminal


def runs(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft runs`: the runs below a folder with their states."""
    from jaxft.runs.survey import listing

    states = listing.runs_below(arguments.folder)
    if not arguments.json:
        width = max((len(run.state) for run in states), default=0)
        for run in states:
            folder = terminal.safe_line(run.folder)
            terminal.write(f"{run.state:<{width}}  {folder}  {listing.describe(run)}")
        terminal.write(listing.summarize(states))
    return {"folder": arguments.folder, "runs": [run.to_json() for run in states]}
