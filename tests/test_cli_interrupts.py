"""A Ctrl-C ends a command also where Python would ignore it."""

import gc
import os
import signal
import sys
import time

import pytest

from jaxft.cli.interrupts import interrupts_kept


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard even where a shell that put the suite in the background has handed down that it be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_ctrl_c_within_a_callback_of_the_garbage_collector_is_not_lost():
    pressed = []

    def callback(phase, info):
        if not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # Python answers the signal here

    gc.callbacks.append(callback)
    try:
        with interrupts_kept(), pytest.raises(KeyboardInterrupt):
            gc.collect()
            time.sleep(30)
    finally:
        gc.callbacks.remove(callback)
    assert pressed


def test_a_ctrl_c_within_a_finalizer_is_not_lost():
    class Finalized:
        def __del__(self):
            raise KeyboardInterrupt

    with interrupts_kept(), pytest.raises(KeyboardInterrupt):
        Finalized()
        time.sleep(30)


def test_other_errors_that_python_ignores_are_reported_as_before(monkeypatch):
    class Finalized:
        def __del__(self):
            raise ValueError("wrong")

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: reported.append(str(ignored.exc_value)))
    hook = sys.unraisablehook
    with interrupts_kept():
        Finalized()
    assert reported == ["wrong"] and sys.unraisablehook is hook
