"""The command line: parses one verb and calls one function."""

import argparse
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from jaxft.cli import answers, pushing, settings
from jaxft.config import ModelConfig, RunConfig, choices
from jaxft.errors import ConfigError, ExitCode, JaxftError, Preempted

QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TRANSFORMERS_VERBOSITY": "error"}
HELD_OUT = ("eval_data", "max_length", "chat_template")  # flags that an evaluation without a config reads
# What merging into a quantised base, or into what it was made of, changes.
MERGED = {
    "original_base": "against the trained model, merged into the base in its own precision",
    "quantised_again": "against the trained model, should the merged one be quantised like its base",
}


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Runs one command and returns its exit code. Raises errors that jaxft does not explain."""
    # transformers would say that torch is absent, which jaxft does not use. Other programs' settings come first.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # It misses kernels that the checks of exports do not need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = _parser()
    arguments, rest = parser.parse_known_args(settings.underscored(sys.argv[1:] if argv is None else argv))
    try:
        takes_config = hasattr(arguments, "config") or arguments.verb == "quickstart"
        overrides = settings.read_overrides(rest, arguments.options, arguments.verb, takes_config=takes_config)
        result = arguments.call(arguments, settings.with_flags(arguments, overrides))
    except (JaxftError, Preempted, KeyboardInterrupt, OSError) as error:
        return _explained(arguments.verb, error)
    if arguments.json and result is not None:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return ExitCode.DONE


def _explained(verb: str, error: BaseException) -> ExitCode:
    """Says what stopped a command, and returns its exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read the output, such as `head`, has read enough; Python must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    refused = isinstance(error, JaxftError) or (isinstance(error, OSError) and error.strerror is not None)
    if refused or isinstance(error, Preempted | KeyboardInterrupt):
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if isinstance(error, OSError):
            text = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        print(f"jaxft {verb}: {text}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    if refused:
        return ExitCode.REFUSED
    if isinstance(error, Preempted):
        return ExitCode.PREEMPTED
    return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.FAILED


def _config(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
    """The config of a command: that of --config, or the defaults, and over them its flags and overrides."""
    from jaxft.config import load
    from jaxft.config.reading import shipped_names

    if arguments.config is not None:
        return load(arguments.config, overrides)
    if not any(override.startswith("model.path=") for override in overrides):
        raise ConfigError(
            f"{arguments.verb} needs a model and rows: --model=PATH --data=ROWS, or a config: --config=NAME. "
            f"Shipped configs: {', '.join(shipped_names())}"
        )
    return load(None, settings.default_output(overrides))


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    config = _config(arguments, overrides)
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
    from jaxft.runs.examine import examine

    return examine(_config(arguments, overrides), _console(arguments), rows=arguments.rows)


def _eval(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft import api
    from jaxft.data import tokenizer_of
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
    result = api.evaluate(load_trained(model_path, base=base), tokenizer, config)
    if not arguments.json:
        for name, value in result.items():
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
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
        return load(arguments.run, overrides), arguments.model or arguments.run
    if arguments.config is not None:
        config = load(arguments.config, overrides)
        return config, arguments.model or config.model.path
    rows = next((text.partition("=")[2] for text in overrides if text.startswith("data.eval=")), None)
    if arguments.model is None or rows is None:
        raise ConfigError("give either --run=FOLDER or --config=FILE, or --model=PATH with --eval_data=ROWS")
    return load(None, [f"model.path={arguments.model}", f"data.train={rows}", *overrides]), arguments.model


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
        allow_unknown=arguments.allow_unknown,
        push=pushing.push_of(arguments),
    )
    if not arguments.json:
        what = written["compared"]
        checks = ", ".join(f"{reader} ({what} within {value:.1e})" for reader, value in written["checks"].items())
        print(f"{written['folder']}: read back by {checks}")
        answers.say_notes(written.get("left_out"), written.get("notes", []), sys.stdout)
        for name, how in MERGED.items():
            if name in written:
                change = written[name]
                print(f"{how}: {what} within {change['max']:.1e}, {change['mean']:.1e} on average")
        if "pushed" in written:
            print(f"pushed to {written['pushed']}")
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
        base=arguments.base,
        tokenizer=arguments.tokenizer,
        console=_console(arguments),
        allow_unknown=arguments.allow_unknown,
    )
    if not arguments.json:
        checks = "".join(f"\n  {name}: {figure}" for name, figure in done.get("checks", {}).items())
        print(f"{done['to']}: {done['form']}, {done['dtype']}, {done['bytes'] / 1e9:.2f} GB in {done['seconds']:.0f} s")
        print(f"compared with the source:{checks}" if checks else "")
    return done


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    # A plan runs in a process of its own; this one needs no JAX.
    from jaxft.planning.client import plan
    from jaxft.planning.tables import print_plan, print_search

    result = plan(
        _config(arguments, overrides),
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


class _Version(argparse.Action):
    """Prints the versions and ends; JAX's is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        print(f"jaxft {sys.modules['jaxft'].__version__}, jax {version('jax')}, Python {python}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxft",
        description=sys.modules["jaxft"].__doc__,
        epilog="`jaxft VERB --help` lists the options of a verb. `jaxft quickstart` is a first run.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of jaxft, jax and Python")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[..., Any], about: str) -> Callable[..., Any]:
        sub = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="figures as JSON, alone on standard output")
        sub.set_defaults(call=run, options=sub._option_string_actions)
        return sub.add_argument

    config = {"metavar": "NAME[:ARG]", "help": "a shipped config, a .py or .yaml file, a run folder; :smoke shrinks it"}
    model = {
        "metavar": "PATH",
        "help": "Hugging Face, PEFT or run folder, GGUF file, hf://owner/name, gs://bucket/folder",
    }

    option = verb("train", _train, "fine-tune a model on rows; the same command goes on after an interruption")
    option("--config", **config)
    settings.add_flags(verbs.choices["train"])
    option("--coordinator", metavar="HOST:PORT", help="process 0, when processes are started by hand")
    option("--num_processes", type=int, help="how many there are; with --coordinator")
    option("--process_id", type=int, help="which one this is, from 0; with --coordinator")
    option(
        "--heartbeat_seconds", type=int, default=100, help="a process without a sign of life for so long ends the run"
    )

    verb("quickstart", _quickstart, "LoRA on SmolLM2-135M, a small real task, on this machine")

    option = verb("data", _data, "examine rows as training would see them")
    option("--config", **config)
    settings.add_flags(verbs.choices["data"])
    option("--rows", type=int, default=2, help="how many rows to show with their trained tokens marked")

    option = verb("plan", _plan, "compile a training step for a slice that is not here: memory, time, money")
    option("--config", **config)
    settings.add_flags(verbs.choices["plan"])
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
    option("--base", metavar="PATH", help=answers.BASE)
    settings.add_flags(verbs.choices["eval"], HELD_OUT)
    answers.values_option(option)

    option = verb("export", _export, "write an adapter or a whole model for other tools, and read it back")
    option("--run", metavar="FOLDER", help="a run folder")
    option("--model", **model)
    option("--to", required=True, metavar="FOLDER", help="a new folder")
    option("--format", default="merged", help="merged (a whole Hugging Face folder) or adapter (PEFT)")
    option("--dtype", choices=choices(ModelConfig, "dtype"), help="stored type of a merged model")
    option("--step", type=int, help="a checkpoint of the run; by default the one that it exported, or the newest")
    option(
        "--base",
        default="trained",
        metavar="PATH",
        help=f"{answers.BASE}; of a quantised run: what to merge into, trained or original",
    )
    answers.unknown_option(option)
    pushing.push_options(option)

    option = verb("convert", _convert, "one model format into another, tensor by tensor, compared at the end")
    option(
        "source", metavar="SRC", help="Hugging Face, PEFT, Orbax or run folder, GGUF file, hf://owner/name[@revision]"
    )
    option("target", metavar="DST", help="a new folder, or a new file that ends in .gguf")
    option("--to", choices=("hf", "gguf", "gguf-adapter", "orbax"), help="gguf for a .gguf target, else hf")
    option("--dtype", help="float32, bfloat16, float16; q8_0, q4_k_m, q5_k_m (gguf); the source's own by default")
    option("--shard_size", type=_bytes, default="5GB", metavar="SIZE", help="of safetensors files, such as 5GB")
    option("--revision", help="branch, tag or commit of an hf:// source")
    answers.unknown_option(option)
    option("--base", metavar="PATH", help=answers.BASE)
    option("--tokenizer", metavar="PATH", help="folder of the tokenizer, if the source has none that can be read")
    return parser
