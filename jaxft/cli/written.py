"""The verbs that work on a model that is there: eval, export and convert."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jaxft.cli import answers, pushing
from jaxft.cli.training import console_of
from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.files.buckets.working_copy import run_in_bucket
from jaxft.terminal import text as terminal

# What merging into a quantised base, or into what it was made of, changes.
MERGED = {
    "original_base": "against the trained model, merged into the base in its own precision",
    "quantised_again": "against the trained model, should the merged one be quantised like its base",
}


def evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft eval`: held-out figures of a run, or of a model on the held-out rows of a config."""
    from jaxft import api
    from jaxft.data import tokenizer_of
    from jaxft.hardware.compile_cache import keep_compiled
    from jaxft.runs import folder
    from jaxft.runs.export import load_trained

    config, model_path = _evaluated(arguments, overrides)
    values = answers.template_values(arguments)
    if arguments.run is None:
        data = dataclasses.replace(config.data, chat_template_kwargs=config.data.chat_template_kwargs | values)
        model = dataclasses.replace(config.model, base=arguments.base or config.model.base)
        tokenizer = tokenizer_of(dataclasses.replace(config, data=data, model=model), arguments.model)
    else:
        tokenizer = api.load_tokenizer(
            arguments.model or config.model.path,
            revision=None if arguments.model else config.model.revision,
            base=arguments.base if arguments.model else config.model.base,
            chat_template=folder.chat_template(arguments.run),
            chat_template_kwargs=values,
        )
    base = arguments.base or (config.model.base if model_path == config.model.path else None)
    keep_compiled()
    result = api.evaluate(load_trained(model_path, base=base), tokenizer, config)
    if not arguments.json:
        for name, value in result.items():
            terminal.write(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    return result


def _evaluated(arguments: argparse.Namespace, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """(config, path of the model) of `jaxft eval`: of a run, of a config, or of a model and held-out rows alone."""
    from jaxft.config import load

    if arguments.run is not None and arguments.config is not None:
        raise ConfigError("--run and --config both name a config: give one of them")
    if arguments.run is not None:
        others = [override for override in overrides if not override.startswith(("eval.", "data.eval"))]
        if others:
            raise ConfigError(
                f"--{others[0]} would evaluate another run: with --run=FOLDER only eval.* and data.eval* may differ. "
                "Use --config and --model for the others"
            )
        run = run_in_bucket(arguments.run)
        return load(run, overrides), arguments.model or run
    if arguments.config is not None:
        config = load(arguments.config, overrides)
        return config, arguments.model or config.model.path
    rows = next((text.partition("=")[2] for text in overrides if text.startswith("data.eval=")), None)
    if arguments.model is None or rows is None:
        raise ConfigError("give either --run=FOLDER or --config=FILE, or --model=PATH with --eval_data=ROWS")
    return load(None, [f"model.path={arguments.model}", f"data.train={rows}", *overrides]), arguments.model


def export(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft export`: what was written, and how it was read back."""
    from jaxft import api
    from jaxft.hardware.compile_cache import keep_compiled

    source = arguments.run or arguments.model
    if source is None or (arguments.run and arguments.model):
        raise ConfigError("give either --run=FOLDER or --model=PATH")
    keep_compiled()
    written = api.export(
        source,
        arguments.to,
        format=arguments.format,
        dtype=arguments.dtype,
        step=arguments.step,
        base=arguments.base,
        allow_unknown=arguments.allow_unknown,
        push=pushing.push_of(arguments),
    )
    if not arguments.json:
        what = written["compared"]
        checks = ", ".join(f"{reader} ({what} within {value:.1e})" for reader, value in written["checks"].items())
        terminal.write(f"{written['folder']}: read back by {checks}")
        answers.say_notes(written.get("left_out"), written.get("notes", []), sys.stdout)
        for name, how in MERGED.items():
            if name in written:
                change = written[name]
                terminal.write(f"{how}: {what} within {change['max']:.1e}, {change['mean']:.1e} on average")
        if "pushed" in written:
            terminal.write(f"pushed to {written['pushed']}")
    return written


def convert(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft convert`: what was written, and how it compares with its source."""
    from jaxft.conversion.convert import convert

    done = convert(
        arguments.source,
        arguments.target,
        form=arguments.to,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.shard_size,
        revision=arguments.revision,
        base=arguments.base,
        tokenizer=arguments.tokenizer,
        console=console_of(arguments),
        allow_unknown=arguments.allow_unknown,
    )
    if not arguments.json:
        checks = "".join(f"\n  {name}: {figure}" for name, figure in done.get("checks", {}).items())
        size = f"{done['bytes'] / 1e9:.2f} GB in {done['seconds']:.0f} s"
        terminal.write(f"{done['to']}: {done['form']}, {done['dtype']}, {size}")
        terminal.write(f"compared with the source:{checks}" if checks else "")
    return done
