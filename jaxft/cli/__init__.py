"""The command line: parses one verb and calls one function."""

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.cli import answers
from jaxft.config import ModelConfig, choices
from jaxft.errors import ConfigError, ExitCode, JaxftError, Preempted, did_you_mean

OVERRIDE = "--config."
# What merging into a quantised base, or into what it was made of, changes.
MERGED = {
    "original_base": "against the trained model, merged into the base in its own precision",
    "quantised_again": "against the trained model, should the merged one be quantised like its base",
}


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Runs one command and returns its exit code. Raises errors that jaxft does not explain."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        overrides = _overrides(rest, parser)
        if overrides and not hasattr(arguments, "config") and arguments.verb != "quickstart":
            raise ConfigError(f"--config.{overrides[0]} changes a config, and {arguments.verb} reads none")
        result = arguments.call(arguments, overrides)
    except (JaxftError, Preempted, KeyboardInterrupt) as error:
        return _explained(arguments.verb, error)
    if arguments.json and result is not None:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return ExitCode.DONE


def _explained(verb: str, error: BaseException) -> ExitCode:
    """Says what stopped a command, and returns its exit code."""
    if isinstance(error, JaxftError | Preempted | KeyboardInterrupt):
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        print(f"jaxft {verb}: {text}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    if isinstance(error, JaxftError):
        return ExitCode.REFUSED
    if isinstance(error, Preempted):
        return ExitCode.PREEMPTED
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft.config import load

    config = load(arguments.config, overrides)
    from jaxft.sharding import distributed

    distributed.start(arguments.coordinator, arguments.num_processes, arguments.process_id, arguments.heartbeat_seconds)
    from jaxft.runs.present import print_summary
    from jaxft.runs.train import train
    from jaxft.sharding.ending import end_on_peer_error
    from jaxft.sharding.processes import is_primary

    def say(text: str) -> None:
        # Past Python's buffers, whose locks another thread may hold when this process is aborted.
        os.write(2, f"jaxft train: {text}\n".encode())

    console = _console(arguments)
    with end_on_peer_error(say, lambda error: _explained(arguments.verb, error)):
        summary = train(config, console=console)
    if not is_primary():
        return None
    print_summary(summary, console)
    return summary


def _quickstart(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft.sharding import distributed

    distributed.start()
    from jaxft.runs.present import print_summary
    from jaxft.runs.quickstart import quickstart

    console = _console(arguments)
    summary = quickstart(console=console, overrides=tuple(overrides))
    print_summary(summary, console)
    return summary


def _data(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft.config import load
    from jaxft.runs.examine import examine

    return examine(load(arguments.config, overrides), _console(arguments), rows=arguments.rows)


def _eval(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft import api
    from jaxft.data import tokenizer_of
    from jaxft.runs import folder
    from jaxft.runs.export import load_trained

    if (arguments.run is None) == (arguments.config is None):
        raise ConfigError("give either --run=FOLDER or --config=FILE (with --model=PATH to score another model)")
    from jaxft.config import load

    if arguments.run is not None:
        if overrides:
            raise ConfigError("--run evaluates with the run's own config; use --config and --model to change it")
        config, model_path = folder.run_config(arguments.run), arguments.model or arguments.run
    else:
        config = load(arguments.config, overrides)
        model_path = arguments.model or config.model.path
    values = answers.template_values(arguments)
    if arguments.run is None:
        data = dataclasses.replace(config.data, chat_template_kwargs=config.data.chat_template_kwargs | values)
        tokenizer = tokenizer_of(dataclasses.replace(config, data=data), arguments.model)
    else:
        tokenizer = api.load_tokenizer(
            arguments.model or config.model.path,
            revision=None if arguments.model else config.model.revision,
            chat_template=folder.chat_template(arguments.run),
            chat_template_kwargs=values,
        )
    result = api.evaluate(load_trained(model_path), tokenizer, config)
    if not arguments.json:
        for name, value in result.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    return result


def _export(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft import api

    source = arguments.run or arguments.model
    if source is None or (arguments.run and arguments.model):
        raise ConfigError("give either --run=FOLDER or --model=PATH")
    written = api.export(
        source,
        arguments.to,
        format=arguments.format,
        dtype=arguments.dtype,
        step=arguments.step,
        base=arguments.base,
    )
    if not arguments.json:
        what = written["compared"]
        checks = ", ".join(f"{reader} ({what} within {value:.1e})" for reader, value in written["checks"].items())
        print(f"{written['folder']}: read back by {checks}")
        answers.say_left_out(written.get("left_out"), sys.stdout)
        for name, how in MERGED.items():
            if name in written:
                change = written[name]
                print(f"{how}: {what} within {change['max']:.1e}, {change['mean']:.1e} on average")
    return written


def _convert(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft.conversion.convert import convert

    done = convert(
        arguments.source,
        arguments.target,
        form=arguments.to,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.shard_size,
        revision=arguments.revision,
        console=_console(arguments),
    )
    if not arguments.json:
        checks = "".join(f"\n  {name}: {figure}" for name, figure in done.get("checks", {}).items())
        print(f"{done['to']}: {done['form']}, {done['dtype']}, {done['bytes'] / 1e9:.2f} GB in {done['seconds']:.0f} s")
        print(f"compared with the source:{checks}" if checks else "")
    return done


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    # A plan runs in a process of its own; this one needs no JAX.
    from jaxft.config import load
    from jaxft.planning.client import plan
    from jaxft.planning.tables import print_plan, print_search

    result = plan(
        load(arguments.config, overrides),
        arguments.topology,
        slices=arguments.slices,
        level=arguments.level,
        prices=arguments.prices,
        tokens=arguments.tokens,
        examples=arguments.examples,
        search=arguments.search,
        compiles=arguments.compiles,
    )
    if not arguments.json:
        (print_search if arguments.search else print_plan)(result, _console(arguments))
    return result


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    return int(float(number) * units.get(unit, 1))


def _console(arguments: argparse.Namespace) -> Any:
    from rich.console import Console

    # With --json, standard output carries the JSON alone.
    return Console(stderr=arguments.json)


def _overrides(rest: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    out, waiting = [], None
    for item in rest:
        if waiting is not None:
            out.append(f"{waiting}={item}")
            waiting = None
        elif item.startswith(OVERRIDE) and "=" in item:
            out.append(item.removeprefix(OVERRIDE))
        elif item.startswith(OVERRIDE):
            waiting = item.removeprefix(OVERRIDE)
        else:
            known = [option for action in parser._actions for option in action.option_strings]
            raise ConfigError(f"unknown argument {item!r}.{did_you_mean(item.split('=')[0], [*known, *_OPTIONS])}")
    if waiting is not None:
        raise ConfigError(f"--config.{waiting} has no value")
    return out


_OPTIONS: list[str] = []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxft", description=sys.modules["jaxft"].__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[..., Any], about: str) -> Callable[..., Any]:
        sub = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="figures as JSON, alone on standard output")
        sub.set_defaults(call=run)

        def option(flag: str, **kwargs: Any) -> None:
            _OPTIONS.append(flag)
            sub.add_argument(flag, **kwargs)

        return option

    config = {"metavar": "FILE[:ARG]", "help": "configs/NAME.py; :smoke shrinks it; --config.a.b=value overrides"}
    model = {
        "metavar": "PATH",
        "help": "Hugging Face, PEFT or run folder, GGUF file, hf://owner/name, gs://bucket/folder",
    }

    option = verb("train", _train, "fine-tune as a config says; the same command goes on after an interruption")
    option("--config", required=True, **config)
    option("--coordinator", metavar="HOST:PORT", help="process 0, when processes are started by hand")
    option("--num_processes", type=int, help="how many there are; with --coordinator")
    option("--process_id", type=int, help="which one this is, from 0; with --coordinator")
    option(
        "--heartbeat_seconds", type=int, default=100, help="a process without a sign of life for so long ends the run"
    )

    verb("quickstart", _quickstart, "LoRA on SmolLM2-135M, a small real task, on this machine (from a checkout)")

    option = verb("data", _data, "examine a config's data as training would see it")
    option("--config", required=True, **config)
    option("--rows", type=int, default=2, help="how many rows to show with their trained tokens marked")

    option = verb("plan", _plan, "compile a config's training step for a slice that is not here: memory, time, money")
    option("--config", required=True, **config)
    option("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p-8, v6e:1x1, ..., or a GPU such as h100:8")
    option("--slices", type=int, default=1, help="of this topology, joined by the data-centre network")
    option("--level", choices=("O1", "default"), default="O1", help="XLA's optimisation: quick, or as a run compiles")
    option("--search", action="store_true", help="the cheapest and fastest way; --topology names kinds: v5e,v6e")
    option("--compiles", type=int, default=2, help="ways that --search compiles, at most, for each of the two")
    option("--tokens", type=int, help="in the training set, if it is not on this machine")
    option("--examples", type=int, help="in the training set, if it is not on this machine and rows are not packed")
    option("--prices", metavar="FILE", help="USD per chip-hour in place of jaxft's own table")

    option = verb("generate", answers.generate, "answer prompts")
    option("--model", required=True, **model)
    option("--prompt", action="append", default=[], help="once per prompt; standard input if there is none")
    option("--chat", action="store_true", help="render each prompt as a user message by the chat template")
    option("--system", help="system message, with --chat")
    answers.template_options(option)
    option("--best_of", type=int, metavar="N", help="draw N answers to each prompt; --reward_model chooses one")
    option("--reward_model", metavar="PATH", help="a reward model: a folder that `method.name=reward` wrote")
    answers.sampling_options(option, max_new_tokens=128)

    option = verb("score", answers.score, "score answers, or pairs of them, with a reward model")
    option("--model", required=True, **model)
    answers.score_options(option)

    option = verb(
        "sample", answers.sample, "draw answers to a config's prompts, judge them, and write the best as rows"
    )
    option("--config", required=True, **config)
    option("--model", **model)
    answers.sample_options(option)

    option = verb("chat", answers.chat, "talk with a model on the terminal")
    option("--model", required=True, **model)
    option("--system", help="system message")
    answers.template_options(option)
    answers.sampling_options(option, max_new_tokens=512)

    option = verb("eval", _eval, "held-out loss, perplexity and score by generation")
    option("--run", metavar="FOLDER", help="a run folder: its tuned model on its held-out rows")
    option("--config", **config)
    option("--model", **model)
    answers.values_option(option)

    option = verb("export", _export, "write an adapter or a whole model for other tools, and read it back")
    option("--run", metavar="FOLDER", help="a run folder")
    option("--model", **model)
    option("--to", required=True, metavar="FOLDER", help="a new folder")
    option("--format", default="merged", help="merged (a whole Hugging Face folder) or adapter (PEFT)")
    option("--dtype", choices=choices(ModelConfig, "dtype"), help="stored type of a merged model")
    option("--step", type=int, help="a checkpoint of the run; the newest by default")
    option("--base", choices=("trained", "original"), default="trained", help="of a quantised run: what to merge into")

    option = verb("convert", _convert, "one model format into another, tensor by tensor, compared at the end")
    option(
        "source", metavar="SRC", help="Hugging Face, PEFT, Orbax or run folder, GGUF file, hf://owner/name[@revision]"
    )
    option("target", metavar="DST", help="a new folder, or a new file that ends in .gguf")
    option("--to", choices=("hf", "gguf", "gguf-adapter", "orbax"), help="gguf for a .gguf target, else hf")
    option("--dtype", help="float32, bfloat16, float16 (hf, gguf) or q8_0 (gguf); the source's own by default")
    option("--shard_size", type=_bytes, default="5GB", metavar="SIZE", help="of safetensors files, such as 5GB")
    option("--revision", help="branch, tag or commit of an hf:// source")
    return parser
