"""The console summary of a finished run."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxft.terminal.console import say
from jaxft.training.goodput import sentence


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the scores before and after training, the held-out loss, and the paths of the outputs."""
    folder = summary["output_dir"]
    if "base_score" in summary:
        table = Table("", "correct", "of", "score", "95%", box=None, pad_edge=False)
        for name, key in (("base model, zero-shot", "base"), ("tuned model", "tuned")):
            counts = f"{key}_correct" in summary
            correct = str(summary[f"{key}_correct"]) if counts else ""
            shown = "{:.1%}".format if counts else "{:.4g}".format
            interval = summary.get(f"{key}_interval")
            ends = "" if interval is None else f"{shown(interval[0])} to {shown(interval[1])}"
            table.add_row(name, correct, str(summary["examples"]), shown(summary[f"{key}_score"]), ends)
        console.print()
        say(console, f"held-out score ({summary['metric']}, by generation)", style="bold")
        console.print(table)
    if "eval_loss" in summary:
        # The loss of other methods than supervised fine-tuning has no perplexity.
        perplexity = f", perplexity {summary['eval_perplexity']:.2f}" if "eval_perplexity" in summary else ""
        say(console, f"held-out loss {summary['eval_loss']:.4f}{perplexity}")
        console.print()
    if "seconds" in summary:
        say(console, sentence(summary["seconds"]))
    for name in ("adapter", "model", "merged", "report"):
        if name in summary:
            say(console, f"{name:<8} {os.path.join(folder, summary[name])}")
