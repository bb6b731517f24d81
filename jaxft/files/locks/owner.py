"""Who writes in a folder: the text of a lock file, and whether the locks of a file system reach every host."""

import errno
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from jaxft.files.json_fields import is_finite

FORMAT = 1  # of the lock file
MARK = '{"jaxft_lock"'  # how the text of every lock file begins
MOST_BYTES = 4096  # a lock file is never longer
# Errors by which a file system says that it has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# File systems of one machine: the locks of its kernel are all that there are.
OF_ONE_MACHINE = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs", "overlay", "aufs", "vfat",
     "exfat", "fuseblk", "ntfs3", "squashfs")
)  # fmt: skip


@cache
def running_kernel() -> str:
    """What tells this running kernel from all others, and, after a space, its processes as they are numbered here.

    Containers on one host share the kernel, and have numbers of their own; hosts of the same name share neither.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that writes in a folder.

    what: its work, such as `jaxft train`. host, pid: where it runs. machine: see `running_kernel`.
    since: when it began, ISO 8601 in UTC. renewed: Unix time in seconds when it last showed that it lives; only a lease
    is renewed. id: of this lock, for ever the same.
    """

    what: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=running_kernel)
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
    renewed: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: uuid4().hex)

    def describe(self) -> str:
        """The owner in words."""
        since = self.since.removesuffix("+00:00").replace("T", " ")
        return f"`{self.what}` on host {self.host}, process {self.pid}, since {since} UTC"

    def to_text(self) -> str:
        """The text of the lock file."""
        return json.dumps({"jaxft_lock": FORMAT, **asdict(self)}) + "\n"


def owner_of(text: str) -> Owner | None:
    """The owner that the text of a lock file names; None if it names none."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("jaxft_lock", None) != FORMAT:
            return None
        owner = Owner(**values)
    except (ValueError, TypeError, RecursionError):  # of a writer that is at it, of another program, or cut off
        return None
    texts = (owner.what, owner.host, owner.machine, owner.since, owner.id)
    numbers = isinstance(owner.pid, int) and isinstance(owner.renewed, int | float) and is_finite(owner.renewed)
    return owner if numbers and all(isinstance(text, str) for text in texts) else None


def shares_kernel(owner: Owner) -> bool:
    """Whether an owner is on this machine, so that the locks of its kernel are seen here."""
    return owner.machine.partition(" ")[0] == running_kernel().partition(" ")[0]


def shares_numbers(owner: Owner) -> bool:
    """Whether the number of an owner's process means the same process here: `is_alive` can tell of it then."""
    return owner.machine == running_kernel()


def is_alive(owner: Owner) -> bool:
    """Whether a process with the number of an owner runs, which may be another one after a time."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def is_of_one_machine(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is on a disk of this machine, so that no other host writes there.

    Where the kernel does not tell (macOS), it is taken for one.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return True
    path, best = os.path.realpath(folder), ("", "")
    for line in lines:
        fields: list[Any] = line.split(" ")
        mount = fields[4].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best[0]):
            best = (mount, fields[fields.index("-") + 1])
    return best[1] in OF_ONE_MACHINE
