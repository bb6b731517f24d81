"""One writer of a folder at a time, by a lock that ends with its process.

The kernel's lock (`flock`) on a small file is the lock: after any death of the process, a SIGKILL too, the file is
free, and what it says of its last owner is of no account. A file system that several hosts mount may have no such
locks, or locks that other hosts do not see. There the file is a lease besides: its owner renews it, another host waits
until it has expired, and an owner whose lease was taken stops before it writes again.
"""

import atexit
import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxft.errors import FolderInUseError
from jaxft.files.locks.owner import (
    MARK,
    MOST_BYTES,
    NO_LOCKS,
    Owner,
    is_alive,
    is_of_one_machine,
    owner_of,
    shares_kernel,
    shares_numbers,
)
from jaxft.files.run_folder import LOCK

RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0  # a lease that was not renewed for so long may be taken
SKEW_SECONDS = 600.0  # a lease older than this by the clock is not waited for, however wrong the clocks of hosts are
RETRY_SECONDS = 0.5  # `owner_now` of another process holds the kernel's lock for a moment
SETTLE_SECONDS = 1.0  # without locks of the kernel: between writing one's name and reading it back


log = logging.getLogger(__name__)


@dataclass
class _Lock:
    """A lock of this process. target: what is written. lease: whether it is renewed.

    users: callers of `lock` that share it; exclusive: whether one of them shares it with nobody.
    """

    path: Path
    target: Path
    descriptor: int
    owner: Owner
    lease: bool
    users: int = 0
    exclusive: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    mutex: threading.Lock = field(default_factory=threading.Lock)  # around writes to the descriptor


_locks: dict[str, _Lock] = {}
_guard = threading.RLock()  # again by the same thread, where the end of an object ends its lock


def lock_file(target: str | os.PathLike[str], *, inside: bool = False) -> Path:
    """The lock file of `out`: `out.jaxft_lock.json` in the same folder, or, if `inside`, `out/jaxft_lock.json`."""
    path = Path(target).absolute()
    return path / LOCK if inside else path.with_name(f"{path.name}.{LOCK}")


@contextlib.contextmanager
def lock(target: str | os.PathLike[str], what: str, *, inside: bool = False, exclusive: bool = True) -> Iterator[None]:
    """Keeps all other processes from writing `target` until the block ends. The lock file is then removed.

    what: the work, for the message that others get. inside: where the file is, see `lock_file`. exclusive: False shares
    the lock with other callers in this process that are not exclusive, and with one that is. Folders that are missing
    are made, and removed if they are empty at the end. Raises FolderInUseError, naming the owner, if another process
    has the lock, and OSError if the file cannot be made.
    """
    path = lock_file(target, inside=inside)
    key = os.path.realpath(path)
    with _guard:
        own = _locks.get(key)
        if own is not None and own.exclusive:
            raise FolderInUseError(_refusal(own.target, own.owner))
        new_folders = [] if own is not None else _make_folders(path.parent)
        try:
            own = own or _take(path, Path(target), what)
        except BaseException:
            _remove_folders(new_folders)
            raise
        _locks[key] = own
        own.users += 1
        own.exclusive = own.exclusive or exclusive
    try:
        yield
    finally:
        with _guard:
            own.users -= 1
            own.exclusive = own.exclusive and not exclusive
            if own.users == 0 and _locks.get(key) is own:
                del _locks[key]
                _release(own)
            _remove_folders(new_folders)


def check(target: str | os.PathLike[str], *, inside: bool = False) -> None:
    """Raises FolderInUseError if another process has taken the lock of this one, whose lease had expired.

    Call it before writing what would mix with the work of the other. Without a lock of this process nothing is checked.
    """
    own = _locks.get(os.path.realpath(lock_file(target, inside=inside)))
    if own is None or not own.lease:
        return
    other = _read(own.path)
    if other is None or other.id != own.owner.id:
        who = "nobody" if other is None else other.describe()
        raise FolderInUseError(
            f"the lease of this process on {own.target} has expired, because it was stopped for more than "
            f"{LEASE_SECONDS:.0f} s, and belongs to {who} now. Nothing more is written there. What was saved before is "
            "whole: give the same command again once the other has ended."
        )


def owner_now(target: str | os.PathLike[str], *, inside: bool = False) -> Owner | None:
    """The process that writes `target` at this moment, by its lock; None if nobody does. Nothing is written."""
    path = lock_file(target, inside=inside)
    if (own := _locks.get(os.path.realpath(path))) is not None:
        return own.owner
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe is not waited for
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        kernel = _lock_kernel(descriptor, fcntl.LOCK_SH)
        owner = owner_of(_text(descriptor))
        if kernel is False:
            return owner or Owner(what="an unknown command", host="unknown", pid=0, since="an unknown time")
        if owner is None or (kernel and (shares_kernel(owner) or is_of_one_machine(path.parent))):
            return None
        if shares_numbers(owner):
            return owner if is_alive(owner) else None
        return owner if abs(time.time() - owner.renewed) < LEASE_SECONDS else None
    finally:
        os.close(descriptor)


def _take(path: Path, target: Path, what: str) -> _Lock:
    """The lock, once this process alone has it. Raises FolderInUseError."""
    until = time.monotonic() + RETRY_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            kernel = _lock_kernel(descriptor, fcntl.LOCK_EX)
            if kernel is not False and _is_same_file(descriptor, path):
                own = _own(path, target, descriptor, what, kernel=kernel is True)
                if own is not None:
                    return own
            if kernel is False and time.monotonic() > until:
                raise FolderInUseError(_refusal(target, owner_of(_text(descriptor))))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


def _own(path: Path, target: Path, descriptor: int, what: str, *, kernel: bool) -> _Lock | None:
    """Writes the owner, after a lease of another host has expired; None if the file has gone meanwhile."""
    text = _text(descriptor) if stat.S_ISREG(os.fstat(descriptor).st_mode) else "a pipe or a device"
    if text.strip("\0\n") and not text.startswith(MARK):
        raise FileExistsError(errno.EEXIST, f"{path} is in the way, and is no lock file of jaxft", str(path))
    lease = not (kernel and is_of_one_machine(path.parent))
    before = owner_of(text)
    if lease and before is not None and not _has_ended(before, kernel=kernel):
        _wait_for_end(path, target, before)
        if not _is_same_file(descriptor, path):
            return None
    own = _Lock(path, target, descriptor, Owner(what=what), lease)
    _write(own)
    if not kernel:
        time.sleep(SETTLE_SECONDS)
        other = _read(path)
        if other is None or other.id != own.owner.id:
            raise FolderInUseError(_refusal(target, other))
    if lease:
        threading.Thread(target=_renew, args=(own,), name="lease", daemon=True).start()
    return own


def _has_ended(before: Owner, *, kernel: bool) -> bool:
    """Whether another owner has ended for certain. kernel: whether the lock of this kernel was got."""
    return (kernel and shares_kernel(before)) or (shares_numbers(before) and not is_alive(before))


def _wait_for_end(path: Path, target: Path, before: Owner) -> None:
    """Returns once the lease of another owner has ended. Raises FolderInUseError as soon as it is renewed."""
    if abs(time.time() - before.renewed) > SKEW_SECONDS:
        return
    until = time.monotonic() + LEASE_SECONDS
    log.warning("%s names %s. It is waited for up to %.0f s, whether it lives", path, before.describe(), LEASE_SECONDS)
    while time.monotonic() < until:
        time.sleep(min(0.5, LEASE_SECONDS / 10))
        now = _read(path)
        if not path.exists():  # it has ended
            return
        if now is not None and (now.id, now.renewed) != (before.id, before.renewed):
            raise FolderInUseError(_refusal(target, now))
    log.warning("taken over from %s, which has not renewed its lease for %.0f s", before.describe(), LEASE_SECONDS)


def _renew(own: _Lock) -> None:
    while not own.ended.wait(RENEW_SECONDS):
        with own.mutex, contextlib.suppress(OSError):  # a storage that is away for a moment; `check` tells the rest
            other = _read(own.path)
            if own.ended.is_set() or other is None or other.id != own.owner.id:
                return
            own.owner = replace(own.owner, renewed=time.time())
            _write(own)


def _write(own: _Lock) -> None:
    content = own.owner.to_text().encode()
    os.pwrite(own.descriptor, content, 0)
    os.ftruncate(own.descriptor, len(content))
    if own.lease:
        os.fsync(own.descriptor)


def _release(own: _Lock) -> None:
    own.ended.set()
    with own.mutex, contextlib.suppress(OSError):
        other = _read(own.path)
        if _is_same_file(own.descriptor, own.path) and (other is None or other.id == own.owner.id):
            own.path.unlink()  # before the lock ends: who opened it meanwhile sees that it is gone
    with own.mutex:
        os.close(own.descriptor)


def _lock_kernel(descriptor: int, kind: int) -> bool | None:
    """Whether the kernel's lock was got; False if another process has it, None if there are no locks here."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _text(descriptor: int) -> str:
    return os.pread(descriptor, MOST_BYTES, 0).decode("utf-8", "replace")


def _read(path: Path) -> Owner | None:
    try:
        with open(path, "rb") as file:
            return owner_of(file.read(MOST_BYTES).decode("utf-8", "replace"))
    except OSError:
        return None


def _refusal(target: Path, owner: Owner | None) -> str:
    who = "another process" if owner is None else owner.describe()
    own = owner is not None and owner.pid == os.getpid() and shares_numbers(owner)
    who += ", which is this process" if own else ""
    return (
        f"{target} is being written by {who}. Two writers would damage each other's files, so nothing was "
        "written. Wait until it ends, or stop it, and give the same command again; or give another folder."
    )


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder, and returns those that were not there, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
    return missing


def _remove_folders(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # something was written there
            return


def _forget() -> None:
    """In a forked child: the lock is its parent's, and ends with the parent."""
    global _guard
    _guard = threading.RLock()
    for own in _locks.values():
        own.ended.set()
        os.close(own.descriptor)
    _locks.clear()


def _release_all() -> None:
    for own in list(_locks.values()):
        _release(own)
    _locks.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(_release_all)
