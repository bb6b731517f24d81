"""How several processes end together: none waits for one that is gone, and each says why it ends."""

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

from jaxft.errors import Preempted
from jaxft.sharding.processes import is_multi_process, store

EXIT_PEER_LOST = 69  # EX_UNAVAILABLE of sysexits.h
GRACE_SECONDS = 5.0  # for a process to meet by itself the error that another has told
LOOK_SECONDS = 0.5  # between two looks at what was told
FAILED, LEFT = "jaxft/failed/", "jaxft/left/"
# What the libraries of collective operations say when a connection is gone.
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|[Cc]onnection")
AGAIN = "The same command goes on from the newest checkpoint."

Say = Callable[[str], None]
Explain = Callable[[BaseException], int]


@contextlib.contextmanager
def ending_together(say: Say, explain: Explain) -> Iterator[None]:
    """While it is entered, an error of one process ends all of them.

    This process's own error is explained and told to the others; one that another told is repeated here, and ends
    this process with EXIT_PEER_LOST. A process that vanished (killed, out of memory, its machine gone) is noticed by
    `jax.distributed` within its heartbeat, which aborts: then too a line is said, and the exit code is EXIT_PEER_LOST.
    say: writes a line for people. explain: writes what an error means and gives the exit code. Preempted passes, since
    all have agreed on it. With one process nothing of all this happens.
    """
    if not is_multi_process():
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done, say), name="ending", daemon=True)
    watch.start()
    try:
        with _speaking_abort(say):
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
    # Another's end broke this process's connection. Where it told why, the watch says so and ends this process.
    time.sleep(GRACE_SECONDS + 4 * LOOK_SECONDS)
    explain(error)
    reason = "it lost its connections, most likely because another process died or is far behind"
    say(f"process {jax.process_index()} of {jax.process_count()} stops: {reason}. {AGAIN}")
    _leave(reason, EXIT_PEER_LOST)


def _leave(reason: str, code: int) -> None:
    """Ends this process at once, telling the others why. Process 0, where the store lives, goes last.

    The usual way out waits in `jax.distributed` for processes that wait for this one.
    """
    me = jax.process_index()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store went with process 0: nobody is left to be told
        store().key_value_set(f"{FAILED}{me}", reason)
        store().key_value_set(f"{LEFT}{me}", "")
        until = time.monotonic() + 2 * GRACE_SECONDS
        while me == 0 and time.monotonic() < until and len(store().key_value_dir_get(LEFT)) < jax.process_count():
            time.sleep(LOOK_SECONDS)
    _exit(code)


def _watch(done: threading.Event, say: Say) -> None:
    me, count = jax.process_index(), jax.process_count()
    while not done.wait(LOOK_SECONDS):
        try:
            told = [(key.rsplit("/", 1)[-1], reason) for key, reason in store().key_value_dir_get(FAILED)]
        except jax.errors.JaxRuntimeError:
            return  # the store is gone, and jax.distributed aborts
        if any(key == str(me) for key, _ in told):
            return  # this process is on its way out
        if told and not done.wait(GRACE_SECONDS):
            who, reason = told[0]
            say(f"process {me} of {count} stops, because process {who} did: {reason}")
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                store().key_value_set(f"{LEFT}{me}", "")
            _exit(EXIT_PEER_LOST)


@contextlib.contextmanager
def _speaking_abort(say: Say) -> Iterator[None]:
    """While it is entered, an abort ends with a line and EXIT_PEER_LOST.

    jax.distributed aborts from a thread of its own, and its callback for that case cannot be given from Python. A
    handler of Python's `signal` would wait for the main thread, which waits for the process that is gone.
    """

    def handle(number: int) -> None:
        say(
            f"process {jax.process_index()} of {jax.process_count()} was aborted, most likely because another process "
            f"died or was cut off: see the lines above, and what the others said. {AGAIN}"
        )
        _exit(EXIT_PEER_LOST)

    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A stream that cannot be flushed must not keep a process alive that has to end.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(code)
