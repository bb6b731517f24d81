"""What a finished run prints."""

import io

import pytest
from rich.console import Console

from jaxft.runs.present import print_summary


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"eval_loss": 0.0427, "eval_perplexity": 1.0436}, "held-out loss 0.0427, perplexity 1.04"),
        ({"eval_loss": 0.6920, "eval_rewards/margins": 0.0023}, "held-out loss 0.6920"),
    ],
    ids=["sft", "dpo"],
)
def test_held_out_loss_with_the_perplexity_of_methods_that_have_one(metrics: dict[str, float], line: str) -> None:
    console = Console(file=io.StringIO(), width=120)
    print_summary({"output_dir": "runs/one", "adapter": "adapter", **metrics}, console)
    assert console.file.getvalue().splitlines() == [line, "", "adapter  runs/one/adapter"]
