"""All engines of a server: which there are, when they end, and when they give way to training."""

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxft.config.reading.overrides import parse_assignment
from jaxft.serving.answers.request import AnswerRequest
from jaxft.serving.engines.answer import OpenAnswer
from jaxft.serving.engines.engine import Engine
from jaxft.serving.engines.limits import Limits
from jaxft.serving.engines.spec import EngineSpec
from jaxft.serving.engines.target import Target
from jaxft.serving.http.errors import ApiError
from jaxft.serving.settings import ServeSettings
from jaxft.serving.storage.state import State

COMMAND = (sys.executable, "-m", "jaxft.serving.engine")
LOOK_SECONDS = 0.1
IDLE_SECONDS = 600.0  # after which an engine ends that one tuned model has for itself
START_SECONDS = 540.0  # that a request waits for an engine to start; the SDK itself waits for 600
DRAIN_SECONDS = 25.0  # in which open answers end when the server stops; then they are told so
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/kfd", "/dev/vfio/0")
LONG = {"retry-after": "120", "x-should-retry": "false"}  # longer than clients wait


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Seconds: see the constants of this module."""

    idle: float = IDLE_SECONDS
    drain: float = DRAIN_SECONDS
    start: float = START_SECONDS


class Engines:
    """The engines by name. Everything but `make_way` is called in the loop of the server.

    command: starts the process of one. alone: adapters that an engine would not take beside others.
    """

    def __init__(
        self,
        state: State,
        settings: ServeSettings,
        command: Sequence[str] = COMMAND,
        limits: EngineLimits | None = None,
    ) -> None:
        self._state, self._settings, self._command = state, settings, command
        self._limits = limits or EngineLimits()
        self.alone: set[str] = set()
        self._engines: dict[str, Engine] = {}
        self._gives_way = settings.while_training == "wait" or (settings.while_training == "auto" and has_accelerator())
        self._away = False
        self._draining_since: float | None = None

    def open(self, target: Target, request: AnswerRequest, *, key: str, size: int) -> OpenAnswer:
        """Hands a request to its engine. key: of the client. size: bytes of its body. Raises ApiError as it does.

        A tuned model's folder stays until the answer is closed.
        """
        if self._draining_since is not None:
            raise ApiError(503, "The server stops.", headers={"retry-after": "10"})
        if self._away:
            raise ApiError(503, "The devices of this server are training.", code="training", headers=LONG)
        engine = self._engines.get(target.engine) or self._add(target)
        uses = self._state.uses
        if target.folder is not None:
            uses.begin(target.folder)
        try:
            answer = engine.open(_message(target, request), key=key, choices=request.choices, size=size)
        except BaseException:
            if target.folder is not None:
                uses.end(target.folder)
            raise
        if target.folder is not None:
            answer.closing.append(lambda: uses.end(str(target.folder)))
        return answer

    def _add(self, target: Target) -> Engine:
        settings, folder = self._settings, self._state.engines
        given = dict(parse_assignment(one) for one in settings.overrides)
        spec = EngineSpec(
            model=target.path,
            base=target.base,
            slots=settings.slots,
            context=settings.context,
            adapters=0 if target.is_alone else settings.adapters,
            max_rank=settings.max_rank,
            dtype=str(given.get("model.dtype", "float32")),
            quantization=given.get("model.quantization"),
            cache=str(folder / "compiled"),
        )
        log = folder / f"{quote(target.engine, safe='')[:200]}.log"
        limits = Limits(slots=settings.slots, queue=settings.queue)
        self._engines[target.engine] = engine = Engine(target.engine, spec, self._command, log, limits)
        return engine

    def make_way(self, wanted: bool) -> bool:
        """Whether training may have the devices; called by the supervisor's thread. wanted: whether it wants them."""
        self._away = self._gives_way and wanted
        return not self._away or not any(engine.is_alive for engine in list(self._engines.values()))

    async def supervise(self) -> None:
        """Ends engines that are not wanted, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for name, engine in list(self._engines.items()):
                engine.expire(self._limits.start)
                lonely = name not in self._settings.models
                idle = engine.is_idle and time.monotonic() - engine.used > self._limits.idle
                if engine.is_idle and (self._away or (lonely and idle)):
                    await engine.end()
                if lonely and engine.is_idle and not engine.is_alive and idle:
                    del self._engines[name]
            if self._draining_since is not None and time.monotonic() - self._draining_since > self._limits.drain:
                self._fail()

    def drain(self) -> None:
        """Takes no new requests from now on."""
        if self._draining_since is None:
            self._draining_since = time.monotonic()

    async def close(self) -> None:
        """Ends all engines, and what they have not answered."""
        self.drain()
        self._fail()
        await asyncio.gather(*(engine.end() for engine in self._engines.values()))

    def _fail(self) -> None:
        for engine in self._engines.values():
            engine.fail(ApiError(503, "The server stopped before this was answered.", code="server_stopped"))

    def shown(self) -> list[dict[str, Any]]:
        """What `/v1/jaxft/system` says of them."""
        return [engine.shown() for engine in self._engines.values()]


def has_accelerator() -> bool:
    """Whether JAX would take another device than the processor, as far as can be seen without it."""
    named = os.environ.get("JAX_PLATFORMS", "")
    return not named.startswith("cpu") and any(Path(device).exists() for device in ACCELERATORS)


def _message(target: Target, request: AnswerRequest) -> Mapping[str, Any]:
    """A request as the engine is told it."""
    adapter = target.adapter
    told = asdict(request)
    for name in ("kind", "model", "stream", "include_usage"):
        del told[name]
    return told | {
        "kind_of": request.kind,
        "adapter": None if adapter is None else {"id": adapter.id, "folder": str(adapter.folder)},
    }
