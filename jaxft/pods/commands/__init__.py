"""The verbs of `jaxft pod` for runs that are there, from any terminal."""

from jaxft.pods.commands.ends import delete, stop
from jaxft.pods.commands.fetch import fetch
from jaxft.pods.commands.views import list_runs, logs, status

__all__ = ["delete", "fetch", "list_runs", "logs", "status", "stop"]
