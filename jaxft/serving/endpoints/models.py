"""/v1/models: the bases that the operator named and the tuned models; and what a job leaves behind."""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http.archive import tar_pieces
from jaxft.serving.http.bodies import SHOWN, query_number
from jaxft.serving.http.errors import ApiError, bad_request, no_such
from jaxft.serving.http.pages import as_list
from jaxft.serving.jobs.metrics import read_rows
from jaxft.serving.service import service_of
from jaxft.serving.storage import models
from jaxft.serving.storage.jobs import job_folder, job_of
from jaxft.serving.storage.state import State

READERS = ("answer", "train")
ARTIFACT = re.compile(r"step-(\d{1,12})\.tar")
LOG, LOG_BYTES = "worker.log", 2**20
MOST_ROWS = 100_000


async def list_all(request: Request) -> Response:
    """All models: the bases, then the tuned ones, newest first."""
    service = service_of(request)
    bases = [models.show_base(name, service.started_at) for name in service.settings.models]
    rows = await asyncio.to_thread(models.tuned_models, service.state)
    return JSONResponse(as_list([*bases, *map(models.show_model, rows)]))


async def retrieve(request: Request) -> Response:
    """One model."""
    service, id = service_of(request), request.path_params["model"]
    if id in service.settings.models:
        return JSONResponse(models.show_base(id, service.started_at))
    try:
        row = await asyncio.to_thread(models.model_of, service.state, id)
    except ApiError as error:
        known = [*service.settings.models, *(one["id"] for one in models.tuned_models(service.state))]
        raise no_such("model", id, "model_not_found", known) from error
    return JSONResponse(models.show_model(row))


async def delete(request: Request) -> Response:
    """Deletes a tuned model."""
    service, id = service_of(request), request.path_params["model"]
    models.refuse_base(id, service.settings.models)
    await asyncio.to_thread(models.delete_model, service.state, id)
    return JSONResponse({"id": id, "object": "model", "deleted": True})


async def job_metrics(request: Request) -> Response:
    """The logged rows of a job's run, whole, from the step after the `after` of the query on."""
    state, job = service_of(request).state, request.path_params["job"]
    after = query_number(request, "after", -1, 10**9, low=0)
    row = await asyncio.to_thread(job_of, state, job)
    rows = await asyncio.to_thread(read_rows, job_folder(state, row["id"]).metrics)
    kept = [one for one in rows if one["step"] > after]
    return JSONResponse({"object": "list", "data": kept[:MOST_ROWS], "has_more": len(kept) > MOST_ROWS})


async def artifact(request: Request) -> Response:
    """A model of a job as a tar, or the log of its worker."""
    state, name = service_of(request).state, request.path_params["name"]
    row = await asyncio.to_thread(job_of, state, request.path_params["job"])
    headers = {"content-disposition": "attachment"}
    if name == LOG:
        content = await asyncio.to_thread(_log, state, row["id"], service_of(request).settings.models)
        return Response(content, media_type="application/octet-stream", headers=headers)
    folder = await asyncio.to_thread(_model_folder, state, row["id"], name)
    return StreamingResponse(tar_pieces(folder), media_type="application/octet-stream", headers=headers)


def _log(state: State, job: str, bases: Mapping[str, str]) -> bytes:
    """The end of the log of a job's worker, without the folders of the server."""
    folder = job_folder(state, job)
    if not folder.log.is_file():
        raise no_such("artifact", LOG, "artifact_not_found")
    with open(folder.log, "rb") as file:
        file.seek(max(0, folder.log.stat().st_size - LOG_BYTES))
        content = file.read()
    for path, name in {str(folder.path): "JOB", str(state.folder): "STATE", **{b: a for a, b in bases.items()}}.items():
        content = content.replace(path.encode(), name.encode())
    return content


def _model_folder(state: State, job: str, name: str) -> Path:
    match = ARTIFACT.fullmatch(name)
    if match is None:
        raise bad_request(f"{name[:SHOWN]!r} is no artifact: step-N.tar and {LOG} are.", "name")
    rows = [row for row in models.tuned_models(state, job) if row["step"] == int(match[1])]
    if not rows:
        raise no_such("artifact", name, "artifact_not_found")
    return models.folder_of(state, rows[0])


ENDPOINTS = (
    Endpoint("GET", "/models", list_all, READERS),
    Endpoint("GET", "/models/{model:path}", retrieve, READERS),
    Endpoint("DELETE", "/models/{model:path}", delete),
    Endpoint("GET", "/jaxft/jobs/{job}/metrics", job_metrics),
    Endpoint("GET", "/jaxft/jobs/{job}/artifacts/{name}", artifact),
)
