"""What takes the time of a run: counted by a clock that the test moves, over all starts of the run."""

import json
import time

import pytest
from test_loop import Recorder

from jaxft.errors import Preempted
from jaxft.training.goodput import KEYS, PARTS, TimeUse, goodput, sentence
from jaxft.training.log import RunLog, read_metrics
from jaxft.training.loop import Cadence, fit

SECONDS = {"train": 10.0, "first": 50.0, "batch": 2.0, "evaluate": 7.0, "save": 3.0, "preempted": 1.0}


class Clock:
    """Seconds that pass only when something is done."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Timed(Recorder):
    """A run whose every part takes its SECONDS."""

    def __init__(self, clock, **more):
        super().__init__(**more)
        self.clock, self.compiled = clock, False

    def hooks(self, **more):
        hooks = super().hooks(**more)
        batch, preempted = hooks.batch, hooks.preempted
        slow = {
            "batch": lambda *a: self.after("batch", batch(*a)),
            "preempted": lambda: self.after("preempted", preempted()),
        }
        return type(hooks)(**{**vars(hooks), **slow})

    def after(self, part, value):
        self.clock.now += SECONDS[part]
        return value

    def train_step(self, *args):
        self.after("train" if self.compiled else "first", None)
        self.compiled = True
        return super().train_step(*args)

    def evaluate(self, state, between):
        return self.after("evaluate", super().evaluate(state, between))

    def save(self, *args):
        return self.after("save", super().save(*args))


def train(folder, clock, times, *, start, killed_after=None, preempted_at=None, total=8):
    """One start of a run, as `fit_run` makes it; its last record. killed_after: the step after which it dies."""
    recorder = Timed(clock, preempted_at=preempted_at)
    cadence = Cadence(total_steps=total, steps_per_epoch=4.0, log_every=1, eval_every=4, save_every=4)
    if killed_after is not None:
        cadence = Cadence(**{**vars(cadence), "total_steps": killed_after, "save_every": 100, "eval_every": 100})
    with RunLog(folder, total_steps=total, resume_step=start or None, quiet=True) as log:
        hooks = recorder.hooks(times=times)
        if killed_after is not None:
            hooks = type(hooks)(**{**vars(hooks), "save": lambda *a: None, "evaluate": None})
        fit(start, hooks, cadence, log, start=start, progress={})


def test_every_second_is_in_one_part(tmp_path):
    clock = Clock()
    times = TimeUse(clock)
    with times.during("setup"):
        clock.now += 20
        with times.during("scoring"):
            clock.now += 5
    clock.now += 4
    train(tmp_path, clock, times, start=0)
    expected = {
        "setup": 20, "scoring": 5, "other": 4, "compile": 50, "steps": 7 * 10, "input": 8 * 2, "evaluation": 2 * 7,
        "save": 2 * 3, "peers": 8 * 1, "rollouts": 0, "export": 0, "lost": 0,
    }  # fmt: skip
    assert times.seconds() == expected and sum(expected.values()) == clock.now - 1000
    assert goodput(expected) == pytest.approx(70 / 193)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert all(set(KEYS) <= set(row) for row in rows)
    assert rows[1]["time/steps"] == 10 and rows[1]["time/input"] == 4 and rows[1]["step_seconds"] == 12
    assert [row["goodput"] for row in rows] == sorted(row["goodput"] for row in rows)
    assert sentence(expected).startswith(
        "goodput 36.3% of 0:03:13: steps 36.3%, compile 25.9%, setup 10.4%, input 8.3%"
    )


def test_earlier_starts_count_and_what_was_lost_is_told(tmp_path):
    clock = Clock()
    # Killed after step 6; its newest checkpoint is of step 4.
    train(tmp_path, clock, TimeUse(clock), start=0, killed_after=6)
    first = clock.now - 1000
    clock.now += 86_400  # nobody ran it for a day
    times = TimeUse(clock)
    record = times.go_on({}, read_metrics(tmp_path), 4)
    assert record["lost"] == 20 and record["steps"] == 30 and record["compile"] == 50
    # The last start lost what came after its last row: the question to the other processes.
    assert sum(record.values()) == first - 1
    # Killed again before anything was logged: what was lost is remembered, and not lost again.
    RunLog(tmp_path, total_steps=8, resume_step=4, quiet=True).close()
    again = TimeUse(clock)
    assert again.go_on(json.loads(json.dumps(record)), read_metrics(tmp_path), 4) == record
    train(tmp_path, clock, again, start=4)
    seconds = again.seconds()
    assert seconds["lost"] == 20 and seconds["steps"] == 30 + 30 and seconds["compile"] == 100
    row = [row for row in read_metrics(tmp_path) if "loss" in row][-1]
    assert row["time/lost"] == 20 and row["goodput"] == pytest.approx(60 / sum(row[f"time/{part}"] for part in PARTS))


def test_nothing_is_lost_by_a_run_that_saved_before_it_stopped(tmp_path):
    clock = Clock()
    with pytest.raises(Preempted):
        train(tmp_path, clock, TimeUse(clock), start=0, preempted_at=5)
    assert TimeUse(clock).go_on({}, read_metrics(tmp_path), 5)["lost"] == 0
    assert TimeUse(clock).go_on({}, [{"step": 3, "loss": 1.0}], 3) == dict.fromkeys(PARTS, 0.0)  # an older version's


def test_a_wall_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    jumps = iter([0.0, 86_400.0, -86_400.0, 1e9, 0.0] * 100)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1.7e18 + next(jumps) * 1e9))
    clock = Clock()
    train(tmp_path, clock, TimeUse(clock), start=0)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert {row["tokens_per_second"] for row in rows[1:]} == {10 / 12}
    assert rows[-1]["time/steps"] == 70


def test_a_clock_that_stands_still_gives_no_speed(tmp_path):
    recorder = Recorder()
    cadence = Cadence(total_steps=3, steps_per_epoch=4.0, log_every=1, eval_every=None, save_every=None)
    with RunLog(tmp_path, total_steps=3, resume_step=None, quiet=True) as log:
        fit(0, recorder.hooks(times=TimeUse(lambda: 5.0)), cadence, log, start=0, progress={})
    assert not any("tokens_per_second" in row for row in read_metrics(tmp_path))
    assert [row["goodput"] for row in read_metrics(tmp_path) if "loss" in row] == [0, 0, 0]
