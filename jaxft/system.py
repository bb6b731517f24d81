"""What the operating system gives in words: its errors, with the file and the mend, and texts that are not UTF-8."""

import contextlib
import errno
import os
from collections.abc import Iterator

# What to do about an error of the operating system, by its number.
REMEDIES = {
    errno.ENOSPC: "Make room on that disk, or choose another one, and give the same command again.",
    errno.EDQUOT: "Your share of that disk is used up: remove files of yours, or choose another disk.",
    errno.EFBIG: "The file would be larger than that file system or `ulimit -f` allows: choose another disk.",
    errno.EROFS: "That file system can only be read: choose a folder on another one.",
    errno.EACCES: "Give yourself permission (`ls -ld` shows who has it), or choose another folder.",
    errno.EPERM: "The system does not allow it to you there: choose another folder, or ask whoever looks after it.",
    errno.EIO: "The disk, or the connection to it, failed: look at `dmesg`, and copy what is there elsewhere.",
    errno.ENAMETOOLONG: "A name has at most 255 bytes and a whole path 4,095: choose shorter ones.",
    errno.ELOOP: "Links there point at each other: `ls -l` shows them. Remove one, or name the folder itself.",
    errno.ENOTDIR: "A part of the path is a file, not a folder: choose another path.",
    errno.EISDIR: "It is a folder, and a file was expected: choose another path.",
    errno.ENOENT: "Nothing is there: check the path; a link may lead nowhere.",
    errno.EEXIST: "It is there already: choose another path, or remove it.",
    errno.ENOTEMPTY: "Another program writes into that folder: wait for it, or choose another folder.",
    errno.EMFILE: "This process may not open more files: raise the limit with `ulimit -n 4096`.",
    errno.ENFILE: "The whole system has too many files open: end other programs.",
    errno.ENOMEM: "The system has not enough memory: end other programs, or make the work smaller.",
    errno.EAGAIN: "The system may not start more threads or processes now: raise `ulimit -u`, or end other programs.",
    errno.ESTALE: "The network file system has lost the file: mount it again, and give the same command again.",
    errno.EBUSY: "Another program uses it: end that, or choose another path.",
    errno.ETXTBSY: "Another program runs that file: end it, or choose another path.",
    errno.EINVAL: "That file system does not take such a name or operation: choose a folder on another one.",
    errno.EXDEV: "Both paths must be on one file system: choose a path beside the other one.",
    errno.EPIPE: "The program at the other end has closed the connection: give the same command again.",
    errno.ENOTCONN: "The mounted file system has lost its server: mount it again, and give the same command again.",
}
OTHERS = "The operating system refused it."


def described(error: OSError, remedy: str | None = None) -> str:
    """An error of the operating system with the file that it names, and what to do about it, as sentences.

    remedy: in place of the one that belongs to its number.
    """
    names = (error.filename, error.filename2)
    files = " -> ".join(
        os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names if name is not None
    )
    message = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    if remedy is None:
        remedy = "" if error.errno is None else REMEDIES.get(error.errno, OTHERS)
    return f"{f'{files}: ' if files else ''}{message}{f'. {remedy}' if remedy else ''}"


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside this context, an error of the operating system that names no file is given this path.

    Reads and writes of an open file raise such errors: the system knows only its descriptor.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def undecoded(text: str) -> str | None:
    """What is wrong with a text that was not UTF-8, as the end of a sentence; None if it is text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has bytes that are not UTF-8, from character {error.start + 1} on ({text[error.start]!a})"
    return None
