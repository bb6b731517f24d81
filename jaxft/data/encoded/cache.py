"""Encoded sets on disk: each in a folder whose name says what it was made from, written whole or not at all.

The name is a digest of the rows, the tokenizer, the settings that decide which tokens are made, and the code that makes
them. So nothing has to be invalidated: what is made from something else has another name. The manifest is written last,
and the folder is renamed when all of it is on disk. Two runs may make the same set at once: the second waits for the
first, or where files cannot be locked, makes it too and keeps what is there already.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

import jaxft.data
from jaxft.data.encoded.table import ExampleTable
from jaxft.data.encoded.work import ReadCounts, Work, from_arrow, keeping, map_arrow
from jaxft.data.sources import Rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError
from jaxft.files.digest import content_digest, digests_of_files

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = ".tmp-"  # in the name of a folder that is being written
ENTRY = re.compile(r"([0-9a-f]{40})(\.lock|\.tmp-.+)?")  # names of entries, and of what belongs to them
KEPT_DAYS = 30  # since an entry of the user's cache was last used
KEPT_BYTES = 50 * 2**30  # of the user's cache, after which those that were not used for longest are removed
LIBRARIES = ("transformers", "tokenizers", "jinja2")
# Fields of DataConfig that do not change how a given row is encoded. Any other one is in the name of an entry.
WITHOUT_EFFECT = frozenset(
    {
        "train", "mixture", "stages", "eval", "train_split", "eval_split", "tfds_data_dir", "eval_fraction", "limit",
        "eval_limit", "chat_template", "max_length", "truncation", "window_overlap", "packing", "shuffle", "num_proc",
        "cache", "bad_rows",
    }
)  # fmt: skip


def key_of(work: Work) -> str:
    """The name of the entry of some work."""
    rows = work.rows
    parts = {
        "rows": rows.digest(),
        # Equal files may be read as other rows: as other parts of a set, or by another ending of the name.
        "samples": [len(rows), *(_sample(rows, index) for index in (0, len(rows) // 2, len(rows) - 1))],
        "config": {k: v for k, v in dataclasses.asdict(work.config).items() if k not in WITHOUT_EFFECT},
        "tokenizer": _describe(work.tokenizer),
        "read": f"{getattr(work.read, '__module__', '')}.{getattr(work.read, '__qualname__', repr(work.read))}",
        "code": _code_digest(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()[:40]


def _sample(rows: Rows, index: int) -> dict[str, Any] | str:
    try:
        return rows[index]
    except DataError as error:
        return str(error)


class Entry:
    """One encoded set in a cache."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / key

    def open(self) -> tuple[ExampleTable, ReadCounts] | None:
        """The set, mapped from its files; None if it is not there, or was damaged and is now removed."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            files = [self.path / part["file"] for part in manifest["parts"]]
            digests = digests_of_files(files)
            damaged = [f.name for f, d, p in zip(files, digests, manifest["parts"], strict=True) if d != p["sha256"]]
            if damaged:
                raise ValueError(f"{damaged[0]} is not what was written")
            out = from_arrow(map(map_arrow, files)), ReadCounts.from_dict(manifest["counts"])
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.path.exists():
                self._remove(error)
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            self._remove(error)
            return None
        with contextlib.suppress(OSError):  # a cache that this user may only read
            os.utime(self.path / MANIFEST)
        return out

    @contextlib.contextmanager
    def new(self) -> Iterator[Path]:
        """A folder to write the files of the set to. Raises NotKept."""
        of_host = f"{self.path.name}{UNFINISHED}{socket.gethostname()}-"
        for left in self.path.parent.glob(f"{of_host}*"):  # by a run that was killed
            if not _is_alive(left.name.removeprefix(of_host)):
                shutil.rmtree(left, ignore_errors=True)
        own = self.path.with_name(f"{of_host}{os.getpid()}")
        with keeping(own):
            own.mkdir(parents=True)
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def publish(self, own: Path, names: list[str], counts: ReadCounts, source: str) -> None:
        """Makes what was written to the folder of `new` the entry. source: for people who look into it.

        Raises NotKept.
        """
        parts = [
            {"file": name, "bytes": (own / name).stat().st_size, "sha256": content_digest(own / name)} for name in names
        ]
        manifest = {"source": source, "parts": parts, "counts": counts.to_dict()}
        with keeping(self.path):
            with open(own / MANIFEST, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync(own)
            try:
                own.rename(self.path)
            except OSError:
                if not (self.path / MANIFEST).is_file():  # else another run made the same
                    raise
            _sync(self.path.parent)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Waits until no other run on this machine makes the same entry. Raises NotKept."""
        path = self.path.with_name(f"{self.path.name}.lock")
        with keeping(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")
        with file:
            with contextlib.suppress(OSError):  # some network file systems have no locks; `publish` is safe without
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _remove(self, error: Exception) -> None:
        log.warning("the encoded rows in %s are damaged (%s), so they are made anew", self.path, error)
        shutil.rmtree(self.path, ignore_errors=True)


def prune(folder: Path) -> None:
    """Removes entries that were not used for KEPT_DAYS, or longest, so that KEPT_BYTES remain; and what was cut off."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another run removes it
            manifest = path / MANIFEST
            used = (manifest if manifest.exists() else path).stat().st_mtime
            size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else 0
            entries.append((used, size, path))
    kept = 0
    for used, size, path in sorted(entries, reverse=True):
        kept += size
        if time.time() - used > KEPT_DAYS * 86400 or kept > KEPT_BYTES:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear(folder: Path) -> tuple[int, int]:
    """Removes the entries of a folder, and nothing else that is in it: how many they were, and their bytes.

    A run that has opened an entry goes on; one that writes an entry is left alone.
    """
    entries = size = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = ENTRY.fullmatch(path.name)
        if name is None or _is_written(name[2] or ""):
            continue
        if name[2] is None:
            entries, size = entries + 1, size + sum(file.stat().st_size for file in path.iterdir())
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return entries, size


def _is_written(ending: str) -> bool:
    """Whether a run writes what has a name with this ending; of the runs of other machines it is not known."""
    own = f"{UNFINISHED}{socket.gethostname()}-"
    return ending.startswith(UNFINISHED) and (not ending.startswith(own) or _is_alive(ending.removeprefix(own)))


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything on which the tokens of a text, and the text of a conversation, depend."""
    own = {
        name: value
        for name, value in vars(tokenizer).items()
        if name not in ("backend", "name") and not isinstance(getattr(Tokenizer, name, None), functools.cached_property)
    }
    text = tokenizer.backend.backend_tokenizer.to_str()
    templates = tokenizer.chat_templates
    reads_clock = tokenizer.template_date is None and any("strftime_now" in one for one in templates.values())
    return {
        "own": own,
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "templates": templates,
        "special": tokenizer.backend.special_tokens_map,
        "today": str(date.today()) if reads_clock else None,
    }


@functools.cache
def _code_digest() -> str:
    """Of the code of `jaxft.data`: another version of it may make other tokens."""
    root = Path(jaxft.data.__path__[0])
    texts = [path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _is_alive(pid: str) -> bool:
    """Whether there is a process of this number, other than this one."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _sync(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
