"""The verbs that ask a model: generate, sample, chat and score."""

import argparse
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from jaxft.cli.standard_input import prompt_lines, standard_input
from jaxft.config import DataConfig, ModelConfig, RunConfig, choices
from jaxft.config.fields import own_fields
from jaxft.errors import ConfigError
from jaxft.files.atomic import write_text
from jaxft.files.buckets.working_copy import run_in_bucket
from jaxft.files.run_folder import is_run_folder
from jaxft.files.strict_json import parse_json
from jaxft.files.targets import check_new_file, locked_output
from jaxft.generation.settings import Sampling
from jaxft.home import local_path
from jaxft.terminal import text as terminal

BASE = "of a PEFT folder: where its base is, in place of the path that it names"
# How rows that are scored are read: fields of `data` in a config.
COLUMNS = ("format", "prompt_field", "completion_field", "text_field", "chosen_field", "rejected_field", "limit")

ALLOW_UNKNOWN = "a field of config.json to ignore although jaxft does not know what it means; once per field"


def generate(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft generate`: answers to prompts, or the best of several by a reward model."""
    from jaxft import api
    from jaxft.generation import chat as chats
    from jaxft.generation.text import Answer

    prompts: list[Any] = list(arguments.prompt)
    if not prompts:
        prompts = prompt_lines()
    if not prompts:
        raise ConfigError("no prompt: give --prompt=TEXT (again for more) or lines on standard input")
    values = template_values(arguments)
    if not arguments.chat and (values or arguments.chat_template or arguments.system):
        raise ConfigError(
            "--chat_template, --chat_template_kwargs and --system are for chats, and a plain prompt is continued as it "
            "is: add --chat"
        )
    tokenizer = api.load_tokenizer(
        arguments.model, base=arguments.base, chat_template=arguments.chat_template, chat_template_kwargs=values
    )
    if arguments.chat:
        chats.check(tokenizer, arguments.system)
    model = _load_model(arguments.model, **_loading(arguments))
    say_notes(model.left_out, model.notes, sys.stderr)
    if arguments.chat:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        prompts = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    if arguments.best_of is not None or arguments.reward_model is not None:
        return _best_of(arguments, model, tokenizer, prompts)
    # Someone who watches sees the text while it comes.
    watched = len(prompts) == 1 and not arguments.json and sys.stdout.isatty()
    shown = _shown(arguments)
    show, show_thoughts = _writers(shown) if watched else (None, None)
    results = api.generate(model, tokenizer, prompts, **_sampling(arguments), on_text=show, on_thoughts=show_thoughts)
    answers = typing.cast(list[Answer], results)
    if not arguments.json:
        print("" if watched else shown("\n---\n".join(answers)))
    for number, one in enumerate(answers, 1):
        if one.reasoning_content and not one:
            print(
                f"answer {number} ended in its thoughts, at --max_new_tokens={arguments.max_new_tokens}: raise it",
                file=sys.stderr,
            )
    thoughts = [one.reasoning_content for one in answers]
    return {"answers": answers} | ({"reasoning_content": thoughts} if any(thoughts) else {})


def _shown(arguments: argparse.Namespace) -> Callable[[str], str]:
    """What is printed of a model's text: as it is into a file or a pipe or with --raw, else escaped for a terminal."""
    return str if arguments.raw or not sys.stdout.isatty() else terminal.safe_text


def _writers(shown: Callable[[str], str]) -> tuple[Callable[[int, str], None], Callable[[int, str], None]]:
    """What writes an answer to standard output, and its thoughts above it to standard error, piece by piece."""
    parts: list[bool] = []  # whether each piece was of the answer

    def show(row: int, piece: str) -> None:
        if parts and not parts[-1]:
            print("\n", file=sys.stderr)
        parts.append(True)
        print(shown(piece), end="", flush=True)

    def show_thoughts(row: int, piece: str) -> None:
        parts.append(False)
        print(shown(piece), end="", flush=True, file=sys.stderr)

    return show, show_thoughts


def _best_of(arguments: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[Any]) -> dict[str, Any]:
    from jaxft import api

    if arguments.best_of is None or arguments.reward_model is None:
        raise ConfigError(
            "--best_of=N and --reward_model=PATH belong together: N answers are drawn, and it chooses one"
        )
    reward_model = _load_model(arguments.reward_model, dtype=arguments.dtype)
    results = api.best_of(
        model,
        tokenizer,
        reward_model,
        prompts,
        n=arguments.best_of,
        reward_tokenizer=api.load_tokenizer(arguments.reward_model),
        **_sampling(arguments),
    )
    best = results if isinstance(results, list) else [results]
    if not arguments.json:
        print(_shown(arguments)("\n---\n".join(one.text for one in best)))
    return {
        "answers": [one.text for one in best],
        "scores": [one.score for one in best],
        "candidates": [
            [{"text": text, "score": score} for text, score in zip(one.texts, one.scores, strict=True)] for one in best
        ],
    }


def score(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft score`: the score of every row of a file, one JSON object a line, and a summary."""
    if arguments.to is None:
        return _score(arguments)
    check_new_file(local_path(arguments.to))
    with locked_output(arguments.to, "jaxft score"):
        return _score(arguments)


def _score(arguments: argparse.Namespace) -> Any:
    from jaxft import api
    from jaxft.config import MeshConfig
    from jaxft.sharding.mesh import make_mesh_plan

    given = {name: getattr(arguments, name) for name in COLUMNS if getattr(arguments, name) is not None}
    tokenizer = api.load_tokenizer(arguments.model, base=arguments.base, chat_template=arguments.chat_template)
    model = _load_model(
        arguments.model,
        **_loading(arguments),
        mesh=make_mesh_plan(MeshConfig()),
    )
    scored = api.score(
        model, tokenizer, arguments.data, batch_size=arguments.batch_size, split=arguments.split, **given
    )
    lines = "".join(json.dumps(one) + "\n" for one in scored)
    if arguments.to is not None:
        write_text(local_path(arguments.to), lines)
    elif not arguments.json:
        print(lines, end="")
    summary = summarized(scored)
    if not arguments.json:
        text = "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in summary.items()
        )
        terminal.write(text, error=True)
    return summary | ({} if arguments.to is not None else {"scores": scored})


def sample(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft sample`: the best of several answers to each prompt of a config, as a file of rows."""
    from jaxft.runs.sample import check_outputs

    pairs = None if arguments.pairs is None else local_path(arguments.pairs)
    check_outputs(local_path(arguments.to), pairs, overwrite=arguments.overwrite)
    with locked_output(arguments.to, "jaxft sample", exclusive=False):  # before the model is loaded
        return _sample(arguments, overrides)


def _sample(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from jaxft.config import load

    config = load(arguments.config, overrides)
    from jaxft import api

    model, tokenizer = _sampled_model(config, arguments.model)
    reward_model = arguments.reward_model and _load_model(arguments.reward_model, dtype=config.model.dtype)
    summary = api.sample(
        model,
        tokenizer,
        config,
        arguments.to,
        keep=arguments.keep,
        threshold=arguments.threshold,
        keep_cut=arguments.keep_cut,
        pairs=arguments.pairs,
        reward_model=reward_model or None,
        reward_tokenizer=api.load_tokenizer(arguments.reward_model) if reward_model else None,
        overwrite=arguments.overwrite,
        print_line=lambda line: terminal.write(line, error=True),
    )
    if not arguments.json:
        for name, value in summary.items():
            terminal.write(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    return summary


def _sampled_model(config: RunConfig, path: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) that `jaxft sample` uses: those at `path`, or the base of the config."""
    from jaxft import api
    from jaxft.config import MeshConfig
    from jaxft.data import tokenizer_of
    from jaxft.runs import folder
    from jaxft.runs.export import load_trained
    from jaxft.sharding.mesh import make_mesh_plan

    path = None if path is None else run_in_bucket(path)
    if path is not None and is_run_folder(path):
        base = folder.run_config(path).model
        template = folder.chat_template(path)
        tokenizer = api.load_tokenizer(
            base.path,
            revision=base.revision,
            base=base.base,
            chat_template=template,
            chat_template_kwargs=config.data.chat_template_kwargs,
        )
        return load_trained(path), tokenizer
    own, revision = config.model, config.model.revision if path is None else None
    model = _load_model(
        path or own.path,
        revision=revision,
        base=own.base if path is None else None,
        dtype=own.dtype,
        param_dtype=own.param_dtype,
        quantization=own.quantization,
        allow_unknown=own.allowed if path is None else (),
        mesh=make_mesh_plan(MeshConfig()),
    )
    return model, tokenizer_of(config, path)


def summarized(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of what `api.score` returned: the number of rows or pairs, the mean score, and the accuracy of pairs."""
    values = [one[key] for one in scored for key in ("score", "chosen", "rejected") if key in one]
    if any("right" in one for one in scored):
        right = sum(one["right"] for one in scored)
        return {"pairs": len(scored), "accuracy": right / len(scored), "mean_score": sum(values) / len(values)}
    return {"rows": len(scored), "mean_score": sum(values) / len(values)}


def chat(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft chat`: a conversation on the terminal."""
    from jaxft import api
    from jaxft.generation import chat as chats

    sampling = Sampling(**_sampling(arguments))
    standard_input("chat", "start it on a terminal, or give it a file of messages, one on each line")
    tokenizer = api.load_tokenizer(
        arguments.model,
        base=arguments.base,
        chat_template=arguments.chat_template,
        chat_template_kwargs=template_values(arguments),
    )
    chats.check(tokenizer, arguments.system)
    model = _load_model(arguments.model, **_loading(arguments))
    say_notes(model.left_out, model.notes, sys.stderr)
    session = chats.Chat(model=model.module, tokenizer=tokenizer, sampling=sampling, system=arguments.system)
    out = sys.stderr if arguments.json else sys.stdout
    chats.converse(session, *chats.terminal(out, raw=arguments.raw or not out.isatty()))
    return {"messages": session.messages}


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {field.key: getattr(arguments, field.key) for field in own_fields(Sampling)}
    return settings | {"stop": tuple(arguments.stop)}


def template_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The variables of the chat template that the command line gives. Raises ConfigError for other than JSON."""
    given = arguments.chat_template_kwargs
    try:
        values = {} if given is None else parse_json(given)
    except ValueError as error:
        values = str(error)
    if not isinstance(values, dict):
        raise ConfigError(
            f"--chat_template_kwargs={given} must be a JSON object, such as '{{\"enable_thinking\": false}}'"
            + (f": {values}" if isinstance(values, str) else "")
        )
    return values


def template_options(option: Callable[..., Any]) -> None:
    """The chat template, and values of its variables."""
    option(
        "--chat_template", metavar="NAME|FILE", help="a built-in template or a Jinja file in place of the tokenizer's"
    )
    values_option(option)


def values_option(option: Callable[..., Any]) -> None:
    """Values of the chat template's variables."""
    option(
        "--chat_template_kwargs",
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'; a run's own by default",
    )


def say_notes(left_out: str | None, notes: Sequence[str], stream: TextIO) -> None:
    """Says what of a model's files was not loaded, or read otherwise than they say, if anything."""
    for line in (*([] if left_out is None else [left_out]), *notes):
        print(terminal.safe_message(line), file=stream)


def raw_option(option: Callable[..., Any]) -> None:
    """Whether a model's text reaches a terminal as it is."""
    option("--raw", action="store_true", help="print control characters of answers as they are on a terminal too")


def sampling_options(option: Callable[..., Any], *, max_new_tokens: int) -> None:
    """The options of generation: one for each field of `Sampling`, and how the model is loaded."""
    defaults = {"max_new_tokens": max_new_tokens}
    for field in own_fields(Sampling):
        if field.key == "stop":
            option("--stop", action="append", default=[], metavar="TEXT", help=f"{field.meaning}; once per text")
        else:
            default = defaults.get(field.key, field.default)
            option(f"--{field.key}", type=field.base, default=default, help=field.meaning)
    loading_options(option)


def score_options(option: Callable[..., Any]) -> None:
    """The options of `jaxft score`."""
    option(
        "--data", required=True, metavar="ROWS", help="a file, a folder, a pattern, a list; hf://owner/name, tfds:name"
    )
    option("--split", default="train", help="which part of a set that has parts")
    option("--to", metavar="FILE", help="where the scores are written, a JSON object a line; else standard output")
    option("--batch_size", type=int, default=8, help="sequences at a time")
    option(
        "--chat_template", metavar="NAME|FILE", help="a built-in template or a Jinja file in place of the tokenizer's"
    )
    fields = {field.key: field for field in own_fields(DataConfig)}
    for name in COLUMNS:
        option(f"--{name}", type=fields[name].base, help=fields[name].meaning)
    loading_options(option)


def sample_options(option: Callable[..., Any]) -> None:
    """The options of `jaxft sample`."""
    option("--to", required=True, metavar="FILE", help="a new .jsonl file of prompts with the answers that are kept")
    option("--pairs", metavar="FILE", help="a new .jsonl file of the best and the worst answer to each prompt")
    option("--keep", default="best", help="best (one answer to each prompt) or all (with --threshold)")
    option("--threshold", type=float, help="smallest reward of an answer that is kept")
    option("--keep_cut", action="store_true", help="keep answers too that were cut off at their length")
    option("--reward_model", metavar="PATH", help="a reward model that judges in the place of rewards.model")
    option("--overwrite", action="store_true", help="replace finished files")


def _load_model(path: str, **settings: Any) -> Any:
    """A model for one command. The next command finds what is compiled for it."""
    from jaxft import api
    from jaxft.hardware.compile_cache import keep_compiled

    keep_compiled()
    return api.load_model(path, **settings)


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("base", "dtype", "quantization", "allow_unknown")
    return {name: getattr(arguments, name) for name in names}


def loading_options(option: Callable[..., Any]) -> None:
    """How a model is loaded."""
    option("--base", metavar="PATH", help=BASE)
    option("--dtype", default="float32", choices=choices(ModelConfig, "dtype"))
    option(
        "--quantization",
        choices=choices(ModelConfig, "quantization"),
        help="quantise the linear layers on loading and keep them so",
    )
    unknown_option(option)


def unknown_option(option: Callable[..., Any]) -> None:
    """Fields of config.json that are ignored."""
    option("--allow_unknown", action="append", default=[], metavar="NAME", help=ALLOW_UNKNOWN)
