"""The console summary of a finished run."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the scores before and after training, the held-out loss, and the paths of the outputs."""
    folder = summary["output_dir"]
    if "base_score" in summary:
        table = Table("", "correct", "of", "score", box=None, pad_edge=False)
        for name, key in (("base model, zero-shot", "base"), ("tuned model", "tuned")):
            score = f"{summary[f'{key}_score']:.1%}"
            table.add_row(name, str(summary[f"{key}_correct"]), str(summary["examples"]), score)
        console.print(f"\nheld-out score ({summary['metric']}, by generation)", style="bold")
        console.print(table)
    if "eval_loss" in summary:
        # The loss of other methods than supervised fine-tuning has no perplexity.
        perplexity = f", perplexity {summary['eval_perplexity']:.2f}" if "eval_perplexity" in summary else ""
        console.print(f"held-out loss {summary['eval_loss']:.4f}{perplexity}\n")
    for name in ("adapter", "model", "merged", "report"):
        if name in summary:
            console.print(f"{name:<8} {os.path.join(folder, summary[name])}", highlight=False, soft_wrap=True)
