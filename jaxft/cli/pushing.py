"""The options by which `jaxft export` pushes what it has written to the Hugging Face Hub."""

import argparse
from collections.abc import Callable
from typing import Any

from jaxft.errors import ConfigError


def push_options(option: Callable[..., Any]) -> None:
    """Adds the options to a command."""
    option("--push", metavar="OWNER/NAME", help="upload it to a new, private repository on the Hugging Face Hub")
    option("--public", action="store_true", help="with --push: a repository that everybody can see")
    option("--update", action="store_true", help="with --push: a further commit to a repository that exists")
    option("--hub_base", metavar="OWNER/NAME", help="with --push: the base's name on the Hub, if it was a local folder")


def push_of(arguments: argparse.Namespace) -> Any:
    """What the options say, as a `checkpoint.hub.push.Push`; None without --push. Raises ConfigError."""
    if arguments.push is None:
        given = [flag for flag in ("public", "update", "hub_base") if getattr(arguments, flag)]
        if given:
            raise ConfigError(f"--{given[0]} says how --push uploads: give --push=OWNER/NAME too, or leave it out")
        return None
    from jaxft.checkpoint.hub.push import Push

    return Push(name=arguments.push, public=arguments.public, update=arguments.update, base=arguments.hub_base)
