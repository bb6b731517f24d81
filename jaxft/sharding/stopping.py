"""How a run is asked to stop, by SIGTERM or SIGHUP, and where it does so beside the training loop."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

from jaxft.errors import Preempted
from jaxft.sharding.distributed import reached_preemption


@contextlib.contextmanager
def hangups_answered() -> Iterator[None]:
    """Inside this context, SIGHUP is answered as SIGTERM is: a terminal that closes, or a lost line, costs nothing.

    Only if `distributed.start` was called, by which SIGTERM is answered, and if nobody else answers or ignores SIGHUP,
    as `nohup` does. In other threads than the main one it does nothing.
    """
    mine = (
        jax.distributed.is_initialized()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    )
    if not mine:
        yield
        return
    signal.signal(signal.SIGHUP, _pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def stop_if_requested(step: int) -> None:
    """Raises Preempted(step) if any process was asked to stop. Every process calls it, at the same places.

    step: the newest that is saved; 0 before training.
    """
    # The processes agree on a call that is still to come, so that the second one answers a signal before the first.
    if reached_preemption() or reached_preemption():
        raise Preempted(step)


def _pass_on(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
