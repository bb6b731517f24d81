"""/v1/uploads: a file in parts."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.serving.endpoints.files import check_filename, check_life, check_purpose
from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.http.bodies import object_field, read_object, refuse_unknown, text_field, whole_field
from jaxft.serving.http.errors import bad_request, disk_full
from jaxft.serving.http.multipart import read_form
from jaxft.serving.service import service_of
from jaxft.serving.storage import uploads
from jaxft.serving.storage.state import new_id

MOST_PARTS = 1024


async def create(request: Request) -> Response:
    """Begins an upload."""
    service = service_of(request)
    values, _ = await read_object(request)
    refuse_unknown(values, ("bytes", "filename", "purpose", "mime_type", "expires_after"))
    most = min(uploads.UPLOAD_BYTES, service.settings.max_upload)
    size = whole_field(values, "bytes", 0, most)
    if size is None:
        raise bad_request("The field bytes is missing.", "bytes")
    if size > await asyncio.to_thread(service.state.free_bytes):
        raise disk_full("The upload was not begun")
    life = object_field(values, "expires_after")
    row = await asyncio.to_thread(
        lambda: uploads.add_upload(
            service.state,
            bytes=size,
            filename=check_filename(text_field(values, "filename", required=True, most=1000) or ""),
            purpose=check_purpose(text_field(values, "purpose")),
            mime_type=text_field(values, "mime_type", required=True) or "",
            file_seconds=check_life(text_field(life, "anchor"), life.get("seconds")),
        )
    )
    return JSONResponse(uploads.show_upload(service.state, row))


async def add_part(request: Request) -> Response:
    """Takes one part, a form with `data`."""
    state, upload = service_of(request).state, request.path_params["upload"]
    row = await asyncio.to_thread(uploads.pending_upload, state, upload)
    part = new_id("part_")
    target, free = uploads.part_path(state, row["id"], part), await asyncio.to_thread(state.free_bytes)
    async with read_form(request, target, file_field="data", most=uploads.PART_BYTES, free=free) as form:
        refuse_unknown(form.fields, ())
        await asyncio.to_thread(form.keep, target)
        try:
            shown = await asyncio.to_thread(uploads.add_part, state, row["id"], part, form.bytes, form.md5)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return JSONResponse(shown)


async def complete(request: Request) -> Response:
    """Joins the parts. A repeated request for an upload that is completed is answered as the first one."""
    state, upload = service_of(request).state, request.path_params["upload"]
    values, _ = await read_object(request)
    refuse_unknown(values, ("part_ids", "md5"))
    parts, md5 = values.get("part_ids"), text_field(values, "md5", most=64)
    if not isinstance(parts, list) or len(parts) > MOST_PARTS or not all(isinstance(part, str) for part in parts):
        raise bad_request(f"part_ids must be a list of at most {MOST_PARTS:,} ids.", "part_ids")
    row = await asyncio.to_thread(uploads.upload_of, state, upload)
    if row["status"] != "completed" or request.headers.get("x-stainless-retry-count", "0") == "0":
        row = await asyncio.to_thread(uploads.complete_upload, state, upload, parts, md5)
    return JSONResponse(await asyncio.to_thread(uploads.show_upload, state, row))


async def cancel(request: Request) -> Response:
    """Ends an upload."""
    state = service_of(request).state
    row = await asyncio.to_thread(uploads.cancel_upload, state, request.path_params["upload"])
    return JSONResponse(uploads.show_upload(state, row))


ENDPOINTS = (
    Endpoint("POST", "/uploads", create),
    Endpoint("POST", "/uploads/{upload}/parts", add_part),
    Endpoint("POST", "/uploads/{upload}/complete", complete),
    Endpoint("POST", "/uploads/{upload}/cancel", cancel),
)
