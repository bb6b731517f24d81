"""Files that clients uploaded, and results of jobs."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.serving.http.errors import no_such
from jaxft.serving.storage.database import Row
from jaxft.serving.storage.state import State, new_id, now

PURPOSES = ("fine-tune",)  # that clients may upload for
RESULTS = "fine-tune-results"
ALIVE = "deleted = 0 AND (expires_at IS NULL OR expires_at > {now})"


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file that is on the disk under its id. seconds: how long it is kept; None: until it is deleted."""

    id: str
    filename: str
    bytes: int
    purpose: str
    sha256: str
    seconds: int | None = None


def alive() -> str:
    """The condition of files that are there."""
    return ALIVE.format(now=now())


def add_file(state: State, file: NewFile) -> Row:
    """Enters a file, whose bytes are on the disk already, and returns its row."""
    created = now()
    expires = None if file.seconds is None else created + file.seconds
    row = (file.id, created, file.filename, file.bytes, file.purpose, file.sha256, expires)
    columns = "id, created_at, filename, bytes, purpose, sha256, expires_at"
    with state.db.write() as connection:
        connection.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    return file_of(state, file.id)


def file_of(state: State, id: str) -> Row:
    """The row of a file. Raises ApiError 404."""
    row = state.db.one(f"SELECT * FROM files WHERE id = ? AND {alive()}", (id,))
    if row is None:
        raise no_such("file", id, "file_not_found")
    return row


def path_of(state: State, row: Row) -> Path:
    """Where the bytes of a file are."""
    return state.files / str(row["id"])


def delete_file(state: State, id: str) -> None:
    """Deletes a file. Jobs that use it have a link of their own. Raises ApiError 404."""
    row = file_of(state, id)
    with state.db.write() as connection:
        connection.execute("UPDATE files SET deleted = 1 WHERE id = ?", (id,))
    path_of(state, row).unlink(missing_ok=True)


def link_file(state: State, id: str, target: Path) -> None:
    """Makes another name for the bytes of a file."""
    os.link(path_of(state, file_of(state, id)), target)


def show_file(row: Row) -> dict[str, Any]:
    """The file as the protocol has it."""
    shown = {name: row[name] for name in ("id", "bytes", "created_at", "filename", "purpose", "expires_at")}
    return {"object": "file", **shown, "status": "processed", "status_details": None}


def new_file_id() -> str:
    """An id for a file that is about to be written."""
    return new_id("file-")


def clean_files(state: State) -> None:
    """Deletes files that have expired. At the start of a server, call `forget_unknown_files` too."""
    ended = state.db.all("SELECT id FROM files WHERE deleted = 0 AND expires_at <= ?", (now(),))
    for row in ended:
        with state.db.write() as connection:
            connection.execute("UPDATE files SET deleted = 1 WHERE id = ?", (row["id"],))
        path_of(state, row).unlink(missing_ok=True)


def forget_unknown_files(state: State) -> None:
    """After a crash: deletes bytes without a row, and rows without their bytes. No request may be under way."""
    known = {row["id"] for row in state.db.all(f"SELECT id FROM files WHERE {alive()}")}
    there = {path.name for path in state.files.iterdir()}
    for name in there - known:
        with contextlib.suppress(OSError):
            (state.files / name).unlink()
    with state.db.write() as connection:
        for id in known - there:
            connection.execute("UPDATE files SET deleted = 1 WHERE id = ?", (id,))
