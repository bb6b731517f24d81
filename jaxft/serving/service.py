"""What handlers of requests share: settings, state, supervisor and engines of a running server."""

from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from jaxft.serving.engines.engines import Engines
from jaxft.serving.settings import ServeSettings
from jaxft.serving.storage.state import State
from jaxft.serving.supervision.supervisor import Supervisor

Phase = Literal["starting", "warm", "draining"]


@dataclass
class Service:
    """A running server. phase: what `GET /health` says. started_at: seconds since 1970. streams: open ones.

    newest_jobs: as streams show them, with the number of changes of the database that they are of.
    """

    settings: ServeSettings
    state: State
    supervisor: Supervisor
    engines: Engines
    started_at: int
    phase: Phase = "starting"
    streams: int = 0
    newest_jobs: tuple[int, dict[str, str]] = (-1, {})


def service_of(request: Request) -> Service:
    """The service that answers a request."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError(f"app.state.service is a {type(service).__name__}")
    return service
