"""The verbs that work on a model that is there: eval, lm-eval, export and convert."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.cli import answers, pushing
from jaxft.cli.verbs.training import console_of
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


def lm_eval(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft lm-eval`: standard tasks of lm-evaluation-harness on a model."""
    from jaxft.files.targets import check_new_file, locked_output
    from jaxft.home import local_path
    from jaxft.runs.lm_eval import run

    if arguments.output is not None:
        check_new_file(local_path(arguments.output))
    if arguments.include_path is not None and not os.path.isdir(local_path(arguments.include_path)):
        raise ConfigError(
            f"--include_path={local_path(arguments.include_path)} is no folder: give one with YAML files of tasks"
        )
    run.check_installed()
    run.check_one_process()
    tasks = run.Tasks(
        names=tuple(name.strip() for name in arguments.tasks.split(",") if name.strip()),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        include_path=arguments.include_path,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        system=arguments.system,
        gen_kwargs=arguments.gen_kwargs,
        samples=arguments.log_samples,
        seed=arguments.seed,
    )
    if arguments.output is None:
        return _lm_eval(arguments, tasks)
    with locked_output(arguments.output, "jaxft lm-eval"):
        results = _lm_eval(arguments, tasks)
        run.write_results(results, arguments.output)
    return results


def _lm_eval(arguments: argparse.Namespace, tasks: Any) -> dict[str, Any]:
    from jaxft.hardware.compile_cache import keep_compiled
    from jaxft.runs.lm_eval import run
    from jaxft.runs.lm_eval.model import JaxftLM

    keep_compiled()
    model = JaxftLM(
        arguments.model,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        base=arguments.base,
        allow_unknown=arguments.allow_unknown,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        chat_template=arguments.chat_template,
        chat_template_args=answers.template_values(arguments),
        seed=arguments.seed or 0,
    )
    answers.say_notes(model.model.left_out, model.model.notes, sys.stderr)
    results = run.run_tasks(model, tasks)
    if not arguments.json:
        run.print_results(results, console_of(arguments))
    return results


def lm_eval_options(option: Callable[..., Any]) -> None:
    """The options of `jaxft lm-eval`."""
    option("--tasks", required=True, metavar="NAMES", help="tasks or groups with commas between them; patterns; files")
    option("--num_fewshot", type=int, metavar="N", help="examples before a question; by default what the task says")
    option("--limit", type=float, metavar="N", help="questions of each task, from the first; below 1 a share")
    option("--include_path", metavar="FOLDER", help="a folder with YAML files of tasks of your own")
    option("--output", metavar="FILE", help="a new .json file for the results")
    option("--log_samples", action="store_true", help="keep every question and answer in the results")
    option("--apply_chat_template", action="store_true", help="ask as a user of a chat, by the chat template")
    option("--fewshot_as_multiturn", action="store_true", help="examples as turns of the chat")
    option("--system", metavar="TEXT", help="system message, with --apply_chat_template")
    option("--gen_kwargs", metavar="NAME=VALUE,...", help="settings of generation, over those of the tasks")
    option("--batch_size", type=int, default=8, help="rows that are computed at a time (8)")
    option("--max_length", type=int, help="most tokens of a row; by default all positions of the model")
    option("--seed", type=int, help="of examples and of sampled answers; by default that of the harness")
    answers.template_options(option)
    answers.loading_options(option)


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
