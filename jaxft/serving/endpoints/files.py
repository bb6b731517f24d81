"""/v1/files: upload, list, retrieve, delete, content."""

import asyncio
from collections.abc import Mapping
from functools import partial

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http.bodies import SHOWN, refuse_controls, refuse_unknown
from jaxft.serving.http.errors import bad_request, no_such
from jaxft.serving.http.multipart import read_form
from jaxft.serving.http.pages import Listing, read_page
from jaxft.serving.service import service_of
from jaxft.serving.storage import files

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
LIFE = (3600, 30 * 24 * 3600)  # seconds that a file may ask to be kept
NAME_CHARACTERS = 1000


def check_purpose(purpose: str | None) -> str:
    """The purpose. Raises ApiError 400 for one that this server has no use for."""
    if purpose not in files.PURPOSES:
        given = "is missing" if purpose is None else f"is {purpose[:SHOWN]!r}"
        raise bad_request(f"purpose {given}: this server takes files for {', '.join(files.PURPOSES)}.", "purpose")
    return purpose


def check_filename(name: str) -> str:
    """The label of a file. Raises ApiError 400 for one that is too long, has control characters, or is packed."""
    refuse_controls(name, "filename")
    if not name or len(name) > NAME_CHARACTERS:
        raise bad_request(f"The name of the file must have 1 to {NAME_CHARACTERS} characters.", "filename")
    if name.lower().endswith((".gz", ".zst", ".bz2", ".xz", ".zip")):
        raise bad_request(
            "Packed files are not taken, since their size is not known before they are unpacked: send the rows as they "
            "are.",
            "file",
        )
    return name


def check_life(anchor: str | None, seconds: object) -> int | None:
    """Seconds that a file is kept; None: until it is deleted. Raises ApiError 400."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad_request("expires_after.anchor must be created_at.", "expires_after")
    text = str(seconds)
    if not text.isascii() or not text.isdigit() or not LIFE[0] <= int(text[:12]) <= LIFE[1]:
        raise bad_request(f"expires_after.seconds must be from {LIFE[0]:,} to {LIFE[1]:,}.", "expires_after")
    return int(text)


async def create(request: Request) -> Response:
    """Takes a form with `file` and `purpose`."""
    service = service_of(request)
    state, id = service.state, files.new_file_id()
    target, free = state.files / id, await asyncio.to_thread(state.free_bytes)
    async with read_form(request, target, file_field="file", most=service.settings.max_upload, free=free) as form:
        refuse_unknown(form.fields, FIELDS)
        fields: Mapping[str, str] = form.fields
        seconds = check_life(fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"))
        file = files.NewFile(
            id=id,
            filename=check_filename(form.filename or ""),
            bytes=form.bytes,
            purpose=check_purpose(fields.get("purpose")),
            sha256=form.sha256,
            seconds=seconds,
        )
        await asyncio.to_thread(form.keep, target)
        try:
            row = await asyncio.to_thread(files.add_file, state, file)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return JSONResponse(files.show_file(row))


async def list_all(request: Request) -> Response:
    """A page of files, of one purpose if the query says."""
    state, purpose = service_of(request).state, request.query_params.get("purpose")
    listing = Listing("files", files.alive())
    if purpose is not None:
        listing = Listing("files", f"{files.alive()} AND purpose = ?", (purpose,))
    page = partial(read_page, state.db, request, listing, limit=10_000, most=10_000, show=files.show_file)
    return JSONResponse(await asyncio.to_thread(page))


async def retrieve(request: Request) -> Response:
    """One file."""
    row = await asyncio.to_thread(files.file_of, service_of(request).state, request.path_params["file"])
    return JSONResponse(files.show_file(row))


async def delete(request: Request) -> Response:
    """Deletes one file."""
    id = request.path_params["file"]
    await asyncio.to_thread(files.delete_file, service_of(request).state, id)
    return JSONResponse({"id": id, "object": "file", "deleted": True})


async def content(request: Request) -> Response:
    """The bytes of a file, to be saved and never shown by a browser."""
    state = service_of(request).state
    row = await asyncio.to_thread(files.file_of, state, request.path_params["file"])
    path = files.path_of(state, row)
    if not path.is_file():
        raise no_such("file", row["id"], "file_not_found")
    headers = {"content-disposition": "attachment"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


ENDPOINTS = (
    Endpoint("POST", "/files", create),
    Endpoint("GET", "/files", list_all),
    Endpoint("GET", "/files/{file}", retrieve),
    Endpoint("DELETE", "/files/{file}", delete),
    Endpoint("GET", "/files/{file}/content", content),
)
