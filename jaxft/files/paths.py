"""Access to the files of a model folder on this machine, in the Hugging Face cache, or in a bucket.

`hf://owner/name` (or `hf://owner/name@revision`) is fetched into the Hugging Face cache, which other programs share.
`gs://bucket/folder`, and other addresses that fsspec knows, are read in place: only the requested byte ranges are
transferred.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxft.errors import CheckpointError, did_you_mean
from jaxft.files.buckets.gcs import gcs_file_system
from jaxft.files.deadlines import PIECE, repeated
from jaxft.files.strict_json import parse_json
from jaxft.home import local_path
from jaxft.system import naming

HUB = "hf://"
MAX_JSON_BYTES = 100_000_000  # the limit of the format for a safetensors header; indexes and configs are smaller
SMALL = (".json", ".jinja", "tokenizer.model")
WRAPPERS = (
    "zip",
    "tar",
    "libarchive",
    "reference",
    "dir",
    "simplecache",
    "filecache",
    "blockcache",
    "cached",
    "generic",
)
GAP = 2**20  # bytes; to read a gap of this size between two remote ranges costs less than a second request

Result = TypeVar("Result")
Ranges = Sequence[tuple[int, int]]  # (offset, length)


class Folder(Protocol):
    """The files directly in one folder."""

    path: str

    def names(self) -> list[str]:
        """Names of the files, sorted."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CheckpointError if it does not exist or is outside the folder."""
        ...

    def read(self, name: str, ranges: Ranges) -> np.ndarray:
        """The bytes of the ranges, concatenated, as uint8 in fresh memory."""
        ...


class LocalFolder:
    """A folder of this machine. Its files may be links, but only to files within it or within its cache entry."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._located: dict[str, str] = {}

    def names(self) -> list[str]:
        if not os.path.isdir(self.path):
            raise CheckpointError(f"no folder {self.path!r}")
        return sorted(os.listdir(self.path))

    def size(self, name: str) -> int:
        return os.path.getsize(self.locate(name))

    def read(self, name: str, ranges: Ranges) -> np.ndarray:
        # Read, not mapped, so that the bytes do not stay in the memory of this process.
        return pread(self.locate(name), ranges)

    def locate(self, name: str) -> str:
        """The real path of a file of the folder. A link may leave it only within its Hugging Face cache entry."""
        if name not in self._located:
            self._located[name] = _inside(self.path, name)
        return self._located[name]


class RemoteFolder:
    """A folder that fsspec reads, such as gs://bucket/model (which needs gcsfs)."""

    def __init__(self, path: str) -> None:
        self._files, self._root = url_parts(path)
        self.path = path.rstrip("/")

    @cached_property
    def _sizes(self) -> dict[str, int]:
        entries = of_store(lambda: self._files.ls(self._root, detail=True), f"cannot list {self.path}")
        return {e["name"].rstrip("/").rsplit("/", 1)[-1]: e["size"] for e in entries if e["type"] == "file"}

    def names(self) -> list[str]:
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        _check_name(self.path, name)
        if name not in self._sizes:
            raise CheckpointError(f"{self.path}: no file {name!r}.{did_you_mean(name, self._sizes)}")
        return self._sizes[name]

    def read(self, name: str, ranges: Ranges) -> np.ndarray:
        # Ranges that are close to each other are read in one request.
        size, out, done = self.size(name), [], 0
        while done < len(ranges):
            start, end, last = ranges[done][0], sum(ranges[done]), done + 1
            while last < len(ranges) and 0 <= ranges[last][0] - end <= GAP:
                end, last = sum(ranges[last]), last + 1
            if end > size:
                raise CheckpointError(f"{self.path}/{name}: ends at byte {size}; bytes up to {end} were expected")
            raw = self._fetch(name, start, end)
            out += [raw[offset - start : offset - start + length] for offset, length in ranges[done:last]]
            done = last
        return np.concatenate(out) if out else np.empty(0, np.uint8)

    def _fetch(self, name: str, start: int, end: int) -> np.ndarray:
        """The bytes from start to end, in pieces that each have a deadline."""
        out = []
        for first in range(start, end, PIECE):
            last = min(first + PIECE, end)
            read = partial(self._files.cat_file, f"{self._root}/{name}", start=first, end=last)
            raw = np.frombuffer(of_store(read, f"cannot read {self.path}/{name}"), np.uint8)
            if raw.size != last - first:
                raise CheckpointError(f"{self.path}/{name}: {raw.size} bytes came, {last - first} were requested")
            out.append(raw)
        return np.concatenate(out) if len(out) > 1 else out[0] if out else np.empty(0, np.uint8)


def is_remote(path: str) -> bool:
    """Whether a path is an address that is read in place, and neither a local path nor an hf:// name."""
    return "://" in path and not path.startswith(HUB)


def hub_hint(path: str) -> str:
    """For a path where nothing is, and that has the form of a model's name on the Hugging Face hub, how to write it."""
    name = path.rstrip("/")
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9](@[\w./-]+)?", name) and not os.path.exists(path)
    return f" For the model of this name on the Hugging Face hub, write hf://{name}." if named else ""


def file_name(path: str) -> str:
    """The last part of a local path or an address."""
    return path.rstrip("/").rpartition("/")[2] or path


def url_parts(path: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of an address. Raises CheckpointError if fsspec cannot read it."""
    # Imported here: local folders need no fsspec.
    from fsspec.core import url_to_fs

    if page := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path):
        raise CheckpointError(f"{path} is a page of the Hugging Face hub: write hf://{page[1]}")
    if "::" in path:
        raise CheckpointError(f"{path}: chained addresses are not read")
    if path.partition("://")[0] in WRAPPERS:
        raise CheckpointError(f"{path} is no address of a folder: unpack what it names, and give the folder itself")
    try:
        return repeated(lambda: url_to_fs(path, **_settings(path)))  # some connect at once
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}. For gs:// addresses: pip install gcsfs; s3:// needs s3fs"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot reach {path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is no address of a folder that can be read: {error}") from error


def _settings(path: str) -> dict[str, Any]:
    """Settings of fsspec's file system. What other processes write in a bucket is to be seen."""
    if not path.startswith("gs://"):
        return {}
    gcs_file_system()
    return {"use_listings_cache": False}


def of_store(action: Callable[[], Result], failure: str) -> Result:
    """What an action on fsspec's file system returns; see `deadlines.repeated`.

    failure: what could not be done, for messages. Raises CheckpointError for whatever goes wrong: stores raise errors
    of many libraries, for want of a permission or a network.
    """
    try:
        return repeated(action)
    except Exception as error:
        raise CheckpointError(f"{failure}: {error or type(error).__name__}") from error


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder at a local path or an address. Raises CheckpointError for an address that cannot be read."""
    path = local_path(path)
    return RemoteFolder(path) if is_remote(path) else LocalFolder(path)


def is_file(path: str) -> bool:
    """Whether there is a file at a local path or an address."""
    if not is_remote(path):
        return os.path.isfile(path)
    folder, _, name = path.rpartition("/")
    return name in open_folder(folder).names()


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else, and for a link out of its folder."""
    folder, _, name = os.fspath(path).rpartition("/")
    return folder_json(open_folder(folder or ("/" if path.startswith("/") else ".")), name)


def folder_json(folder: Folder, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder."""
    where, size = f"{folder.path}/{name}", folder.size(name)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} has {size} bytes; at most {MAX_JSON_BYTES} are read")
    return json_object(folder.read(name, [(0, size)]).tobytes(), where)


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object. where: its name in errors. Raises CheckpointError for other JSON and for duplicate names."""
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not a JSON object, but {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def sizes_and_times(path: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change in nanoseconds) of a file, or of every file below a folder, by name.

    They tell the weights of one model from those of another that has taken its path, without reading them. The time of
    a file at an address is 0, since not all of them give one.
    """
    if is_remote(path):
        folder = open_folder(path)
        return [(name, folder.size(name), 0) for name in folder.names()]
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
    stats = ((os.path.relpath(file, path), os.stat(file)) for file in files if os.path.exists(file))
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in stats)


def copy_small_files(path: str, target: str) -> None:
    """Copies the JSON files, templates and tokenizer of a folder or address into the local folder `target`."""
    folder = open_folder(path)
    for name in folder.names():
        if name.endswith(SMALL) and folder.size(name) <= MAX_JSON_BYTES:
            folder.read(name, [(0, folder.size(name))]).tofile(os.path.join(target, name))


def pread(path: str, ranges: Ranges) -> np.ndarray:
    """The bytes of (offset, length) ranges of a file, concatenated, as uint8 in fresh memory."""
    out = np.empty(sum(length for _, length in ranges), np.uint8)
    view, done = out.data, 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, length in ranges:
            end = done + length
            while done < end:
                with naming(path):
                    count = os.preadv(descriptor, [view[done:end]], offset)
                if count == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset}; it was longer when it was opened")
                done, offset = done + count, offset + count
    finally:
        os.close(descriptor)
    return out


def _check_name(folder: str, name: str) -> None:
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: the index names {name!r}, which is not a file name in that folder")


def check_links(path: str) -> None:
    """Raises CheckpointError for a link anywhere below a local folder that leads out of it, or of its cache entry.

    For libraries that open the files of a folder themselves.
    """
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            check_link(os.path.join(folder, name), path)


def check_link(entry: str, folder: str) -> str:
    """The real path of an entry of a local folder. Raises CheckpointError if it is outside, or outside its cache entry.

    A folder that is a snapshot of the Hugging Face cache has links to the files of its cache entry.
    """
    root, path = _root(folder), os.path.realpath(entry)
    if os.path.commonpath([root, path]) != root:
        raise CheckpointError(
            f"{entry} is a link to {path}, outside {root}: a stranger's folder could name any file of yours so. Copy "
            "the file into the folder if you trust it."
        )
    return path


def _inside(folder: str, name: str) -> str:
    _check_name(folder, name)
    path = check_link(os.path.join(folder, name), folder)
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder}: no file {name!r}, though its index or a link names it")
    return path


def _root(folder: str) -> str:
    """The real folder that files of a folder may be in: itself, or the cache entry that it is a snapshot of."""
    root = os.path.realpath(folder)
    snapshots = os.path.dirname(root)
    repository = os.path.dirname(snapshots)
    if os.path.basename(snapshots) == "snapshots" and os.path.basename(repository).startswith("models--"):
        return repository
    return root
