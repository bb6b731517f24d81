"""How several processes end together: no process waits for a lost one, and each reports the reason.

Whether an error is the fault of another process is decided by asking who is still there (`links`), not by the class
or the words of the error: a lost connection has another class in each library. The one exception is a deadline of a
library that has passed while all processes are there: then one of them came too late.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxft.errors import ExitCode, JaxftError, Preempted
from jaxft.sharding.links import Links, Loss, current

GRACE_SECONDS = 5.0  # time for a process to meet by itself an error that another has reported
NEWS_SECONDS = 7.0  # in which the loss of a process that breaks a library below is known here
ABORT_SECONDS = 2.0  # the same, if the program was aborted and cannot go on
RESUME_HINT = "The same command goes on from the newest checkpoint."
DEADLINES = ("DEADLINE_EXCEEDED", "Deadline Exceeded", "Timed out waiting")  # as JAX's libraries say that one passed
INTERRUPTED, DID = "was interrupted", "did: "  # beginnings of reasons

Say = Callable[[str], None]
Explain = Callable[[BaseException], ExitCode]


def _write(text: str) -> None:
    # Past Python's buffers, whose locks another thread may hold when this process is aborted.
    with contextlib.suppress(OSError):
        os.write(2, f"jaxft: {text}\n".encode())


_say: list[Say] = [_write]
_ending = threading.Lock()  # whoever has it ends this process


def say(text: str) -> None:
    """Writes a line for people, as `end_on_peer_error` was told to."""
    _say[-1](text)


@contextlib.contextmanager
def end_on_peer_error(write: Say, explain: Explain) -> Iterator[None]:
    """Inside this context, an error of one process of a run ends all of them.

    This process's own error is explained and reported to the others. What another process reported, or its death, is
    said here and ends this process with PEER_LOST; so is an error of a library that the end or the lateness of another
    process caused.
    write: writes a line for people. explain: writes what an error means and returns the exit code. Preempted passes,
    since all processes have agreed on it. With one process, and before `distributed.start`, errors pass.
    """
    _say.append(write)
    try:
        yield
    except Preempted:
        _finish()
        raise
    except BaseException as error:
        links = current()
        if links is None:
            raise
        _fail(error, links, explain)
    else:
        _finish()
    finally:
        _say.pop()


def end_with(loss: Loss) -> None:
    """Ends this process because another one has ended; for `Links`."""
    if loss.reported:
        time.sleep(GRACE_SECONDS)
    _end_lost(loss)


def watch_aborts() -> None:
    """From now on an abort says what it means, and exits with PEER_LOST if another process is its cause.

    jax.distributed aborts from its own thread if it loses its connections. A handler of Python's `signal` would wait
    for the main thread, which may wait for the lost process.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)
    _handlers.append(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    atexit.register(_finish_at_exit)


_handlers: list[Any] = []  # they must live as long as the process


def _aborted(_: int) -> None:
    links = current()
    loss = links and (links.wait(ABORT_SECONDS) or links.silent())
    if links and loss:
        links.report(loss)
        _end_lost(loss)
    _take_over()
    say(f"{_me(links)} was aborted by a library; see the lines above. The other processes are still there.")
    if links:
        links.fail("was aborted by a library", 2 * GRACE_SECONDS)
    _exit(ExitCode.FAILED)


def _fail(error: BaseException, links: Links, explain: Explain) -> None:
    own = _is_own(error)
    if not own and (loss := links.wait(NEWS_SECONDS)):
        _end_lost(loss)
    _take_over()
    late = not own and any(word in str(error) for word in DEADLINES)
    code = _explain_late(error, links) if late else explain(error)
    interrupted = isinstance(error, KeyboardInterrupt)
    with contextlib.suppress(KeyboardInterrupt):
        links.fail(INTERRUPTED if interrupted else f"{DID}{type(error).__name__}: {error}", 2 * GRACE_SECONDS)
    _exit(code)


def _is_own(error: BaseException) -> bool:
    """Whether another process cannot be the cause: not if one of ours was raised from an error of a library.

    A save that a library could not finish, for instance, is reported as ours.
    """
    cause = error.__cause__
    library = cause is not None and not isinstance(cause, JaxftError | OSError)
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, JaxftError) and not library)


def _explain_late(error: BaseException, links: Links) -> ExitCode:
    message = str(error).strip().splitlines()[0][:200]
    say(
        f"{_me(links)} stops, because another process came too late to a computation of all, although none has ended: "
        f"its machine is too busy, or their network is too slow ({type(error).__name__}: {message}). {RESUME_HINT}"
    )
    return ExitCode.PEER_LOST


def _end_lost(loss: Loss) -> None:
    _take_over()
    # After an error it goes on only once that is mended, which the reason says.
    hint = "" if loss.reason.startswith(DID) else f". {RESUME_HINT}"
    say(f"{_me(current())} stops, because process {loss.process} {loss.reason}{hint}")
    _exit(ExitCode.PEER_LOST)


def _take_over() -> None:
    """Returns if this thread may end the process; else another one is about to."""
    if not _ending.acquire(blocking=False):
        while True:
            time.sleep(GRACE_SECONDS)


def _me(links: Links | None) -> str:
    return "this process" if links is None else f"process {links.me} of {links.count}"


def _finish() -> None:
    if links := current():
        links.finish()


def _finish_at_exit() -> None:
    # An error that nobody caught is no end of the run; the others then see the connection break.
    if getattr(sys, "last_value", None) is None:
        _finish()


def _exit(code: ExitCode) -> None:
    """Ends this process at once. A usual exit would wait in `jax.distributed` for processes that wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        # A stream that cannot be flushed must not keep this process alive.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(code)
