"""The bytes of text files: local, remote and compressed ones alike, at known positions."""

import bz2
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import pyarrow

from jaxft.data.sources.file_kinds import HEAD, compression_of
from jaxft.errors import CheckpointError, DataError
from jaxft.files.deadlines import TimedFile, repeated
from jaxft.files.paths import is_remote, url_parts

BLOCK = 2**23  # bytes of a block that is searched for the ends of lines
AHEAD = 2**18  # bytes read at once if pieces are read in order
GAP = 2**12  # bytes that may lie between two pieces in order
# Text is compressed 3 to 30 times; what grows more than this is made to fill a disk.
EXPANDED, MOST_EXPANSION = 2**28, 200
Result = TypeVar("Result")
NEWLINE, RETURN = b"\n", b"\r"
BLANK = np.isin(np.arange(256), list(b" \t\r\n\v\f"))


class Text(Protocol):
    """Bytes that are read at any position."""

    size: int

    def read(self, start: int, length: int) -> bytes:
        """Bytes from position `start`. Raises DataError if the file has changed."""


class LocalText:
    """The bytes of an uncompressed file of this machine, which is opened for each read and so limits no other files."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._version = self._status()
        self.size = self._version[0]
        self._block = (0, b"")  # position and bytes of what was read last

    def read(self, start: int, length: int) -> bytes:
        first, block = self._block
        if not first <= start <= start + length <= first + len(block):
            # More is read only shortly behind what was read last, so that rows in random order cost no more than
            # themselves. Between the bytes of two rows are the end of a line and blank lines.
            in_order = first <= start <= first + len(block) + GAP
            first, block = start, self._pread(start, max(length, AHEAD) if in_order else length)
            self._block = (first, block)
        return block[start - first : start - first + length]

    def __reduce__(self) -> tuple[type["LocalText"], tuple[str]]:
        return LocalText, (self.path,)

    def _status(self) -> tuple[int, int]:
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def _pread(self, start: int, length: int) -> bytes:
        try:
            changed = self._status() != self._version
            with open(self.path, "rb", buffering=0) as file:
                raw = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if changed:
            raise DataError(f"{self.path!r} changed while it was read; start again once it is written")
        return raw


class Spool:
    """Bytes in a temporary file, until nothing refers to them: what compressed and remote files hold.

    Another process to which it is sent reads the same file, as long as this one keeps it.
    """

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="jaxft-rows-")
        self.size = 0

    def __reduce__(self) -> tuple[type[LocalText], tuple[str]]:
        self._file.flush()
        return LocalText, (self._file.name,)

    def append(self, raw: bytes) -> tuple[int, int]:
        """Adds bytes at the end. Returns where they begin and end. Raises DataError if the disk is full."""
        try:
            self._file.write(raw)
        except OSError as error:
            raise DataError(f"cannot keep rows in {tempfile.gettempdir()}: {error.strerror}. Set TMPDIR.") from error
        self.size += len(raw)
        return self.size - len(raw), self.size

    def read(self, start: int, length: int) -> bytes:
        self._file.flush()
        return os.pread(self._file.fileno(), length, start)


def open_raw(path: str) -> Any:
    """A file of this machine or at an address, opened for bytes. Raises DataError if it cannot be opened."""
    if is_remote(path):
        return in_store(path, lambda files, name: TimedFile(files.open(name, "rb")))
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def in_store(path: str, action: Callable[[Any, str], Result]) -> Result:
    """What an action does with fsspec's file system of an address and the path in it.

    An action that is not answered is repeated, see `files.deadlines`. Raises DataError for whatever goes wrong: stores
    raise errors of many libraries, for want of a permission or a network.
    """
    try:
        files, name = url_parts(path)
        return repeated(lambda: action(files, name))
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: BaseException) -> DataError:
    """The error for a file that cannot be read."""
    return DataError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error or type(error).__name__}")


def text_of(path: str) -> Text:
    """The text in a file, which is first decompressed or fetched, to disk, if need be.

    Raises DataError for a file that cannot be read, and for damaged compressed data.
    """
    with open_raw(path) as file:
        compression = compression_of(path, _head(file))
        if compression is None and not is_remote(path):
            return LocalText(path)
        return _spooled(decompressed(file, compression, path))


def _spooled(blocks: Iterator[bytes]) -> Spool:
    spool = Spool()
    for block in blocks:
        spool.append(block)
    return spool


def bytes_of(path: str) -> bytes:
    """All bytes of a file, decompressed. Raises DataError as `text_of` does."""
    with open_raw(path) as file:
        return b"".join(decompressed(file, compression_of(path, _head(file)), path))


def decompressed(file: IO[bytes], compression: str | None, path: str) -> Iterator[bytes]:
    """Blocks of a file without the compression around it. Raises DataError, with its path, if it is damaged."""
    done = 0
    try:
        stream = _decompressor(file, compression, path)
        while block := stream.read(BLOCK):
            done += len(block)
            _check_expansion(done, compression and file.tell(), path)
            yield block
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if compression is None:
            raise unreadable(path, error) from error
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        what = f"it is cut short: its {compression} data have no end" if cut else f"its {compression} data are damaged"
        raise DataError(
            f"cannot read {path!r}: {what}, after {done:,} bytes of text ({str(error).rstrip('.')}). Fetch or write it "
            "again."
        ) from error


def _check_expansion(size: int, compressed: int | str | None, path: str) -> None:
    """Raises DataError if a file grows as no text does while it is decompressed. compressed: bytes read of it."""
    if isinstance(compressed, int) and size > EXPANDED and size > MOST_EXPANSION * max(1, compressed):
        raise DataError(
            f"cannot read {path!r}: its first {compressed:,} bytes are {size:,} bytes of text, more than "
            f"{MOST_EXPANSION} times as many, which no text is. Decompress it yourself if it is meant so."
        )


def line_spans(text: Text) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, number from 1) of every line that is not blank, as bytes of the text.

    Lines end in a line feed, with or without a carriage return; if there is no line feed at all, in carriage returns,
    as in files of old Macs.
    """
    starts, ends, first = _spans(text, NEWLINE)
    if len(starts) == 1 and any(RETURN in block for block in _blocks(text)):
        starts, ends, first = _spans(text, RETURN)
    blank = starts == ends
    for index in np.flatnonzero(BLANK[first] & ~blank).tolist():
        blank[index] = not text.read(int(starts[index]), int(ends[index] - starts[index])).strip()
    kept = np.flatnonzero(~blank)
    return starts[kept], ends[kept], kept + 1


def _spans(text: Text, separator: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, first byte) of every piece between separators; the first byte of an empty one means nothing."""
    starts, ends, first = [np.zeros(1, np.int64)], [], []
    offset, waiting = 0, 0  # waiting: the piece whose first byte is not read yet
    for block in _blocks(text):
        values = np.frombuffer(block, np.uint8)
        at = np.flatnonzero(values == separator[0])
        ends.append(at + offset)
        starts.append(at + offset + 1)
        own = np.concatenate([[waiting], at + offset + 1]) if waiting >= 0 else at + offset + 1
        readable = own[own < offset + len(block)]
        first.append(values[readable - offset])
        offset += len(block)
        waiting = offset if len(own) > len(readable) else -1
    ends.append(np.array([offset]))
    if waiting >= 0:
        first.append(np.zeros(1, np.uint8))
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(first)


def _blocks(text: Text) -> Iterator[bytes]:
    start = 0
    while block := text.read(start, min(BLOCK, text.size - start)):
        yield block
        start += len(block)


def _head(file: Any) -> bytes:
    head = file.read(HEAD)
    file.seek(0)
    return head


def _decompressor(file: IO[bytes], compression: str | None, path: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "bz2":
        return bz2.BZ2File(file)
    if compression == "xz":
        return lzma.LZMAFile(file)
    if compression == "zstd":
        return pyarrow.CompressedInputStream(file, "zstd")
    return file
