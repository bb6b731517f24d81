"""A run's data as training would see it, before anything is paid for."""

from typing import Any

from rich.console import Console

from jaxft.config import RunConfig
from jaxft.data import prepare, print_examination, render_rows, tokenizer_of
from jaxft.runs.batches import described, print_mixture, training_batches


def examine(config: RunConfig, console: Console, *, rows: int = 2) -> dict[str, Any]:
    """Prints what every set holds, what a mixture takes of each, and `rows` rows of each with what is trained marked.

    Returns what data.json of a run holds. Raises what a run would raise for its data.
    """
    tokenizer = tokenizer_of(config)
    data = prepare(config, tokenizer)
    batches, _ = training_batches(data, config, tokenizer)
    for one in data.sets:
        print_examination(one.examination, console=console, name=one.name if config.data.mixture else None)
    print_mixture(batches, console)
    if data.eval_examination is not None:
        print_examination(data.eval_examination, console=console, name="held out")
    for one in data.sets:
        if config.data.mixture and rows:
            console.print(f"\n{one.name}:", style="bold", highlight=False)
        render_rows(one.examples, tokenizer, limit=rows, console=console)
    return described(data, batches)
