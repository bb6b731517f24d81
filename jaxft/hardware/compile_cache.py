"""Compiled programs, kept in a folder by JAX so that a second start compiles none of them again.

JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps
nothing. See https://docs.jax.dev/en/latest/persistent_compilation_cache.html.
"""

import contextlib
import hashlib
import os
import platform
import warnings
import zlib
from pathlib import Path

import jax
from jax._src import compilation_cache  # the compression of its entries has no public name

from jaxft.files.digest import user_cache
from jaxft.sharding.processes import is_primary

SETTING = "jax_compilation_cache_dir"
ENDING = "-cache"  # of an entry's file name; JAX's own
CHECKED = "checked"  # a file whose time is that of the newest entries that were read
MOST_BYTES = 4 * 2**30

# JAX compresses with one of these.
ZSTANDARD = (getattr(compilation_cache, name, None) for name in ("zstd", "zstandard"))
DAMAGED: tuple[type[Exception], ...] = (zlib.error, EOFError, *(one.ZstdError for one in ZSTANDARD if one is not None))


def keep_compiled(folder: Path | None = None, *, least_seconds: float = 0.0) -> None:
    """Has JAX keep what it compiles from now on, and use what it kept at earlier starts.

    folder: by default `compiled` in the user's cache (`files/digest.py:user_cache`). In it, each kind of processor has
    a folder of its own, because programs for CPUs use the instructions of the one that compiled them. least_seconds:
    a program that compiles faster is not kept. Does nothing if the user has named a folder to JAX, or if the folder
    cannot be written: a run without a cache computes the same.
    """
    named = os.environ.get(SETTING.upper())
    if named is not None or not jax.config.values["jax_enable_compilation_cache"]:
        return
    own = (folder or user_cache() / "compiled") / _processor()
    try:
        own.mkdir(parents=True, exist_ok=True)
        if folder is None or is_primary():
            clean(own)
    except OSError:
        return
    if not os.access(own, os.W_OK):
        return
    # An entry that cannot be read is compiled again, and one that cannot be written is left out.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    # The paths of XLA's own caches would be part of an entry's name, and a working copy has another path each time.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update(SETTING, str(own))


def clean(folder: Path, most_bytes: int = MOST_BYTES) -> None:
    """Removes entries that were not written whole, and those unused for longest while all are larger than most_bytes.

    JAX does not write an entry atomically, and keeps a damaged one for ever. An entry is read once, at the first start
    after it was written.
    """
    mark = folder / CHECKED
    checked = mark.stat().st_mtime_ns if mark.is_file() else -1
    entries, newest = [], checked
    for path in folder.glob(f"*{ENDING}"):
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            status = path.stat()
            if status.st_mtime_ns >= checked and not _is_whole(path):
                path.unlink()
                continue
            newest = max(newest, status.st_mtime_ns)
            entries.append((status.st_atime_ns, status.st_size, path))
    size = sum(entry[1] for entry in entries)
    for _, size_of_one, path in sorted(entries):
        if size <= most_bytes:
            break
        path.unlink(missing_ok=True)
        size -= size_of_one
    if newest > checked:
        mark.touch()
        os.utime(mark, ns=(newest, newest))


def _is_whole(path: Path) -> bool:
    try:
        compilation_cache.decompress_executable(path.read_bytes())
    except DAMAGED:
        return False
    return True


def _processor() -> str:
    """A name for this kind of processor: equal names mean equal instructions."""
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
