"""Uploads in parts: each part is a file until the upload is completed, cancelled, or its hour is over."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.files.atomic import flush
from jaxft.serving.http.errors import bad_request, disk_error, no_such
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.files import NewFile, add_file, new_file_id, show_file
from jaxft.serving.storage.state import PARTIAL, State, new_id, now

LIFE_SECONDS = 3600
PART_BYTES = 64 * 2**20
UPLOAD_BYTES = 8 * 2**30
PIECE = 2**20


def add_upload(
    state: State, *, bytes: int, filename: str, purpose: str, mime_type: str, file_seconds: int | None
) -> Row:
    """Begins an upload of so many bytes."""
    id, created = new_id("upload_"), now()
    row = (id, created, bytes, filename, purpose, mime_type, "pending", created + LIFE_SECONDS, file_seconds)
    columns = "id, created_at, bytes, filename, purpose, mime_type, status, expires_at, file_seconds"
    (state.uploads / id).mkdir()
    flush(state.uploads)
    with state.db.write() as connection:
        connection.execute(f"INSERT INTO uploads ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return upload_of(state, id)


def upload_of(state: State, id: str) -> Row:
    """The row of an upload; one whose hour is over is `expired`. Raises ApiError 404."""
    clean_uploads(state)
    row = state.db.one("SELECT * FROM uploads WHERE id = ?", (id,))
    if row is None:
        raise no_such("upload", id, "upload_not_found")
    return row


def pending_upload(state: State, id: str) -> Row:
    """The row of an upload that takes parts. Raises ApiError 400 for another state, and 404."""
    row = upload_of(state, id)
    if row["status"] != "pending":
        raise bad_request(f"The upload is {row['status']}, so it takes nothing more.", code="invalid_upload_state")
    return row


def bytes_so_far(state: State, id: str) -> int:
    """The sum of the parts of an upload."""
    row = state.db.one("SELECT coalesce(sum(bytes), 0) AS total FROM parts WHERE upload_id = ?", (id,))
    return 0 if row is None else int(row["total"])


def add_part(state: State, upload: str, part: str, size: int, md5: str) -> dict[str, Any]:
    """Enters a part whose file is there, and returns it as the protocol has it. Raises as `pending_upload` does, and
    ApiError 400 if the parts are longer than the upload.
    """
    created = now()
    with state.db.write() as connection:
        row = pending_upload(state, upload)
        if bytes_so_far(state, upload) + size > row["bytes"]:
            raise bad_request(f"The parts are longer than the {row['bytes']:,} bytes of the upload.", "data")
        values = (part, upload, created, size, md5)
        connection.execute("INSERT INTO parts (id, upload_id, created_at, bytes, md5) VALUES (?, ?, ?, ?, ?)", values)
    return {"id": part, "created_at": created, "object": "upload.part", "upload_id": upload}


def part_path(state: State, upload: str, part: str) -> Path:
    """Where the bytes of a part are."""
    return state.uploads / upload / part


def complete_upload(state: State, id: str, part_ids: Sequence[str], md5: str | None) -> Row:
    """Joins the parts, in this order, into a file, and returns the row of the upload.

    Raises ApiError 400 for a part that is there twice or not of this upload, for a wrong sum of bytes or md5, and for
    an upload that is not pending.
    """
    row = pending_upload(state, id)
    known = {part["id"]: part["bytes"] for part in state.db.all("SELECT * FROM parts WHERE upload_id = ?", (id,))}
    for part in part_ids:
        if part not in known:
            raise bad_request(f"The upload has no part {part[:80]!r}.", "part_ids")
    if len(set(part_ids)) < len(part_ids):
        raise bad_request("A part is there twice.", "part_ids")
    if (total := sum(known[part] for part in part_ids)) != row["bytes"]:
        raise bad_request(f"The parts have {total:,} bytes, and the upload has {row['bytes']:,}.", "part_ids")
    file_id = new_file_id()
    target = state.files / file_id
    partial = target.with_name(target.name + PARTIAL)
    try:
        sha256 = _join([part_path(state, id, part) for part in part_ids], partial, md5)
        os.replace(partial, target)
        flush(state.files)
    except OSError as error:
        raise disk_error(error, "The upload was not completed") from error
    finally:
        partial.unlink(missing_ok=True)
    file = NewFile(
        id=file_id, filename=row["filename"], bytes=total, purpose=row["purpose"], sha256=sha256,
        seconds=row["file_seconds"],
    )  # fmt: skip
    with state.db.write() as connection:
        if not _end(state, id, "completed"):
            target.unlink(missing_ok=True)
            raise bad_request("The upload was completed or cancelled meanwhile.", code="invalid_upload_state")
        add_file(state, file)
        connection.execute("UPDATE uploads SET file_id = ? WHERE id = ?", (file_id, id))
    shutil.rmtree(state.uploads / id, ignore_errors=True)
    return upload_of(state, id)


def _join(parts: Sequence[Path], target: Path, md5: str | None) -> str:
    """Writes the parts one after another, and returns the SHA-256. Raises ApiError 400 for another md5."""
    sha256, sum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(target, "wb") as out:
        for path in parts:
            with open(path, "rb") as file:
                while piece := file.read(PIECE):
                    out.write(piece)
                    sha256.update(piece)
                    sum.update(piece)
        out.flush()
        os.fsync(out.fileno())
    if md5 is not None and sum.hexdigest() != md5.lower():
        raise bad_request(f"The bytes have the md5 {sum.hexdigest()}, not the one that was given.", "md5")
    return sha256.hexdigest()


def cancel_upload(state: State, id: str) -> Row:
    """Ends an upload and deletes its parts. Raises as `pending_upload` does."""
    pending_upload(state, id)
    _end(state, id, "cancelled")
    shutil.rmtree(state.uploads / id, ignore_errors=True)
    return upload_of(state, id)


def _end(state: State, id: str, status: str) -> bool:
    """Whether a pending upload has this status now; False if it was not pending."""
    with state.db.write() as connection:
        sql = "UPDATE uploads SET status = ? WHERE id = ? AND status = 'pending'"
        return connection.execute(sql, (status, id)).rowcount == 1


def show_upload(state: State, row: Row) -> dict[str, Any]:
    """The upload as the protocol has it, with its file once there is one."""
    names = ("id", "bytes", "created_at", "expires_at", "filename", "purpose", "status")
    file = state.db.one("SELECT * FROM files WHERE id = ?", (row["file_id"],))  # also of one that is deleted since
    shown = None if file is None else show_file(file)
    return {"object": "upload", **{name: row[name] for name in names}, "file": shown}


def clean_uploads(state: State) -> None:
    """Ends uploads whose hour is over, and deletes their parts."""
    ended = state.db.all("SELECT id FROM uploads WHERE status = 'pending' AND expires_at <= ?", (now(),))
    for row in ended:
        _end(state, row["id"], "expired")
        shutil.rmtree(state.uploads / row["id"], ignore_errors=True)


def forget_unknown_uploads(state: State) -> None:
    """After a crash: deletes parts that no pending upload has. No request may be under way."""
    pending = {row["id"] for row in state.db.all("SELECT id FROM uploads WHERE status = 'pending'")}
    parts = {row["id"] for row in state.db.all("SELECT id FROM parts")}
    for folder in state.uploads.iterdir():
        if folder.name not in pending:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        for path in folder.iterdir():
            if path.name not in parts:
                path.unlink(missing_ok=True)
