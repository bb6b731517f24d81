"""A run whose folder is in a bucket: a working copy of its small files on this machine.

Programs that write a run want a folder: they append lines, rename files, write a model and read it back. They do all of
that in the working copy, whose files are uploaded when they are whole. The checkpoints are not in it: they are written
to the bucket directly, each process its own shards. Of several processes of a run the first has the working copy. The
others fetch the few files that they need, and read models in the bucket.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import BucketError, ConfigError, FolderInUseError, JaxftError, listed
from jaxft.files.atomic import UNFINISHED_FILE, UNFINISHED_FOLDER
from jaxft.files.buckets.lease import Lease
from jaxft.files.buckets.lease import owner_now as owner_of_lease
from jaxft.files.buckets.scratch import Scratch
from jaxft.files.buckets.store import Bucket, Entry, is_bucket
from jaxft.files.locks import lock
from jaxft.files.locks.owner import Owner
from jaxft.files.paths import is_file
from jaxft.files.run_folder import ADAPTER, CHECKPOINTS, COMPILED, LOCK, MARK, MERGED, MODEL, SUMMARY, UNFINISHED
from jaxft.home import local_path

PUSH_SECONDS = 30.0  # between uploads of what has changed, besides those at every save
MOST_BYTES = 2**26  # of a file of an export that is fetched: larger ones are replaced by a new export, and never read
ENDINGS = (UNFINISHED_FILE, UNFINISHED_FOLDER, ".deleted")  # of what is being written, or about to be deleted
GONE = (-1, 0)  # the state of a file that is not there
SUMS = "SHA256SUMS"  # written last in an export, and so uploaded last

log = logging.getLogger(__name__)


class WorkingCopy:
    """The folder `path` with the files of a run in a bucket, but for checkpoints. Nothing is fetched before `pull`."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.lease: Lease | None = None
        self._scratch = Scratch()
        self.path = self._scratch.path / bucket.address.rpartition("/")[2]
        self.path.mkdir()
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files that the bucket has
        self._fetched: dict[str, Entry] = {}  # by `pull`
        self.is_read = True  # alone, and as a whole
        self._left: dict[str, Entry] = {}  # large files of exports, in the bucket alone
        self._staged: set[str] = set()  # folders that are uploaded although they are not finished
        self._mutex = threading.Lock()

    def pull(self, *, small: bool = False) -> None:
        """Fetches the files that are in the bucket, in place of those of the same name. Again, what has changed.

        small: those alone that are directly in the folder, which tell the state of the run.
        """
        with self._mutex:
            entries = self.bucket.entries()
            if MARK not in entries and set(entries) - {LOCK}:
                raise ConfigError(
                    f"output_dir {self.bucket.address} is not empty and holds no run: {MARK} is not there, but "
                    f"{listed(sorted(entries))}. Nothing of it is overwritten. Set output_dir to a new folder."
                )
            for name, entry in entries.items():
                if name == LOCK or name.endswith("/") or _is_of_steps(name) or (small and "/" in name):
                    continue
                if name.startswith(f"{COMPILED}/") and self.lease is None:  # of use to a process that trains alone
                    continue
                if any(part.endswith(ENDINGS) for part in name.split("/")):
                    if f"{name.split('/')[0]}/{UNFINISHED}" in entries:  # of a process that was killed
                        self._sent[name] = GONE
                    continue
                if entry.size > MOST_BYTES and name.split("/")[0] in (ADAPTER, MERGED, MODEL):
                    self._left[name] = entry
                    continue
                if entry.md5 and self._fetched.get(name) == entry:
                    continue
                self.bucket.download(name, self._path_of(name), entry.size)
                self._sent[name], self._fetched[name] = _state(self.path / name), entry
            for name in set(self._fetched) - set(entries):
                (self.path / name).unlink(missing_ok=True)
                self._sent.pop(name, None)
                del self._fetched[name]

    def fetch(self, below: str) -> None:
        """Fetches a file, or all files of a folder, from the bucket. Raises BucketError if there is none."""
        with self._mutex:
            entries = self.bucket.entries(below)
            names = [name for name in entries if name == below or name.startswith(f"{below}/")]
            if not names:
                raise BucketError(
                    f"{self.bucket.address}/{below} is not there, though process 0 has written it: was it deleted "
                    "meanwhile? Give the same command again."
                )
            for name in names:
                self.bucket.download(name, self._path_of(name), entries[name].size)

    def stage(self, folder: str) -> None:
        """Uploads a folder before it is finished, for other processes to read it. Once renamed, it goes from there."""
        self._staged.add(folder)
        self.push()

    def push(self) -> None:
        """Uploads the files that are new or have changed, and deletes in the bucket those that are gone here.

        The mark of the run is first and its summary last, and in every folder the list of checksums is last. Raises
        BucketError, and FolderInUseError if another process has taken the lease.
        """
        with self._mutex:
            if self.lease is not None:
                self.lease.check()
            here = {name: _state(self.path / name) for name in self._names()}
            for name in sorted(here, key=_order):
                if self._sent.get(name) == here[name]:
                    continue
                with contextlib.suppress(FileNotFoundError):  # replaced or deleted meanwhile: the next call sees it
                    self.is_read = False
                    self.bucket.upload(name, self.path / name)
                    self._sent[name] = here[name]
                    self._left.pop(name, None)
            for name in sorted(set(self._sent) - set(here), key=lambda name: (name.endswith(UNFINISHED), name)):
                self.bucket.delete(name)
                del self._sent[name]
                self._forget_left(name)

    def _forget_left(self, name: str) -> None:
        """Deletes the large files of an export that are in the bucket alone, once its checksums are gone here."""
        folder = name.removesuffix(SUMS)
        if name == folder:
            return
        for large in [one for one in self._left if one.startswith(folder)]:
            self.bucket.delete(large)
            del self._left[large]

    def remove(self) -> None:
        """Deletes the copy."""
        self._scratch.remove()

    def _path_of(self, name: str) -> Path:
        """Where an object is written. Raises BucketError for a name that is no path of a file below the folder.

        Buckets take any name, and a stranger could name any file of this machine so.
        """
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise BucketError(
                f"{self.bucket.address} has an object {name!r}, whose name is no path of a file within a folder, so no "
                "run has written it, and it is not fetched. Rename or delete the object: `gcloud storage ls "
                "--recursive` shows it."
            )
        return self.path / name

    def _names(self) -> list[str]:
        """The files that are whole."""
        names = []
        for folder, folders, files in os.walk(self.path):
            folders[:] = [one for one in folders if not one.endswith(ENDINGS) or one in self._staged]
            names += [os.path.relpath(os.path.join(folder, file), self.path) for file in files]
        return [one for one in names if one != LOCK and not one.endswith(ENDINGS) and not _is_of_steps(one)]


_open: dict[str, WorkingCopy] = {}  # by address
_guard = threading.RLock()


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder of this machine in which the files of a run are: the path itself, or the copy of a run in a bucket.

    A copy that nobody writes is fetched, and what has changed in the bucket again; this process deletes it as it ends.
    """
    path = local_path(path)
    refuse_other_store(path)
    return _copy(path, fetch=True).path if is_bucket(path) else Path(path)


def empty_folder_of(path: str | os.PathLike[str]) -> Path:
    """As `folder_of`, but nothing is fetched: for a process that fetches what it needs from another one's run."""
    path = local_path(path)
    if not is_bucket(path):
        return Path(path)
    copy = _copy(path, fetch=False)
    copy.is_read = False
    return copy.path


def forget(path: str | os.PathLike[str]) -> None:
    """Deletes the working copy of a run in a bucket, if there is one."""
    if is_bucket(path := local_path(path)):
        _forget(path)


def run_in_bucket(path: str) -> str:
    """The working copy of a run in a bucket, if `path` is the address of one; every other path as it is."""
    if not is_bucket(path) or not is_file(f"{path.rstrip('/')}/{MARK}"):
        return path
    return str(folder_of(path))


@contextlib.contextmanager
def small_copy(address: str) -> Iterator[Path]:
    """A working copy of a run in a bucket with its small files alone, until the block ends. Raises BucketError."""
    with _guard:
        there = _open.get(Bucket(address).address)
    if there is not None:
        yield there.path
        return
    copy = _copy(address, fetch=False)
    try:
        copy.pull(small=True)
        yield copy.path
    finally:
        _forget(address)


def runs_in_bucket(address: str) -> list[str]:
    """The addresses of the runs at and below one in a bucket, by name. Raises BucketError."""
    bucket = Bucket(address)
    bucket.check()
    folders = [name.removesuffix(MARK) for name in bucket.entries() if name == MARK or name.endswith(f"/{MARK}")]
    return sorted(f"{bucket.address}/{folder}".rstrip("/") for folder in folders)


def address_of(path: str | os.PathLike[str]) -> str | None:
    """The address of a working copy, or of a file in one; None for every other path."""
    text = os.path.abspath(path)
    for address, copy in _open.items():
        if text == str(copy.path) or text.startswith(f"{copy.path}{os.sep}"):
            return address + text.removeprefix(str(copy.path))
    return None


def shown(path: str | os.PathLike[str]) -> str:
    """A path as users know it: the address of what is in a working copy."""
    return os.fspath(path) if is_bucket(path) else address_of(path) or os.fspath(path)


def checkpoints_of(folder: Path) -> str:
    """Where the checkpoints of a run folder are: below it, or in the bucket if it is a working copy."""
    return f"{address_of(folder) or folder}/{CHECKPOINTS}"


def push(folder: Path) -> None:
    """Uploads what is new in a working copy; does nothing for any other folder. Raises as `WorkingCopy.push`."""
    if (address := address_of(folder)) is not None:
        _open[address].push()


def stage(folder: Path) -> None:
    """Uploads a folder within a working copy, finished or not; does nothing elsewhere. Raises as `WorkingCopy.push`."""
    if (copy := _copy_with(folder)) is not None:
        copy.stage(folder.name)


def fetch(path: Path) -> None:
    """Fetches a file or folder of a working copy; does nothing elsewhere. Raises BucketError if it is not there."""
    if (copy := _copy_with(path)) is not None:
        copy.fetch(path.relative_to(copy.path).as_posix())


def owner_now(folder: Path) -> Owner | None:
    """The process that writes in a run folder or a working copy's bucket at this moment; None if nobody does."""
    address = address_of(folder)
    return lock.owner_now(folder, inside=True) if address is None else owner_of_lease(_open[address].bucket)


@contextlib.contextmanager
def written(address: str, what: str, *, exclusive: bool = True) -> Iterator[WorkingCopy]:
    """Opens the working copy of a run that this process writes, alone, until the block ends.

    what, exclusive: as for `files.locks.lock.lock`. Changes are uploaded in the background too. Raises
    FolderInUseError, naming who writes there, and BucketError; errors name the address and not the copy.
    """
    with _guard:
        copy = _open.get(address)
        if copy is not None and copy.lease is not None:
            if exclusive and what == copy.lease.owner.what:
                raise FolderInUseError(f"{address} is being written by this process: wait until it has ended")
            outer = True
        else:
            outer = False
            copy = _begin(address, what)
    if outer:
        yield copy
        return
    ended = threading.Event()
    thread = threading.Thread(target=_push_often, args=(copy, ended), name="uploads", daemon=True)
    thread.start()
    try:
        yield copy
    except BaseException as error:
        ended.set()
        _push_or_tell(copy)
        _rename_in(error, copy)
        raise
    else:
        ended.set()
        copy.push()
    finally:
        _end(copy)


def _begin(address: str, what: str) -> WorkingCopy:
    _forget(address)
    copy = _copy(address, fetch=False)
    try:
        copy.bucket.check()
        copy.lease = Lease(copy.bucket, what)
        copy.pull()
    except BaseException:
        _end(copy)
        raise
    return copy


def _end(copy: WorkingCopy) -> None:
    if copy.lease is not None:
        copy.lease.release()
        copy.lease = None
    _forget(copy.bucket.address)


def _copy(address: str, *, fetch: bool) -> WorkingCopy:
    with _guard:
        bucket = Bucket(address)
        copy = _open.get(bucket.address) or WorkingCopy(bucket)
        if fetch and copy.is_read and copy.lease is None:
            bucket.check()
            copy.pull()
        return _open.setdefault(bucket.address, copy)


def _copy_with(path: Path) -> WorkingCopy | None:
    """The working copy in which a path is."""
    return next((copy for copy in _open.values() if path.is_relative_to(copy.path)), None)


def _forget(address: str) -> None:
    with _guard:
        if (copy := _open.pop(Bucket(address).address, None)) is not None:
            copy.remove()


def _push_often(copy: WorkingCopy, ended: threading.Event) -> None:
    while not ended.wait(PUSH_SECONDS):
        _push_or_tell(copy)


def _push_or_tell(copy: WorkingCopy) -> None:
    try:
        copy.push()
    except JaxftError as error:
        log.warning("%s", error)


def _rename_in(error: BaseException, copy: WorkingCopy) -> None:
    """The address in place of the copy in the message of an error."""
    if isinstance(error, JaxftError):
        error.args = tuple(_renamed(one, copy) if isinstance(one, str) else one for one in error.args)


def shown_text(text: str) -> str:
    """A text with the addresses of runs in place of the paths of their working copies."""
    for copy in list(_open.values()):
        text = _renamed(text, copy)
    return text


def _renamed(text: str, copy: WorkingCopy) -> str:
    return text.replace(str(copy.path), copy.bucket.address)


def refuse_other_store(path: str | os.PathLike[str]) -> None:
    """Raises ConfigError for the folder of a run at an address of another store than Google's."""
    text = os.fspath(path)
    if "://" in text and not is_bucket(text):
        raise ConfigError(
            f"{text} is an address, and the folder of a run is a local or mounted one, or gs://BUCKET/FOLDER: mount "
            "the store, and give the path of the mount; or copy the folder."
        )


def _is_of_steps(name: str) -> bool:
    return name.startswith(f"{CHECKPOINTS}/")


def _order(name: str) -> tuple[bool, bool, bool, str]:
    return (name == SUMMARY, name.endswith(SUMS), name != MARK and not name.endswith(UNFINISHED), name)


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return GONE
    return (status.st_size, status.st_mtime_ns)
