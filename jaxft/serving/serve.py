"""The server: opens the state, supervises the jobs, and answers requests until it is told to stop."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette

from jaxft.errors import JaxftError
from jaxft.serving.app import make_app
from jaxft.serving.engines.engines import COMMAND, EngineLimits, Engines
from jaxft.serving.http.access import RequestIds
from jaxft.serving.service import Service
from jaxft.serving.settings import ServeSettings
from jaxft.serving.storage.files import forget_unknown_files
from jaxft.serving.storage.jobs import forget_unknown_jobs
from jaxft.serving.storage.keys import SCOPES, add_key, list_keys
from jaxft.serving.storage.models import forget_unknown_models
from jaxft.serving.storage.state import State, now, open_state
from jaxft.serving.storage.uploads import forget_unknown_uploads
from jaxft.serving.supervision.ending import fail_lost_jobs
from jaxft.serving.supervision.supervisor import Limits, Supervisor

WORKER = (sys.executable, "-m", "jaxft.serving.worker")
ANSWER_SECONDS = 30  # for open requests when the server stops; streams of changes end by themselves
BACKLOG = 128


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What may be replaced. worker, engine: the commands of their processes. limits: of the supervision. on_ready: is
    called with the port, once requests are answered, and with a function that ends the server.
    """

    worker: Sequence[str] = WORKER
    engine: Sequence[str] = COMMAND
    limits: Limits = field(default_factory=Limits)
    engine_limits: EngineLimits = field(default_factory=EngineLimits)
    on_ready: Callable[[int, Callable[[], None]], None] = lambda port, stop: None


def serve(settings: ServeSettings, say: Callable[[str], None], parts: Parts | None = None) -> None:
    """Serves until SIGTERM or SIGINT. say: is told the address, and the first key of a new state, once.

    Raises ConfigError for settings that cannot be used, FolderInUseError and StateError for a state that cannot be
    opened, and JaxftError for an address that is taken.
    """
    settings.check()
    parts = parts or Parts()
    with open_state(settings.state) as state:
        _mend(state)
        with contextlib.closing(_listen(settings)) as sock:
            port = sock.getsockname()[1]
            engines = Engines(state, settings, parts.engine, parts.engine_limits)
            supervisor = Supervisor(state, parts.worker, parts.limits, make_way=engines.make_way)
            service = Service(settings, state, supervisor, engines, started_at=now())
            _greet(settings, state, port, say)
            with _supervised(service):
                _run(service, make_app(service, port), sock, parts.on_ready)


def _mend(state: State) -> None:
    """Brings rows and files together after a crash."""
    forget_unknown_files(state)
    forget_unknown_uploads(state)
    forget_unknown_jobs(state)
    fail_lost_jobs(state)
    forget_unknown_models(state)


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        raise JaxftError(
            f"the address {settings.host}:{settings.port} cannot be used ({error.strerror}): end the program that has "
            "it, or give another --port"
        ) from error
    sock.listen(BACKLOG)
    return sock


def _greet(settings: ServeSettings, state: State, port: int, say: Callable[[str], None]) -> None:
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{scheme}://{host}:{port}"
    say(f"serving {', '.join(settings.models)} at {address}/v1, and the page at {address}/")
    if not list_keys(state.db):
        key = add_key(state.db, "first", SCOPES)
        say(f"the first key, which is shown this once: {key}")
        say(f"the page with this key: {address}/#key={key}")


@contextlib.contextmanager
def _supervised(service: Service) -> Iterator[None]:
    service.supervisor.start()
    try:
        yield
    finally:
        service.phase = "draining"
        service.supervisor.stop()


def _run(
    service: Service, app: Starlette, sock: socket.socket, on_ready: Callable[[int, Callable[[], None]], None]
) -> None:
    settings = service.settings

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.phase = "warm"
        on_ready(sock.getsockname()[1], server.end)
        supervising = asyncio.create_task(service.engines.supervise())
        try:
            yield
        finally:
            supervising.cancel()
            await service.engines.close()

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(
        RequestIds(app),  # outside of all, so that failures have an id too
        log_config=None,
        access_log=False,  # it would log whole addresses
        server_header=False,
        proxy_headers=settings.tls_proxy,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )
    server = _Server(config, service)
    asyncio.run(server.serve(sockets=[sock]))


class _Server(uvicorn.Server):
    """Ends its streams at the first signal, and the process without an error of its own."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT here; uvicorn would send them again when it has ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """Ends the server, once open requests are answered."""
        self._service.phase = "draining"
        self._service.engines.drain()
        self._service.supervisor.drain()  # workers save while open requests are answered
        self.should_exit = True

    def _stop(self, number: int, frame: object) -> None:
        self.end()


def log_to_stderr() -> None:
    """Shows the log of the server: requests without their content, and failures with their cause."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("jaxft.serving", "uvicorn.error"):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
