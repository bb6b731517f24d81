"""GET /v1/jaxft/stream: changes of jobs as they happen, as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http.errors import ApiError, bad_request
from jaxft.serving.jobs.objects import show_job
from jaxft.serving.service import Service, service_of
from jaxft.serving.storage.events import show_event
from jaxft.serving.storage.state import State

BEAT_SECONDS = 10.0  # in which a proxy would end a silent stream
LOOK_SECONDS = 0.2
MOST_STREAMS = 64
REPLAYED = 1000  # events that were missed, at most, at a time
FIRST_JOBS = 50  # that a new stream begins with


async def stream(request: Request) -> Response:
    """Events `job`, the object of a job that changed, and `job.event`, an event of a job.

    A `job.event` has an id, which a client gives as Last-Event-ID to have what it missed.
    """
    service, last = service_of(request), request.headers.get("last-event-id")
    if last is not None and (not last.isascii() or not last.isdigit() or len(last) > 18):
        raise bad_request("Last-Event-ID must be the id of an event of this stream.")
    if service.streams >= MOST_STREAMS:
        raise ApiError(429, f"{MOST_STREAMS} streams are open, the most there may be.", headers={"retry-after": "10"})
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    pieces = _pieces(service, None if last is None else int(last))
    return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)


async def _pieces(service: Service, last: int | None) -> AsyncIterator[str]:
    state, seen, beat = service.state, -1, time.monotonic()
    shown: dict[str, str] = {}
    service.streams += 1
    try:
        sent = await asyncio.to_thread(_newest, state) if last is None else last
        # A client that is cut off before the first event gives this id then.
        yield ": begun\n\n" if last is not None else f"id: {sent}\n\n"
        while service.phase != "draining":
            if seen != state.db.changes:
                seen = state.db.changes
                pieces, sent = await asyncio.to_thread(_changes, service, sent, shown)
                for piece in pieces:
                    yield piece
                beat = time.monotonic() if pieces else beat
            if time.monotonic() - beat > BEAT_SECONDS:
                beat = time.monotonic()
                yield ": beat\n\n"
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        service.streams -= 1


def _newest(state: State) -> int:
    row = state.db.one("SELECT coalesce(max(n), 0) AS n FROM events")
    return 0 if row is None else int(row["n"])


def _changes(service: Service, last: int, shown: dict[str, str]) -> tuple[list[str], int]:
    """(what to send, the newest event in it). shown: the jobs as they were sent last, which are brought up to date."""
    state = service.state
    rows = state.db.all("SELECT * FROM events WHERE n > ? ORDER BY n LIMIT ?", (last, REPLAYED))
    out = []
    for row in rows:
        data = {**show_event(row), "job_id": row["job_id"]}
        out.append(_piece("job.event", json.dumps(data), row["n"]))
        last = row["n"]
    for job, text in _newest_jobs(service).items():
        if shown.get(job) != text:
            shown[job] = text
            out.append(_piece("job", text))
    return out, last


def _newest_jobs(service: Service) -> dict[str, str]:
    """The objects of the newest jobs, as JSON by id, made once for all streams."""
    state = service.state
    changes = state.db.changes
    if service.newest_jobs[0] != changes:
        rows = state.db.all("SELECT * FROM jobs ORDER BY n DESC LIMIT ?", (FIRST_JOBS,))
        service.newest_jobs = (changes, {row["id"]: json.dumps(show_job(state, row)) for row in rows})
    return service.newest_jobs[1]


def _piece(kind: str, text: str, id: int | None = None) -> str:
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {kind}\ndata: {text}\n\n"


ENDPOINTS = (Endpoint("GET", "/jaxft/stream", stream),)
