"""The flags of the settings that most runs change, and the overrides of all others.

`--batch_size=8` sets `train.batch_size`. Dashes may stand for underscores, and every field of a config may be set by
`--section.field=value` or `--config.section.field=value`.
"""

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.config import RunConfig
from jaxft.config.fields import all_fields
from jaxft.config.peer_names import field_for
from jaxft.errors import ConfigError, did_you_mean
from jaxft.system import undecoded

PREFIX = "config."
DOTTED = re.compile(r"--((?:\w+\.)+\w+|seed|output_dir)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """A flag for fields of a config.

    fields: what its value is set to; `value`: of a switch, the value that it sets. about: its help. repeats: whether it
    may be given several times, which joins the values by commas.
    """

    name: str
    fields: tuple[str, ...]
    about: str
    metavar: str = "N"
    value: str | None = None
    repeats: bool = False
    aliases: tuple[str, ...] = ()


FLAGS = (
    Flag("model", ("model.path",), "Hugging Face or PEFT folder, GGUF file, or hf://owner/name", "PATH"),
    Flag("base", ("model.base",), "of a PEFT folder: where its base is", "PATH"),
    Flag(
        "data",
        ("data.train",),
        "training rows: a file, a folder, a pattern, a list; hf://owner/name, tfds:name",
        "ROWS",
    ),
    Flag("eval_data", ("data.eval",), "held-out rows", "ROWS"),
    Flag("output", ("output_dir",), "the run folder; by default runs/ with the names of model and data", "FOLDER"),
    Flag("epochs", ("train.epochs",), "passes over the rows (1)", "X"),
    Flag("steps", ("train.steps",), "optimizer steps, in place of --epochs"),
    Flag("learning_rate", ("optim.learning_rate",), "peak learning rate (2e-4)", "X", aliases=("lr",)),
    Flag("batch_size", ("train.batch_size",), "sequences of an optimizer step, over all devices (16)"),
    Flag("accumulation", ("train.accumulation_steps",), "parts of the batch, computed one after another (1)"),
    Flag("max_length", ("data.max_length",), "tokens of a training sequence (1024)"),
    Flag("no_packing", ("data.packing",), "one row a sequence", value="False"),
    Flag("chat_template", ("data.chat_template",), "in place of the tokenizer's own template", "FILE"),
    Flag("lora_r", ("adapter.r",), "rank of LoRA (16)"),
    Flag("lora_alpha", ("adapter.alpha",), "alpha of LoRA (32)", "X"),
    Flag("full", ("adapter.kind",), "train all weights, without an adapter", value="none"),
    Flag("qlora", ("model.quantization",), "keep the frozen weights in 4 bits", value="nf4"),
    Flag("dtype", ("model.dtype", "model.param_dtype"), "float32 (the default) or bfloat16", "TYPE"),
    Flag("eval_every", ("train.eval_every",), "steps between held-out losses"),
    Flag("save_every", ("checkpoint.every",), "steps between checkpoints"),
    Flag("report_to", ("train.report_to",), "trackers that get the metrics: wandb, mlflow, trackio", "NAMES"),
    Flag("allow_unknown", ("model.allow_unknown",), "a field of config.json to ignore", "NAME", repeats=True),
    Flag("seed", ("seed",), "of everything that is drawn (0)"),
)
BY_FIELD = {flag.fields[0]: flag for flag in reversed(FLAGS) if flag.value is None}


def add_flags(parser: argparse.ArgumentParser, only: Sequence[str] = ()) -> None:
    """Adds the flags to the parser of a command: all of them, or `only` those of these names."""
    group = parser.add_argument_group("settings, over those of --config; all others by --section.field=VALUE")
    for flag in FLAGS:
        if only and flag.name not in only:
            continue
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        how: dict[str, Any] = {"action": "store_true"} if flag.value is not None else {"metavar": flag.metavar}
        how |= {"action": "append"} if flag.repeats else {}
        group.add_argument(*names, dest=f"set_{flag.name}", help=flag.about, **how)


def with_flags(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The flags as overrides, and after them `overrides`. Raises ConfigError if both set a field, differently."""
    given: dict[str, tuple[str, str]] = {}
    for flag in FLAGS:
        value = getattr(arguments, f"set_{flag.name}", None)
        if value is None or value is False:
            continue
        text = ",".join(value) if flag.repeats else value if flag.value is None else flag.value
        given |= {field: (text, f"--{flag.name}") for field in flag.fields}
    for override in overrides:
        key, _, text = override.partition("=")
        if key in given and given[key][0] != text:
            raise ConfigError(f"{given[key][1]} and --{override} both set {key}: give one of them")
    return [*(f"{field}={text}" for field, (text, _) in given.items()), *overrides]


def default_output(overrides: Sequence[str]) -> list[str]:
    """The overrides of a run without a config, with a run folder that is named after its model and rows."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if "output_dir" in given:
        return list(overrides)
    parts = [_stem(given[key]) for key in ("model.path", "data.train") if given.get(key)]
    return [*overrides, f"output_dir={os.path.join('runs', '-'.join(parts) or 'unnamed')}"]


def _stem(path: str) -> str:
    name = re.split(r"[/:\\]", path.split(",")[0].rstrip("/").split("@")[0])[-1]
    return re.sub(r"[^\w.-]", "_", re.sub(r"(\.(jsonl?|csv|parquet|txt|gguf|gz|zst|arrow))+$", "", name)) or "rows"


def refuse_undecoded(given: Sequence[str]) -> None:
    """Raises ConfigError for an argument whose bytes are not UTF-8: paths and texts in files of a run are UTF-8."""
    for item in given:
        if (problem := undecoded(item)) is not None:
            raise ConfigError(f"the argument {item!a} {problem}: write it in UTF-8, or rename the file")


def underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with `--batch-size` as `--batch_size`; what stands behind `=` is kept."""
    out = []
    for item in argv:
        name, equals, value = item.partition("=")
        is_flag = re.fullmatch(r"--[A-Za-z][\w.-]*", name) is not None
        out.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if is_flag else item)
    return out


def read_overrides(rest: Sequence[str], options: Sequence[str], verb: str, *, takes_config: bool) -> list[str]:
    """The `section.field=value` of arguments that argparse did not know.

    A switch, a field that is true or false, may stand without a value. options: those of the command, for hints.
    takes_config: whether it reads a config. Raises ConfigError for anything else, with the right spelling if one is
    known.
    """
    out: list[str] = []
    waiting: str | None = None
    for item in rest:
        if waiting is not None:
            alone = item.startswith("--")
            out.append(_switched_on(waiting) if alone else f"{waiting}={item}")
            waiting = None
            if not alone:
                continue
        match = DOTTED.fullmatch(item)
        if match is not None and not takes_config:
            raise ConfigError(f"{item} changes a config, and {verb} reads none")
        if match is None:
            hint = _spelled_here(item, options) if takes_config else ""
            raise ConfigError(f"unknown argument {item!r}" + (hint or f".{did_you_mean(item.split('=')[0], options)}"))
        key = match[1].removeprefix(PREFIX)
        if match[2] is None:
            waiting = key
        else:
            out.append(f"{key}={match[2]}")
    return out if waiting is None else [*out, _switched_on(waiting)]


def _switched_on(key: str) -> str:
    """The override of a field without a value, which is a switch. Raises ConfigError for a field of another type."""
    field = all_fields(RunConfig).get(key)
    if field is None or field.base is not bool:
        raise ConfigError(f"--{key} has no value: write --{key}=VALUE")
    return f"{key}=True"


def _spelled_here(item: str, options: Sequence[str]) -> str:
    """How jaxft spells an argument: a field without its dashes, or another program's option; "" if it is not known."""
    name, _, value = item.lstrip("-+").partition("=")
    leaf = name.rpartition(".")[2].replace("-", "_")
    if name in all_fields(RunConfig):
        return f": write {_spelling(name, value)}"
    flag = next((flag for flag in FLAGS if leaf in (flag.name, *flag.aliases)), None)
    if flag is not None and f"--{flag.name}" in options:
        return f": write --{leaf}" + (f"={shlex.quote(value) if value else 'VALUE'}" if flag.value is None else "")
    if (other := field_for(leaf)) is not None:
        field, note = other
        # The value may mean something else there, so it is not repeated where a difference is known.
        return f": write {_spelling(field, '' if note else value)}" + (f", {note}" if note else "")
    same = [key for key in all_fields(RunConfig) if key.rpartition(".")[2] == leaf and ".NAME." not in key]
    if same:
        return ": write " + " or ".join(_spelling(key, value) for key in same[:3])
    within = [key for key in all_fields(RunConfig) if key.startswith(f"{name}.")]
    if within:
        return f": {name} is a section, whose fields are set one by one, such as --{within[0]}=VALUE"
    return ""


def _spelling(field: str, value: str) -> str:
    name = BY_FIELD[field].name if field in BY_FIELD else field
    return f"--{name}={shlex.quote(value) if value else 'VALUE'}"
