"""Forms with a file, parsed as they come: the file's bytes are written to where they stay, once."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from jaxft.files.atomic import flush
from jaxft.serving.http.errors import ApiError, bad_request, disk_error, disk_full
from jaxft.serving.storage.state import PARTIAL

FIELD_BYTES, MOST_FIELDS = 64 * 1024, 16
FORM_BYTES = 2**20  # that fields and headers may add to the file
IDLE_SECONDS = 60.0  # without a byte of the body


@dataclass
class Form:
    """A form that was read. fields: its texts. filename, bytes, sha256, md5: of its file, which is at `path`."""

    path: Path
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    bytes: int = 0
    sha256: str = ""
    md5: str = ""

    def keep(self, target: Path) -> None:
        """Gives the file its name; it is on the disk then. Raises ApiError 400 if the disk is full."""
        try:
            os.replace(self.path, target)
            flush(target.parent)
        except OSError as error:
            raise disk_error(error, "The file was not kept") from error


@contextlib.asynccontextmanager
async def read_form(request: Request, target: Path, *, file_field: str, most: int, free: int) -> AsyncIterator[Form]:
    """Reads a form whose file is in `file_field`, and writes it beside `target`; `Form.keep` names it so.

    What was not kept is removed at the end. most: bytes of a file. free: bytes that the disk has for it. Raises
    ApiError 400 for a form that is damaged or cut off, without the file, or that comes too slowly; 413 for a file that
    is too long, before it is read where the length is announced.
    """
    path = target.with_name(target.name + PARTIAL)
    try:
        with open(path, "wb") as file:
            reader = _FormReader(Form(path), file, file_field, (most, free))
            try:
                await reader.read(request)
            except ClientDisconnect as error:
                raise bad_request("The request ended before its body was whole.") from error
            await asyncio.to_thread(reader.finish)
        yield reader.form
    except OSError as error:
        raise disk_error(error, "The file was not stored") from error
    finally:
        path.unlink(missing_ok=True)


class _FormReader:
    """Takes the pieces of a body. limits: bytes that a file may have, and that the disk has for it."""

    def __init__(self, form: Form, file: BinaryIO, file_field: str, limits: tuple[int, int]) -> None:
        self.form, self._file, self._file_field, self._limits = form, file, file_field, limits
        self._sha256, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._header = self._value = b""
        self._headers: dict[str, bytes] = {}
        self._name: str | None = None
        self._in_file = self._ended = False
        self._text = b""
        self._pieces: list[bytes] = []

    async def read(self, request: Request) -> None:
        """Reads the whole body."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(415, "The body must be multipart/form-data.", code="unsupported_media_type")
        announced = request.headers.get("content-length")
        if announced is not None and announced.isascii() and announced.isdigit():
            self._check_size(int(announced[:20]) - FORM_BYTES)
        try:
            parser = MultipartParser(options[b"boundary"], self._callbacks())  # type: ignore[arg-type]
            stream = aiter(request.stream())
            while (piece := await asyncio.wait_for(anext(stream, None), IDLE_SECONDS)) is not None:
                if piece:
                    parser.write(piece)
                    await self._write()
            parser.finalize()
        except FormParserError as error:
            raise bad_request(f"The form is damaged: {error}") from error
        except TimeoutError as error:
            raise bad_request(f"Nothing came for {IDLE_SECONDS:.0f} s, so the request was given up.") from error
        if not self._ended or self.form.filename is None:
            raise bad_request(f"The form has no file in the field {self._file_field!r}, or is cut off.")

    def finish(self) -> None:
        """Brings the file to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.form.sha256, self.form.md5 = self._sha256.hexdigest(), self._md5.hexdigest()

    async def _write(self) -> None:
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return
        self.form.bytes += sum(map(len, pieces))
        self._check_size(self.form.bytes)

        def add() -> None:
            for piece in pieces:
                self._file.write(piece)
                self._sha256.update(piece)
                self._md5.update(piece)

        await asyncio.to_thread(add)

    def _check_size(self, size: int) -> None:
        most, free = self._limits
        if size > most:
            raise ApiError(413, f"The file is longer than {most:,} bytes.", code="too_large")
        if size > free:
            raise disk_full("The file was not stored")

    def _callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._add_header(data[start:end], b""),
            "on_header_value": lambda data, start, end: self._add_header(b"", data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._headers, self._text, self._name, self._in_file = {}, b"", None, False

    def _add_header(self, name: bytes, value: bytes) -> None:
        self._header, self._value = self._header + name, self._value + value

    def _end_header(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b"").decode("utf-8", "replace"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options or self._name == self._file_field:
            if self._name != self._file_field or self.form.filename is not None:
                raise bad_request(f"The form must have one file, in the field {self._file_field!r}.")
            self._in_file = True
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif len(self.form.fields) >= MOST_FIELDS or self._name in self.form.fields:
            raise bad_request(f"The form has more than {MOST_FIELDS} fields, or one of them twice.")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._pieces.append(bytes(data[start:end]))
            return
        self._text += data[start:end]
        if len(self._text) > FIELD_BYTES:
            raise bad_request(f"A field of the form is longer than {FIELD_BYTES:,} bytes.")

    def _end_part(self) -> None:
        if not self._in_file and self._name is not None:
            self.form.fields[self._name] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True
