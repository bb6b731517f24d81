"""One engine as the server sees it: started when it is needed, and again, but not for ever, when it died."""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxft.serving.engines import process
from jaxft.serving.engines.answer import OpenAnswer
from jaxft.serving.engines.limits import Limits
from jaxft.serving.engines.spec import EngineSpec, as_line
from jaxft.serving.http.errors import ApiError
from jaxft.serving.storage.state import new_id

log = logging.getLogger(__name__)
MOST_DEATHS, WINDOW = 3, 600.0  # deaths within so many seconds, after which it is not started again
PAUSES = (0.0, 5.0, 20.0)  # seconds after the first death, the second, ...
SOON, LATER = {"retry-after": "1"}, {"retry-after": "30"}

Phase = Literal["stopped", "starting", "loading", "compiling", "warm", "ending"]


class Engine:
    """The engine of a base, or of one model that answers alone. command: starts its process. log: its printed lines.

    phase: of its process. used: when its last answer ended, in seconds of the monotonic clock.
    """

    def __init__(self, name: str, spec: EngineSpec, command: Sequence[str], log: Path, limits: Limits) -> None:
        self.name, self.spec, self.limits = name, spec, limits
        self.phase: Phase = "stopped"
        self.devices: Mapping[str, Any] | None = None
        self.used = time.monotonic()
        self._command, self._log = command, log
        self._answers: dict[str, OpenAnswer] = {}
        self._unsent: list[bytes] = []  # requests for a process that is being started
        self._process: process.EngineProcess | None = None
        self._life: asyncio.Task[None] | None = None
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._broken: str | None = None  # why the model cannot be loaded

    @property
    def is_alive(self) -> bool:
        """Whether it has a process, or is about to."""
        return self._life is not None

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for it."""
        return not self._answers

    def open(self, request: Mapping[str, Any], *, key: str, choices: int, size: int) -> OpenAnswer:
        """Hands a request over. choices, size: the answers that it asks for, and the bytes of its body.

        It waits while the engine starts. Raises ApiError: 429 if the queue is full, 503 while it may not be started
        since it died, 400 if it cannot be.
        """
        self._check_life()
        self.limits.enter(key, choices, size)
        answer = OpenAnswer(new_id("answer-"))
        answer.closing += [lambda: self.limits.leave(key, choices, size), lambda: self._close(answer)]
        self._answers[answer.id] = answer
        line = as_line({"kind": "answer", "id": answer.id, **request})
        if self._process is None or self.phase == "ending":
            self._unsent.append(line)
        else:
            self._process.writer.write(line)
        if self._life is None:
            self._start()
        return answer

    def _start(self) -> None:
        self.phase = "starting"
        self._life = asyncio.create_task(self._live())

    def _check_life(self) -> None:
        if self._broken is not None:
            raise ApiError(400, self._broken, code="model_not_loadable")
        now = time.monotonic()
        recent = [at for at in self._deaths if now - at < WINDOW]
        if self._life is not None or not recent:
            return
        if len(recent) >= MOST_DEATHS:
            raise ApiError(
                503,
                f"The engine of this model died {MOST_DEATHS} times within {WINDOW / 60:.0f} minutes, and is not "
                "started again for now. The log of the server says why.",
                code="engine_died",
                headers={"retry-after": str(int(WINDOW - (now - recent[0])) + 1), "x-should-retry": "false"},
            )
        wait = PAUSES[len(recent) - 1] - (now - recent[-1])
        if wait > 0:
            raise ApiError(
                503,
                "The engine died and is started anew.",
                code="engine_died",
                headers={"retry-after": str(int(wait) + 1)},
            )

    def _close(self, answer: OpenAnswer) -> None:
        self._answers.pop(answer.id, None)
        self.used = time.monotonic()
        if not answer.done:
            self._take_back(answer)
        elif answer.begun is not None:
            self.limits.ended(self.used - answer.begun)

    def _take_back(self, answer: OpenAnswer) -> None:
        if self._process is not None and not self._process.writer.is_closing():
            self._process.writer.write(as_line({"kind": "cancel", "id": answer.id}))
        else:
            start = json.dumps({"kind": "answer", "id": answer.id})[:-1].encode()
            self._unsent = [line for line in self._unsent if not line.startswith(start)]

    def expire(self, seconds: float) -> None:
        """Ends the answers that have waited for so long for an engine that still starts."""
        if self.phase == "warm":
            return
        for answer in list(self._answers.values()):
            if not answer.done and time.monotonic() - answer.opened > seconds:
                self._take_back(answer)
                answer.tell(
                    ApiError(
                        503,
                        f"The engine of this model is still being started ({self.phase}), after {seconds:.0f} s.",
                        code="engine_starting",
                        headers=LATER,
                    )
                )

    async def end(self) -> None:
        """Ends the process, if there is one. What is asked meanwhile starts another."""
        if self._life is not None:
            self.phase = "ending"
            if self._process is not None:
                self._process.writer.close()
            await asyncio.wait([self._life])

    def fail(self, error: ApiError) -> None:
        """Ends all open answers with an error."""
        self._unsent = []
        for answer in list(self._answers.values()):
            if not answer.done:
                answer.tell(error)

    def shown(self) -> dict[str, Any]:
        """What `/v1/jaxft/system` says of it."""
        open_ = self.limits.total
        return {
            "model": self.name,
            "phase": self.phase,
            "devices": self.devices,
            "slots": self.spec.slots,
            "open": open_,
            "waiting": max(0, open_ - self.spec.slots),
            "room": self.spec.slots + self.limits.queue - open_,
            "deaths": len(self._deaths),
        }

    async def _live(self) -> None:
        """The life of one process, which another follows if it was asked something while it ended."""
        try:
            await self._run()
        except OSError as error:
            log.error("the engine of %s cannot be started: %s", self.name, error)
            self._deaths.append(time.monotonic())
            self.fail(_died())
        finally:
            self._process, self._life, self.phase = None, None, "stopped"
            if self._unsent:
                self._start()

    async def _run(self) -> None:
        running = await process.start(self._command, self._log)
        if self.phase == "ending":
            await running.end()
            return
        log.info("the engine of %s has the process %d", self.name, running.process.pid)
        running.writer.write(self.spec.line())
        for line in self._unsent:
            running.writer.write(line)
        self._process, self._unsent = running, []
        try:
            await self._read(running)
        finally:
            self._process = None
            expected = self.phase == "ending"
            code = await running.end()
            if self._broken is not None:
                self.fail(ApiError(400, self._broken, code="model_not_loadable"))
            elif not expected:
                log.error("the engine of %s ended with %d; its lines are in %s", self.name, code, self._log)
                self._deaths.append(time.monotonic())
                self.fail(_died())

    async def _read(self, running: process.EngineProcess) -> None:
        """Takes what the process tells, until it ends."""
        while True:
            try:
                line = await running.reader.readline()
            except (ConnectionError, ValueError):  # a line beyond all bounds, or the end of a process that was killed
                return
            if not line.endswith(b"\n"):
                return
            message = json.loads(line)
            if (id := message.get("id")) is not None:
                if id in self._answers:
                    self._answers[id].tell(message)
            elif message["kind"] == "phase":
                self.phase = message["phase"] if self.phase != "ending" else self.phase
            elif message["kind"] == "ready":
                self.devices = message["devices"]
            elif message["kind"] == "failed":
                log.error("the model %s cannot be loaded: %s", self.name, message["message"])
                self._broken = f"The model {self.name!r} cannot be loaded. The log of the server says why."


def _died() -> ApiError:
    return ApiError(503, "The engine ended before this was answered. Try again.", code="engine_died", headers=SOON)
