"""`jaxft data`: a run's data as training would see it, before any weights are loaded."""

from typing import Any

import jax
from rich.console import Console

from jaxft.config import RunConfig
from jaxft.data import print_examination, render_rows, tokenizer_of
from jaxft.methods import method_of
from jaxft.runs.course import course_of, warnings_of
from jaxft.runs.data_summary import data_summary, print_mixture
from jaxft.runs.folder import dated
from jaxft.runs.going_on import going_on
from jaxft.runs.scores import check_scores
from jaxft.terminal.console import say


def examine(config: RunConfig, console: Console, *, rows: int = 2) -> dict[str, Any]:
    """Prints the examination of every set, its share in a mixture, and `rows` rows with marked trained tokens.

    Returns the content of a run's data.json. Raises the errors that a run would raise for its data.
    """
    config = going_on(config)
    config, tokenizer = dated(config, tokenizer_of(config))
    method = method_of(config)
    data = method.prepare(config, tokenizer)
    source = method.source(config, data, tokenizer)
    if tokenizer.template_date is not None:
        say(
            console,
            f"the chat template shows the current date, which stays {tokenizer.template_date} (data.template_date)",
        )
    for one in data.sets:
        print_examination(one.examination, console=console, name=one.name if config.data.mixture else None)
    print_mixture(source, console)
    course = course_of(config, data, source)
    # The devices of the run may be others, but settings that suit more of them suit fewer too.
    unit = config.train.accumulation_steps * jax.device_count()
    warnings = [*warnings_of(course, config, data, unit), *check_scores(config, data, tokenizer)]
    if data.eval_examination is not None:
        print_examination(data.eval_examination, console=console, name="held out")
    say(console, course.sentence())
    for warning in warnings:
        say(console, f"warning: {warning}", style="yellow")
    for one in data.sets:
        if config.data.mixture and rows:
            console.print()
            say(console, f"{one.name}:", style="bold")
        render_rows(one.examples, tokenizer, limit=rows, console=console)
    return data_summary(data, source, course, warnings)
