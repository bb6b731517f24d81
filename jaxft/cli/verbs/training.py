"""The verbs that read a config of training: train, quickstart, data and plan."""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.cli import settings
from jaxft.cli.errors import explained
from jaxft.config import RunConfig
from jaxft.errors import ConfigError, counted
from jaxft.terminal import text as terminal

DEEP = ("write", "drop", "noise")  # options of `jaxft data` that belong to --deep


def config_of(arguments: argparse.Namespace, overrides: Sequence[str]) -> RunConfig:
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


def train(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft train`: the summary of the run; None in processes other than the first."""
    config = config_of(arguments, overrides)
    from jaxft.sharding import distributed
    from jaxft.sharding.ending import end_on_peer_error
    from jaxft.sharding.expectations import Expected

    def say(text: str) -> None:
        # Past Python's buffers, whose locks another thread may hold when this process is aborted.
        with contextlib.suppress(OSError):
            os.write(2, f"jaxft train: {terminal.safe_message(text)}\n".encode())

    with end_on_peer_error(say, lambda error: explained(arguments.verb, error, debug=arguments.debug)):
        distributed.start(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            heartbeat_seconds=arguments.heartbeat_seconds,
            start_seconds=arguments.start_seconds,
            expected=Expected(processes=arguments.expect_processes, platform=arguments.expect_platform),
        )
        from jaxft.runs.train import train

        console = console_of(arguments)
        summary = train(config, console=console)
    from jaxft.runs.present import print_summary
    from jaxft.sharding.processes import is_primary

    if not is_primary():
        return None
    print_summary(summary, console)
    return summary


def quickstart(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft quickstart`: the summary of its run."""
    from jaxft.sharding import distributed

    distributed.start()
    from jaxft.runs.present import print_summary
    from jaxft.runs.quickstart import quickstart

    console = console_of(arguments)
    summary = quickstart(console=console, overrides=tuple(overrides))
    print_summary(summary, console)
    return summary


def data(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft data`: what training would see of the rows."""
    if arguments.clear_cache:
        return _clear_cache(arguments, overrides)
    if arguments.deep:
        return _deep(arguments, overrides)
    if given := [name for name in DEEP if getattr(arguments, name) is not None]:
        raise ConfigError(f"--{given[0]} belongs to the deep examination: add --deep")
    from jaxft.runs.examine import examine

    return examine(config_of(arguments, overrides), console_of(arguments), rows=arguments.rows)


def deep_options(option: Callable[..., Any]) -> None:
    """The options of `jaxft data --deep`."""
    option(
        "--deep",
        action="store_true",
        help="look for duplicates, leaks into held-out rows, contradictions, odd shapes and imbalance instead",
    )
    option("--write", metavar="FILE", help="with --deep: a new .jsonl file of the training rows without bad ones")
    option("--drop", metavar="REASONS", help="which rows --write leaves out, such as leaks,duplicates; by default all")
    option(
        "--noise",
        action="store_true",
        default=None,
        help="with --deep: train LoRA on each half of the rows, and show answers of the other that may be wrong",
    )
    option("--noise_steps", type=int, default=100, metavar="N", help="most updates of each of the two trainings (100)")


def _deep(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft data --deep`: what is wrong with the rows beyond their form. Without --noise it needs no model."""
    from jaxft.runs.deep.examine import NO_MODEL, Request, examine_deep_rows, reasons_in

    named = any(override.startswith("model.path=") for override in overrides)
    if arguments.config is None and not named and any(override.startswith("data.") for override in overrides):
        overrides = [*overrides, f"model.path={NO_MODEL}"]
    request = Request(
        rows=arguments.rows,
        write=arguments.write,
        drop=reasons_in(arguments.drop),
        noise=bool(arguments.noise),
        noise_steps=arguments.noise_steps,
    )
    return examine_deep_rows(config_of(arguments, overrides), console_of(arguments), request)


def _clear_cache(arguments: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Removes what was kept of tokenised rows: in data.cache of the config or the options, else in the user's cache."""
    from jaxft.config import DataConfig
    from jaxft.data.encoded.cache import clear
    from jaxft.data.encoded.encoding import cache_folder

    given = dict(override.partition("=")[::2] for override in overrides)
    if arguments.config is not None:
        data = config_of(arguments, overrides).data
    else:
        data = DataConfig(train="-", cache=given.get("data.cache", "auto"))
    folder = cache_folder(data)
    if folder is None:
        raise ConfigError("data.cache is 'none', so nothing was kept. Leave it out for the cache of the user")
    entries, size = clear(folder)
    from jaxft.terminal.console import say

    megabytes = f"{size / 1e6:,.1f} MB"
    say(console_of(arguments), f"removed the tokenised rows of {counted(entries, 'set')} ({megabytes}) from {folder}")
    return {"folder": str(folder), "sets": entries, "bytes": size}


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft plan`: costs of a step on hardware that need not be present."""
    # A plan runs in a process of its own; this one needs no JAX.
    from jaxft.planning.client import plan
    from jaxft.planning.tables import print_plan, print_search

    result = plan(
        config_of(arguments, overrides),
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
        (print_search if arguments.search else print_plan)(result, console_of(arguments))
    return result


def console_of(arguments: argparse.Namespace) -> Any:
    """The terminal of a command's tables and progress."""
    from jaxft.terminal.console import SafeConsole

    # With --json, standard output carries the JSON alone.
    return SafeConsole(stderr=arguments.json)
