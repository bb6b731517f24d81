"""Digests of what files hold: the same for equal contents, wherever they are and whatever they are called.

A file is read once. Its digest is remembered under its path, size, times and inode, for this process and, if the file
is large, in the folder of `user_cache`, so that a later start need not read it again.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from jaxft.errors import CheckpointError
from jaxft.files.atomic import write_file
from jaxft.files.deadlines import TimedFile
from jaxft.files.paths import is_remote, of_store, url_parts
from jaxft.home import local_path

BLOCK = 2**20  # bytes that are read at a time
LARGE = 2**24  # bytes; smaller files are hashed again in less time than it takes to look after a note on them
# A file that is written twice within one tick of its file system's clock can keep its time, so the digest of a file
# that has just been written is not remembered. Clocks of network file systems may tick once a second or two.
SETTLED_NS = 3 * 10**9
# What stores say about a file that is another one when its content is.
STORE_VERSIONS = (
    "generation", "etag", "ETag", "md5Hash", "crc32c", "checksum", "version_id", "mtime", "LastModified",
    "last_modified", "created",
)  # fmt: skip

_remembered: dict[str, tuple[list[Any], str]] = {}


def content_digest(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str:
    """The SHA-256, in hexadecimal, of what files and folders hold; local ones or addresses that fsspec reads.

    One file: the digest of its bytes, as `sha256sum` prints it. A folder: of the names of its files below it and their
    digests, without hidden files. Several paths: of their digests, in the given order. The path of a file or folder
    itself does not count. Raises CheckpointError for a path that is not there or cannot be read.
    """
    if isinstance(paths, str | os.PathLike):
        return _digest_of(os.fspath(paths))
    digests = [_digest_of(os.fspath(path)) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def digests_of_files(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The digest of each of many local files of one folder, which are remembered in a single note.

    Raises OSError for a file that is not there or cannot be read.
    """
    real = [os.path.realpath(path) for path in paths]
    versions = [_version_of(path) for path in real]
    folder, version = os.path.commonpath(real), [sum(one[0] for one in versions), *versions]
    known = _recall(folder, version)
    if known is not None:
        return known.split()
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing releases the interpreter's lock
        digests = list(threads.map(_hash_file, real))
    if all(map(_is_settled, versions)):
        _remember(folder, version, " ".join(digests))
    return digests


def user_cache() -> Path:
    """The folder in which jaxft keeps what it can make again: $JAXFT_CACHE, by default ~/.cache/jaxft.

    $XDG_CACHE_HOME takes the place of ~/.cache if it is set. The folder need not exist.
    """
    own = os.environ.get("JAXFT_CACHE")
    return Path(local_path(own or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jaxft")))


def _digest_of(path: str) -> str:
    path = local_path(path)
    try:
        return _remote_digest(path) if is_remote(path) else _local_digest(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path!r}: {error.strerror or error}") from error


def _local_digest(path: str) -> str:
    if not os.path.isdir(path):
        return _file_digest(path)
    names = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.relpath(os.path.join(folder, name), path) for name in files if not name.startswith(".")]
    names.sort()
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing releases the interpreter's lock
        digests = list(threads.map(lambda name: _file_digest(os.path.join(path, name)), names))
    return _folder_digest(names, digests)


def _file_digest(path: str) -> str:
    real = os.path.realpath(path)
    version = _version_of(real)
    digest = _recall(real, version)
    if digest is None:
        digest = _hash_file(real)
        if _is_settled(version):
            _remember(real, version, digest)
    return digest


def _version_of(path: str) -> list[int]:
    """What changes if a file does: its size, both times, and the inode on its device."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _is_settled(version: Sequence[int]) -> bool:
    return time.time_ns() - max(version[1:3]) > SETTLED_NS


def _hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return _hash(file)


def _remote_digest(path: str) -> str:
    files, root = url_parts(path)
    if not of_store(lambda: files.isdir(root), f"cannot read {path!r}"):
        return _remote_file_digest(files, root, path)
    paths = sorted(of_store(lambda: files.find(root), f"cannot read {path!r}"))
    names = [name.removeprefix(root.rstrip("/") + "/") for name in paths]
    shown = [at for at, name in enumerate(names) if not any(part.startswith(".") for part in name.split("/"))]
    digests = [_remote_file_digest(files, paths[at], f"{path.rstrip('/')}/{names[at]}") for at in shown]
    return _folder_digest([names[at] for at in shown], digests)


def _remote_file_digest(files: Any, name: str, path: str) -> str:
    info = of_store(lambda: files.info(name), f"cannot read {path!r}")
    version = [info["size"], *(f"{key}={info[key]}" for key in STORE_VERSIONS if info.get(key))]
    digest = _recall(path, version) if len(version) > 1 else None
    if digest is None:
        with TimedFile(of_store(lambda: files.open(name, "rb"), f"cannot read {path!r}")) as file:
            digest = _hash(file)
        if len(version) > 1:
            _remember(path, version, digest)
    return digest


def _folder_digest(names: Sequence[str], digests: Sequence[str]) -> str:
    lines = [json.dumps([name.replace(os.sep, "/"), digest]) for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash(file: BinaryIO | TimedFile) -> str:
    state = hashlib.sha256()
    while block := file.read(BLOCK):
        state.update(block)
    return state.hexdigest()


def _recall(path: str, version: list[Any]) -> str | None:
    if path not in _remembered and version[0] >= LARGE:
        note = _note(path)
        try:
            _remembered[path] = (json.loads(note.read_text())["version"], json.loads(note.read_text())["digest"])
        except (OSError, ValueError, KeyError, TypeError):  # never written, or by a program that was killed
            return None
    known, digest = _remembered.get(path, ([], ""))
    return digest if known == version else None


def _remember(path: str, version: list[Any], digest: str) -> None:
    _remembered[path] = (version, digest)
    if version[0] < LARGE:
        return
    note, text = _note(path), json.dumps({"path": path, "version": version, "digest": digest})
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, lambda file: file.write(text.encode()))
    except OSError:
        return  # a full disk, or a home folder that cannot be written: the file is read again next time


def _note(path: str) -> Path:
    return user_cache() / "digests" / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
