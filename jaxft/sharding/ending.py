"""How several processes end together: no process waits for a lost one, and each reports the reason."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from jaxft.errors import ExitCode, Preempted
from jaxft.sharding.processes import is_multi_process, store

GRACE_SECONDS = 5.0  # time for a process to meet by itself an error that another has reported
POLL_SECONDS = 0.5  # between two checks of the reports of others
FAILED, LEFT = "jaxft/failed/", "jaxft/left/"
# Parts of the messages of collective libraries about a lost connection.
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|[Cc]onnection")
RESUME_HINT = "The same command goes on from the newest checkpoint."

Say = Callable[[str], None]
Explain = Callable[[BaseException], ExitCode]


@contextlib.contextmanager
def end_on_peer_error(say: Say, explain: Explain) -> Iterator[None]:
    """Inside this context, an error of one process ends all of them.

    This process's own error is explained and reported to the others; an error that another process reported is repeated
    here and ends this process with PEER_LOST. `jax.distributed` notices a lost process (killed, out of memory, its
    machine gone) within its heartbeat, and aborts. A line is written in this case too, and the exit code is
    PEER_LOST. say: writes a line for people. explain: writes what an error means and returns the exit code.
    Preempted passes, since all processes have agreed on it. With one process the context does nothing.
    """
    if not is_multi_process():
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done, say), name="ending", daemon=True)
    watch.start()
    try:
        with _explain_abort(say):
            try:
                yield
            except Preempted:
                raise
            except BaseException as error:
                _fail(error, say, explain)
                raise
    finally:
        done.set()
        watch.join()


def _fail(error: BaseException, say: Say, explain: Explain) -> None:
    if not (isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error))):
        _leave(f"{type(error).__name__}: {error}", explain(error))
    # The end of another process broke this one's connection. If it reported the reason, the watch repeats it and ends
    # this process.
    time.sleep(GRACE_SECONDS + 4 * POLL_SECONDS)
    explain(error)
    reason = "it lost its connections, most likely because another process died or is far behind"
    say(f"process {jax.process_index()} of {jax.process_count()} stops: {reason}. {RESUME_HINT}")
    _leave(reason, ExitCode.PEER_LOST)


def _leave(reason: str, code: ExitCode) -> None:
    """Ends this process at once and reports the reason to the others. Process 0, which has the store, ends last. A
    usual exit would wait in `jax.distributed` for processes that wait for this one.
    """
    me = jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # if the store ended with process 0, nobody can read it
        store().key_value_set(f"{FAILED}{me}", reason)
        store().key_value_set(f"{LEFT}{me}", "")
        until = time.monotonic() + 2 * GRACE_SECONDS
        while me == 0 and time.monotonic() < until and len(store().key_value_dir_get(LEFT)) < jax.process_count():
            time.sleep(POLL_SECONDS)
    _exit(code)


def _watch(done: threading.Event, say: Say) -> None:
    me, count = jax.process_index(), jax.process_count()
    while not done.wait(POLL_SECONDS):
        try:
            failures = [(key.rsplit("/", 1)[-1], reason) for key, reason in store().key_value_dir_get(FAILED)]
        except jax.errors.JaxRuntimeError:
            return  # the store is gone, and jax.distributed aborts
        if any(key == str(me) for key, _ in failures):
            return  # this process is on its way out
        if failures and not done.wait(GRACE_SECONDS):
            who, reason = failures[0]
            say(f"process {me} of {count} stops, because process {who} did: {reason}")
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                store().key_value_set(f"{LEFT}{me}", "")
            _exit(ExitCode.PEER_LOST)


@contextlib.contextmanager
def _explain_abort(say: Say) -> Iterator[None]:
    """Inside this context, an abort writes a line and exits with PEER_LOST.

    jax.distributed aborts from its own thread, and Python cannot set its callback for this case. A handler of Python's
    `signal` would wait for the main thread, which waits for the lost process.
    """

    def handle(number: int) -> None:
        say(
            f"process {jax.process_index()} of {jax.process_count()} was aborted, most likely because another process "
            f"died or was cut off: see the lines above, and what the others said. {RESUME_HINT}"
        )
        _exit(ExitCode.PEER_LOST)

    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


def _exit(code: ExitCode) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A stream that cannot be flushed must not keep this process alive.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(code)
