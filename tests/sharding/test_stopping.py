"""Signals that ask a run to stop, and the places beside the loop where it does."""

import os
import signal
import threading

import jax
import pytest

from jaxft.errors import Preempted
from jaxft.sharding import distributed, stopping


@pytest.fixture
def terms(monkeypatch):
    """The SIGTERMs that this process gets, for which jax.distributed would wait."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    got, before = [], signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    yield got
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGHUP, hangup)


def test_a_closed_terminal_is_answered_as_sigterm_is(terms):
    with stopping.hangups_answered():
        os.kill(os.getpid(), signal.SIGHUP)
    assert terms == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_whoever_ignores_or_answers_hangups_still_does(terms, monkeypatch):
    own = []
    for handler in (signal.SIG_IGN, lambda number, frame: own.append(number)):
        signal.signal(signal.SIGHUP, handler)
        try:
            with stopping.hangups_answered():
                os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert own == [signal.SIGHUP] and terms == []
    # Without jax.distributed nobody would answer SIGTERM either; and Python's handlers belong to the main thread.
    inside = []
    thread = threading.Thread(target=lambda: inside.append(_handler_inside()))
    thread.start()
    thread.join()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    assert inside == [signal.SIG_DFL] and _handler_inside() == signal.SIG_DFL


def _handler_inside():
    with stopping.hangups_answered():
        return signal.getsignal(signal.SIGHUP)


@pytest.mark.parametrize(("step", "match"), [(0, "before the first step; run"), (7, "step 7, which is saved; run")])
@pytest.mark.parametrize("agreed_on", [1, 2])
def test_a_phase_stops_at_its_next_safe_place_and_the_run_remembers(monkeypatch, step, match, agreed_on):
    numbers = iter(range(1, 100))
    monkeypatch.setattr(distributed, "_reached", False)
    # JAX answers True for one call alone: that on whose number the processes agreed.
    monkeypatch.setattr(distributed, "reached_preemption_sync_point", lambda number: next(numbers) == agreed_on)
    with pytest.raises(Preempted, match=match):
        stopping.stop_if_requested(step)
    assert distributed.reached_preemption()
    monkeypatch.setattr(distributed, "_reached", False)
    stopping.stop_if_requested(step)
