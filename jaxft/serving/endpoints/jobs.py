"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

import asyncio
import hashlib
import re
import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http.bodies import query_choice, read_object, refuse_controls
from jaxft.serving.http.errors import bad_request, no_such
from jaxft.serving.http.pages import Listing, read_page
from jaxft.serving.jobs.folder import JobSpec
from jaxft.serving.jobs.objects import show_job
from jaxft.serving.jobs.request import METADATA, JobRequest, parse_job
from jaxft.serving.service import Service, service_of
from jaxft.serving.storage import jobs
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.events import show_event
from jaxft.serving.storage.models import show_checkpoint
from jaxft.serving.storage.state import State

METADATA_QUERY = re.compile(r"metadata\[(.*)\]", re.DOTALL)
IDEMPOTENCY_CHARACTERS = 255
PATH = "/fine_tuning/jobs"


async def create(request: Request) -> Response:
    """Creates a job and answers before its rows are read. A request that a client repeats creates no second job."""
    service = service_of(request)
    values, content = await read_object(request)
    wanted = parse_job(values)
    if wanted.model not in service.settings.models:
        raise no_such("model to fine-tune", wanted.model, "model_not_found", service.settings.models)
    idempotency = request.headers.get("idempotency-key")
    if idempotency is not None and len(refuse_controls(idempotency, "Idempotency-Key")) > IDEMPOTENCY_CHARACTERS:
        raise bad_request(f"An Idempotency-Key has at most {IDEMPOTENCY_CHARACTERS} characters.")
    retry = request.headers.get("x-stainless-retry-count", "0") != "0"
    key, hash = request.scope["key"].id, hashlib.sha256(content).hexdigest()
    add = partial(_create, service, wanted, key_id=key, hash=hash, idempotency=idempotency, retry=retry)
    shown = show_job(service.state, await asyncio.to_thread(add))
    service.supervisor.wake()
    return JSONResponse(shown)


def _create(
    service: Service, wanted: JobRequest, *, key_id: str, hash: str, idempotency: str | None, retry: bool
) -> Row:
    state, settings = service.state, service.settings
    spec = JobSpec(
        id=jobs.new_job_id(),
        name=wanted.model,
        base=settings.models[wanted.model],
        seed=wanted.seed,
        context=settings.context,
        hyperparameters=asdict(wanted.hyperparameters),
        config=dict(wanted.config),
        overrides=list(settings.overrides),
    )
    try:
        with state.db.write():  # the look and the entry are one: of two requests at once, one finds the other's job
            before = jobs.repeated(state, key_id, hash, idempotency, retry)
            if before is not None:
                return before
            jobs.check_files(state, wanted)
            return jobs.add_job(state, wanted, spec, key_id=key_id, hash=hash, idempotency=idempotency)
    except sqlite3.Error:
        jobs.drop_folder(state, spec.id)
        raise


async def list_all(request: Request) -> Response:
    """A page of jobs, newest first, with all pairs of metadata that the query names."""
    state = service_of(request).state
    where, values = "1", []
    pairs = [(METADATA_QUERY.fullmatch(name), value) for name, value in request.query_params.multi_items()]
    given = [(match[1], value) for match, value in pairs if match is not None]
    if len(given) > METADATA:
        raise bad_request(f"A query may name {METADATA} pairs of metadata.", "metadata")
    for name, value in given:
        where += " AND EXISTS (SELECT 1 FROM json_each(metadata) WHERE key = ? AND value = ?)"
        values += [name, value]
    listing = Listing("jobs", where, tuple(values))
    page = partial(read_page, state.db, request, listing, limit=20, most=100, show=partial(show_job, state))
    return JSONResponse(await asyncio.to_thread(page))


async def retrieve(request: Request) -> Response:
    """One job."""
    state = service_of(request).state
    return await _shown(state, jobs.job_of, request)


async def _shown(state: State, call: Callable[[State, str], Row], request: Request) -> Response:
    row = await asyncio.to_thread(call, state, request.path_params["job"])
    return JSONResponse(await asyncio.to_thread(show_job, state, row))


async def _changed(call: Callable[[State, str], Row], request: Request) -> Response:
    service = service_of(request)
    response = await _shown(service.state, call, request)
    service.supervisor.wake()
    return response


async def cancel(request: Request) -> Response:
    """Ends a job."""
    return await _changed(jobs.cancel_job, request)


async def pause(request: Request) -> Response:
    """Has a job save and stop."""
    return await _changed(jobs.pause_job, request)


async def resume(request: Request) -> Response:
    """Lets a paused job go on."""
    return await _changed(jobs.resume_job, request)


async def list_events(request: Request) -> Response:
    """A page of the events of a job, newest first; of one type if the query says."""
    state = service_of(request).state
    row = await asyncio.to_thread(jobs.job_of, state, request.path_params["job"])
    kind = query_choice(request, "type", ("message", "metrics", ""), "")
    listing = Listing("events", "job_id = ? AND ? IN ('', type)", (row["id"], kind))
    page = partial(read_page, state.db, request, listing, limit=20, most=1000, show=show_event)
    return JSONResponse(await asyncio.to_thread(page))


async def list_checkpoints(request: Request) -> Response:
    """A page of the checkpoints of a job that are models, newest first."""
    state = service_of(request).state
    row = await asyncio.to_thread(jobs.job_of, state, request.path_params["job"])
    listing = Listing("models", "job_id = ? AND deleted = 0", (row["id"],), id="checkpoint_id")
    page = partial(read_page, state.db, request, listing, limit=10, most=100, show=show_checkpoint)
    return JSONResponse(await asyncio.to_thread(page))


ENDPOINTS = (
    Endpoint("POST", PATH, create),
    Endpoint("GET", PATH, list_all),
    Endpoint("GET", f"{PATH}/{{job}}", retrieve),
    Endpoint("POST", f"{PATH}/{{job}}/cancel", cancel),
    Endpoint("POST", f"{PATH}/{{job}}/pause", pause),
    Endpoint("POST", f"{PATH}/{{job}}/resume", resume),
    Endpoint("GET", f"{PATH}/{{job}}/events", list_events),
    Endpoint("GET", f"{PATH}/{{job}}/checkpoints", list_checkpoints),
)
