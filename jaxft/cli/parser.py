"""The verbs and their options."""

import argparse
import sys
import typing
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from jaxft.cli import answers, pushing, settings
from jaxft.cli.verbs import comparing, pods, serving, survey, training, written
from jaxft.config import ModelConfig, choices

HELD_OUT = ("eval_data", "max_length", "chat_template")  # flags that an evaluation without a config reads
CONFIG: dict[str, Any] = {
    "metavar": "NAME[:ARG]",
    "help": "a shipped config, a .py or .yaml file, a run folder; :smoke shrinks it",
}
MODEL: dict[str, Any] = {
    "metavar": "PATH",
    "help": "Hugging Face, PEFT or run folder, GGUF file, hf://owner/name, gs://bucket/folder",
}


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    return int(float(number) * units.get(unit, 1))


class _Version(argparse.Action):
    """Prints the versions and ends; JAX's is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        print(f"jaxft {sys.modules['jaxft'].__version__}, jax {version('jax')}, Python {python}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line: each verb with its options and the function that it calls."""
    parser = argparse.ArgumentParser(
        prog="jaxft",
        description=sys.modules["jaxft"].__doc__,
        epilog="`jaxft VERB --help` lists the options of a verb. `jaxft quickstart` is a first run.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of jaxft, jax and Python")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_training(verbs)
    _add_answers(verbs)
    _add_written(verbs)
    _add_survey(verbs)
    serving.add_options(
        _verb(verbs, "serve", serving.serve, "a fine-tuning service for the openai SDK, on this machine"), _bytes
    )
    pods.add_verbs(verbs, _verb, CONFIG)
    return parser


def _verb(verbs: Any, name: str, run: Callable[..., Any], about: str) -> Callable[..., Any]:
    """Adds a verb; returns what adds an option to it."""
    sub = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
    sub.add_argument("--json", action="store_true", help="figures as JSON, alone on standard output")
    sub.add_argument("--debug", action="store_true", help="show the traceback of any error")
    sub.set_defaults(call=run, options=sub._option_string_actions)
    return typing.cast(Callable[..., Any], sub.add_argument)


def _add_training(verbs: Any) -> None:
    option = _verb(
        verbs, "train", training.train, "fine-tune a model on rows; the same command goes on after an interruption"
    )
    option("--config", **CONFIG)
    settings.add_flags(verbs.choices["train"])
    option("--coordinator", metavar="HOST:PORT", help="process 0, when processes are started by hand")
    option("--num_processes", type=int, help="how many there are; with --coordinator")
    option("--process_id", type=int, help="which one this is, from 0; with --coordinator")
    option(
        "--heartbeat_seconds", type=int, default=100, help="a process without a sign of life for so long ends the run"
    )
    option("--start_seconds", type=int, default=300, help="how long processes wait for each other at the start")
    option("--expect_processes", type=int, metavar="N", help="refuse to start with another number of processes")
    option("--expect_platform", choices=("tpu", "gpu", "cpu"), help="refuse to start on other devices")

    _verb(verbs, "quickstart", training.quickstart, "LoRA on SmolLM2-135M, a small real task, on this machine")

    option = _verb(verbs, "data", training.data, "examine rows as training would see them")
    option("--config", **CONFIG)
    settings.add_flags(verbs.choices["data"])
    option("--rows", type=int, default=2, help="how many rows to show with their trained tokens marked")
    option("--clear_cache", action="store_true", help="only remove the tokenised rows that were kept (data.cache)")
    training.deep_options(option)

    option = _verb(
        verbs, "plan", training.plan, "compile a training step for a slice that is not here: memory, time, money"
    )
    option("--config", **CONFIG)
    settings.add_flags(verbs.choices["plan"])
    option("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p-8, v6e:1x1, ..., or a GPU such as h100:8")
    option("--slices", type=int, default=1, help="of this topology, joined by the data-centre network")
    option("--level", choices=("O1", "default"), default="O1", help="XLA's optimisation: quick, or as a run compiles")
    option("--search", action="store_true", help="the cheapest and fastest way; --topology names kinds: v5e,v6e")
    option("--compiles", type=int, default=2, help="ways that --search compiles, at most, for each of the two")
    option("--tokens", type=int, help="in the training set, if it is not on this machine")
    option("--examples", type=int, help="in the training set, if it is not on this machine and rows are not packed")
    option("--prices", metavar="FILE", help="USD per chip-hour in place of jaxft's own table")


def _add_answers(verbs: Any) -> None:
    option = _verb(verbs, "generate", answers.generate, "answer prompts")
    option("--model", required=True, **MODEL)
    option("--prompt", action="append", default=[], help="once per prompt; standard input if there is none")
    option("--chat", action="store_true", help="render each prompt as a user message by the chat template")
    option("--system", help="system message, with --chat")
    answers.template_options(option)
    option("--best_of", type=int, metavar="N", help="draw N answers to each prompt; --reward_model chooses one")
    option("--reward_model", metavar="PATH", help="a reward model: a folder that `method.name=reward` wrote")
    answers.sampling_options(option, max_new_tokens=128)
    answers.raw_option(option)

    option = _verb(verbs, "score", answers.score, "score answers, or pairs of them, with a reward model")
    option("--model", required=True, **MODEL)
    answers.score_options(option)

    option = _verb(
        verbs, "sample", answers.sample, "draw answers to a config's prompts, judge them, and write the best as rows"
    )
    option("--config", required=True, **CONFIG)
    option("--model", **MODEL)
    answers.sample_options(option)

    option = _verb(verbs, "chat", answers.chat, "talk with a model on the terminal")
    option("--model", required=True, **MODEL)
    option("--system", help="system message")
    answers.template_options(option)
    answers.sampling_options(option, max_new_tokens=512)
    answers.raw_option(option)


def _add_written(verbs: Any) -> None:
    option = _verb(verbs, "eval", written.evaluate, "held-out loss, perplexity and score by generation")
    option("--run", metavar="FOLDER", help="a run folder: its tuned model on its held-out rows")
    option("--config", **CONFIG)
    option("--model", **MODEL)
    option("--base", metavar="PATH", help=answers.BASE)
    settings.add_flags(verbs.choices["eval"], HELD_OUT)
    answers.values_option(option)

    option = _verb(verbs, "lm-eval", written.lm_eval, "standard tasks of lm-evaluation-harness")
    option("--model", required=True, **MODEL)
    written.lm_eval_options(option)

    option = _verb(
        verbs, "compare", comparing.compare, "prompts against tuned models on the same rows: is tuning worth it?"
    )
    option("--config", **CONFIG)
    comparing.add_options(option)

    option = _verb(
        verbs, "export", written.export, "write an adapter or a whole model for other tools, and read it back"
    )
    option("--run", metavar="FOLDER", help="a run folder")
    option("--model", **MODEL)
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

    option = _verb(
        verbs, "convert", written.convert, "one model format into another, tensor by tensor, compared at the end"
    )
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


def _add_survey(verbs: Any) -> None:
    option = _verb(verbs, "runs", survey.runs, "the runs below a folder: running, interrupted, finished or broken")
    option("folder", nargs="?", default="runs", metavar="FOLDER", help="where runs are; by default runs")

    option = _verb(verbs, "verify", survey.verify, "whether a run, an export or another model on disk is whole")
    option("path", metavar="PATH", help="a run folder, a model folder or a GGUF file")
    option("--no_rows", action="store_true", help="do not read and tokenise the rows of a run again")

    option = _verb(verbs, "doctor", survey.doctor, "whether this machine can train: versions, chips, slice, disk")
    option("--output_dir", metavar="FOLDER", help="write a file there too; a folder, or gs://bucket/folder")
    option("--seconds", type=float, default=60, help="how long JAX may take to show its devices")
    option("--no_devices", action="store_true", help="do not start JAX, as on a machine where a run uses the chips")
