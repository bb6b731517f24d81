"""The loop with stand-ins for devices and files: what happens, in which order, and what must not."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxft.errors import JaxftError, Preempted
from jaxft.training import loop
from jaxft.training.early_stopping import EarlyStopping
from jaxft.training.log import TIMING_KEYS, RunLog, read_metrics
from jaxft.training.loop import Cadence, DivergedError, Epochs, Hooks, fit
from jaxft.training.spikes import SpikeError, SpikeGuard


class Recorder:
    """A log and all hooks in one; `events` is what happened, in order."""

    def __init__(self, *, losses=None, preempted_at=None, held_out=True):
        self.events, self.saved, self.logged = [], {}, {}
        self.losses, self.preempted_at, self.held_out = losses or {}, preempted_at, held_out
        self.norms, self.undoes = {}, False  # undoes: whether a step that is a spike is not taken
        self.skipped = None  # the steps whose update is skipped, if the method may skip any

    def hooks(self, **more):
        return Hooks(
            train_step=self.train_step,
            batch=lambda state, number: ("batch", state, number),
            evaluate=self.evaluate if self.held_out else None,
            save=self.save,
            preempted=lambda: self.of("train")[-1] + 1 == self.preempted_at,
            **more,
        )

    def train_step(self, state, batch, limits=None):
        assert batch[1] == state, "a source that generates sees the weights of the step"
        self.events.append(("train", state, batch[2]))
        loss = self.losses.get(state + 1, 2.0)
        metrics = {"loss": loss, "grad_norm": self.norms.get(state + 1, 1.0), "learning_rate": 1e-3}
        metrics |= {"num_tokens": 10.0, "trained_tokens": 4.0}
        if self.skipped is not None:
            metrics["skipped_updates"] = float(state + 1 in self.skipped)
        if limits is not None:
            metrics["spikes"] = float(not (loss <= limits[0] and metrics["grad_norm"] <= limits[1]))
            if metrics["spikes"] and self.undoes:
                return state, {name: jnp.float32(value) for name, value in metrics.items()}
        return state + 1, {name: jnp.float32(value) for name, value in metrics.items()}

    def evaluate(self, state, between):
        self.events.append(("evaluate", state))
        return {"eval_loss": 1.0 / max(state, 0.5)}

    def save(self, step, state, progress, figures):
        assert state == step
        self.events.append(("save", step))
        self.saved[step] = (dict(progress), dict(figures))

    def step(self, step, metrics):
        self.events.append(("log", step))
        self.logged[step] = dict(metrics)

    def note(self, text):
        self.events.append(("note", text))

    def eval(self, step, metrics):
        assert set(metrics) == {"eval_loss", "eval_seconds"}
        self.events.append(("log eval", step))

    def of(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


def run(recorder, *, total=6, log_every=1, eval_every=None, save_every=None, start=0, progress=None, **hooks):
    cadence = Cadence(
        total_steps=total, steps_per_epoch=4.0, log_every=log_every, eval_every=eval_every, save_every=save_every
    )
    return fit(start, recorder.hooks(**hooks), cadence, recorder, start=start, progress=progress or {})


def test_a_step_is_trained_logged_evaluated_then_saved():
    recorder = Recorder()
    state, figures = run(recorder, total=2, eval_every=1, save_every=1)
    assert recorder.events == [
        ("train", 0, 0), ("log", 1), ("evaluate", 1), ("log eval", 1), ("save", 1),
        ("train", 1, 1), ("log", 2), ("evaluate", 2), ("log eval", 2), ("save", 2),
    ]  # fmt: skip
    assert (state, figures) == (2, {"eval_loss": 0.5})


@pytest.mark.parametrize(("start", "held_out", "steps"), [(0, True, [0, 2]), (1, True, [2]), (0, False, [])])
def test_a_run_that_has_not_begun_may_be_evaluated_first(start, held_out, steps):
    recorder = Recorder(held_out=held_out)
    run(recorder, total=2, start=start, evaluate_start=True, evaluated=lambda: recorder.events.append(("shown", 0)))
    assert recorder.of("evaluate") == recorder.of("log eval") == steps
    # Whoever shows the run finds the evaluation in its log.
    kinds = [kind for kind, *_ in recorder.events]
    assert [kinds[at - 1] for at, kind in enumerate(kinds) if kind == "shown"] == ["log eval"] * len(steps)
    if 0 in steps:
        assert kinds.index("evaluate") < kinds.index("train")


class Fetched(dict):
    """Metrics of a step that tell when they are fetched."""

    def __init__(self, metrics, fetch):
        super().__init__(metrics)
        self.fetch = fetch

    def items(self):
        self.fetch()
        return super().items()


def order_of_fetches(monkeypatch, **more):
    recorder = Recorder()
    plain = recorder.train_step

    def train_step(state, batch):
        state, metrics = plain(state, batch)
        return state, Fetched(metrics, lambda: recorder.events.append(("fetch", state)))

    monkeypatch.setattr(recorder, "train_step", train_step)
    monkeypatch.setattr(loop._Taken, "is_running", property(lambda taken: taken.step > 1))  # the first one compiles
    monkeypatch.setattr(jax, "device_get", lambda metrics: metrics)
    monkeypatch.setattr(jax, "block_until_ready", lambda metrics: metrics)
    run(recorder, total=6, log_every=3, **more)
    return [(kind, rest[0]) for kind, *rest in recorder.events if kind in ("train", "fetch", "log", "save", "evaluate")]


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_fetched(monkeypatch):
    assert order_of_fetches(monkeypatch, eval_every=4, ahead=True) == [
        ("train", 0), ("fetch", 1),
        ("train", 1), ("train", 2), ("fetch", 2),
        # An evaluation waits for its step.
        ("train", 3), ("fetch", 3), ("log", 3), ("fetch", 4), ("evaluate", 4),
        ("train", 4), ("train", 5), ("fetch", 5), ("fetch", 6), ("log", 6), ("evaluate", 6), ("save", 6),
    ]  # fmt: skip


def test_a_loop_that_is_not_ahead_waits_for_every_step(monkeypatch):
    events = order_of_fetches(monkeypatch)
    assert [event for event in events if event[0] in ("train", "fetch")] == [
        event for step in range(6) for event in (("train", step), ("fetch", step + 1))
    ]


@pytest.mark.parametrize("bad", [None, 4])
def test_a_loop_that_is_ahead_logs_the_same_and_saves_nothing_that_is_not_finite(bad):
    @jax.jit
    def slow(state):  # so that steps are in flight
        x = jax.lax.fori_loop(0, 50, lambda _, x: x @ x / 300, jnp.ones((300, 300)))
        loss = jnp.where(state + 1 == (bad or 0), jnp.nan, x.mean() * (state + 1))
        ones = dict.fromkeys(("grad_norm", "learning_rate", "num_tokens", "trained_tokens"), jnp.float32(1.0))
        return {"loss": loss, **ones}

    def trained(ahead):
        recorder = Recorder()
        plain = recorder.train_step
        recorder.train_step = lambda state, batch: (plain(state, batch)[0], slow(state))
        try:
            run(recorder, total=6, eval_every=3, save_every=2, ahead=ahead)
        except DivergedError as error:
            recorder.note(str(error))
        timeless = {n: {k: v for k, v in row.items() if k not in TIMING_KEYS} for n, row in recorder.logged.items()}
        return timeless, recorder.saved, recorder.of("note")

    assert trained(True) == trained(False)
    assert list(trained(True)[1]) == ([2, 4, 6] if bad is None else [2])


def test_each_thing_has_its_own_cadence_and_all_come_last():
    recorder = Recorder()
    run(recorder, total=10, log_every=4, eval_every=3, save_every=5)
    assert recorder.of("log") == [4, 8, 10]
    assert recorder.of("evaluate") == recorder.of("log eval") == [3, 6, 9, 10]
    assert recorder.of("save") == [5, 10]
    assert len(recorder.of("train")) == 10


@pytest.mark.parametrize(
    ("epochs", "due"),
    # Of an epoch of 4 steps, of 3 1/3 and of 1/2.
    [
        (4.0, {1: [4, 8, 10], 0.5: [2, 4, 6, 8, 10], 2.5: [10], 0.1: list(range(1, 11))}),
        (10 / 3, {1: [4, 7, 10], 1 / 3: [2, 3, 4, 5, 6, 7, 8, 9, 10], 1.5: [5, 10]}),
        (0.5, {1: list(range(1, 11)), 4: [2, 4, 6, 8, 10], 100: [10]}),
    ],
)
def test_a_period_in_epochs_ends_with_the_step_that_completes_them(epochs, due):
    for count, steps in due.items():
        cadence = Cadence(total_steps=10, steps_per_epoch=epochs, log_every=1, eval_every=None, save_every=None)
        assert [step for step in range(1, 11) if cadence.due(step, Epochs(count))] == steps, (epochs, count)


def test_periods_of_thirds_miss_no_step_to_rounding():
    cadence = Cadence(total_steps=900, steps_per_epoch=30.0, log_every=1, eval_every=None, save_every=None)
    due = [step for step in range(1, 901) if cadence.due(step, Epochs(1 / 3))]
    assert due == list(range(10, 901, 10))


@pytest.mark.parametrize(
    ("values", "settings", "last"),
    [
        ([5, 4, 4.5, 4.2, 3, 9], {"patience": 2}, 4),
        ([5, 4, 4.5, 3, 3.5, 9], {"patience": 2}, 6),
        ([5, 5, 5], {"patience": 2}, 3),
        ([5, 4.9, 4.8, 4.7, 4.6], {"patience": 2, "threshold": 0.15}, None),
        ([5, 4.95, 4.9, 4], {"patience": 2, "threshold": 0.15}, 3),
        ([1, 2, 1.5, 1.9, 3], {"patience": 2, "mode": "max"}, 4),
        ([float("nan"), 3, float("nan"), float("nan")], {"patience": 2}, 4),
        ([5, 4, 3, 2, 1], {"patience": 1}, None),
    ],
)
@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_training_ends_once_the_metric_stops_getting_better(values, settings, last, killed_after):
    stopping = EarlyStopping(**({"metric": "eval_loss", "mode": "min"} | settings))
    recorder = Recorder()
    recorder.evaluate = lambda state, between: {"eval_loss": values[state - 1]}
    start, progress = 0, {}
    if killed_after:
        run(recorder, total=killed_after, eval_every=1, save_every=1, early_stopping=stopping)
        start = max(recorder.saved)
        progress = recorder.saved[start][0]
        if stopping.ends(progress):
            assert start == last
            return
    total = len(values)
    state, held_out = run(
        recorder, total=total, start=start, progress=progress, eval_every=1, save_every=1, early_stopping=stopping
    )
    assert state == (last or total) == max(recorder.saved) and held_out == pytest.approx(
        {"eval_loss": values[state - 1]}, nan_ok=True
    )
    assert stopping.ends(recorder.saved[state][0]) == (last is not None)
    assert not any(name.startswith("early") for row in recorder.logged.values() for name in row)


def test_a_run_ends_early_only_where_it_can_go_on():
    recorder = Recorder()
    recorder.evaluate = lambda state, between: {"eval_loss": float(state)}
    stopping = EarlyStopping(metric="eval_loss", mode="min", patience=1)
    state, _ = run(recorder, total=20, eval_every=2, may_stop=lambda step: step % 3 == 0, early_stopping=stopping)
    assert state == 6 and recorder.of("save") == [6]


def test_without_periods_everything_comes_once_at_the_end():
    recorder = Recorder()
    run(recorder, total=5, log_every=100)
    assert recorder.of("log") == recorder.of("evaluate") == recorder.of("save") == [5]


def test_without_held_out_rows_nothing_is_evaluated():
    recorder = Recorder(held_out=False)
    _, figures = run(recorder, eval_every=1)
    assert not recorder.of("evaluate")
    assert figures == {}


def test_tokens_add_up_over_the_run_and_epochs_follow_the_step():
    recorder = Recorder()
    run(recorder, total=3)
    assert [recorder.logged[step]["num_tokens"] for step in (1, 2, 3)] == [10, 20, 30]
    assert recorder.logged[3]["trained_tokens"] == 12
    assert recorder.logged[3]["epoch"] == 0.75
    assert {"loss", "grad_norm", "learning_rate"} <= set(recorder.logged[1])
    assert recorder.saved[3][0] == {"num_tokens": 30, "trained_tokens": 12}


def test_skipped_updates_are_counted_over_the_run():
    recorder = Recorder()
    recorder.skipped = {2, 3}
    run(recorder, total=4)
    assert [recorder.logged[step]["skipped_updates"] for step in (1, 2, 3, 4)] == [0, 1, 2, 2]
    assert recorder.saved[4][0]["skipped_updates"] == 2


def test_rates_leave_the_first_step_out_since_it_compiled():
    recorder = Recorder()
    run(recorder, total=3)
    assert "tokens_per_second" not in recorder.logged[1]
    assert recorder.logged[2]["tokens_per_second"] > 0


def test_a_resumed_run_goes_on_where_it_was():
    whole, first, second = Recorder(), Recorder(), Recorder()
    run(whole, total=6, save_every=4)
    with pytest.raises(Preempted):
        first.preempted_at = 4
        run(first, total=6, save_every=4)
    progress = first.saved[4][0]
    run(second, total=6, save_every=4, start=4, progress=progress)
    assert first.of("train") + second.of("train") == whole.of("train")
    assert [event[2] for event in second.events if event[0] == "train"] == [4, 5]
    timeless = {k: v for k, v in whole.logged[6].items() if k not in TIMING_KEYS}
    assert timeless == {k: v for k, v in second.logged[6].items() if k in timeless}
    assert progress == first.saved[4][0]  # the caller's own is not written to


def test_preemption_saves_the_step_and_stops():
    recorder = Recorder(preempted_at=3)
    with pytest.raises(Preempted, match="stopped by SIGTERM or SIGHUP after step 3, which is saved") as stopped:
        run(recorder, save_every=100)
    assert stopped.value.step == 3
    assert recorder.of("train") == [0, 1, 2]
    assert recorder.events[-1] == ("save", 3)


class Stopped(Recorder):
    """Evaluates in three batches. preempted_at: the number of a question whether to stop, of all that are asked."""

    def __init__(self, **more):
        super().__init__(**more)
        self.asked = 0

    def evaluate(self, state, between):
        for _ in range(3):
            between()
        return super().evaluate(state, between)

    def hooks(self, **more):
        return dataclasses.replace(super().hooks(**more), preempted=self.ask)

    def ask(self):
        self.asked += 1
        return self.asked == self.preempted_at


@pytest.mark.parametrize("at", [2, 6, 9])  # the questions of an evaluation are three, and after each step comes one
@pytest.mark.parametrize("last", [2, 6])
def test_a_stop_within_an_evaluation_saves_and_evaluates_later(at, last):
    settings = {
        "total": last, "eval_every": 2, "save_every": 4,
        "early_stopping": EarlyStopping(metric="eval_loss", mode="max", patience=2),
    }  # fmt: skip
    whole, first, second = Stopped(), Stopped(preempted_at=at), Stopped()
    expected = run(whole, **settings)
    if at > whole.asked:
        return
    with pytest.raises(Preempted) as stopped:
        run(first, **settings)
    step = stopped.value.step
    interrupted = len(first.of("evaluate")) < step // 2
    assert interrupted == (at in (2, 9)) and first.events[-1] == ("save", step)
    assert first.saved[step][1] == ({} if interrupted or step % 2 else whole.saved.get(step, ({}, {}))[1])
    assert run(second, **settings, start=step, progress=first.saved[step][0]) == expected
    for kind in ("log", "log eval", "evaluate", "train"):
        assert first.of(kind) + second.of(kind) == whole.of(kind), kind
    assert second.saved[max(whole.saved)] == whole.saved[max(whole.saved)]
    assert not interrupted or second.saved[step][1] == {"eval_loss": 1.0 / step}


def test_a_stop_is_not_asked_within_an_evaluation_from_which_a_run_cannot_go_on():
    recorder = Stopped()
    run(recorder, total=4, eval_every=2, may_stop=lambda step: step % 2 == 1)
    assert recorder.of("evaluate") == [2, 4] and recorder.asked == 2, "after steps 1 and 3 alone"


def test_preemption_at_the_last_step_is_the_end_of_the_run():
    recorder = Recorder(preempted_at=6)
    assert run(recorder)[0] == 6
    assert recorder.of("save") == [6]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_before_it_is_logged_or_saved(loss):
    recorder = Recorder(losses={4: loss})
    with pytest.raises(DivergedError, match=r"loss is not finite at step 4 \(loss .*train.on_spike='skip'"):
        run(recorder, eval_every=1, save_every=1)
    assert recorder.events[-1] == ("train", 3, 3)
    assert recorder.of("save") == [1, 2, 3]
    assert issubclass(DivergedError, JaxftError)


def test_a_checkpoint_is_ranked_by_its_own_figures_only():
    recorder = Recorder()
    run(recorder, total=6, eval_every=2, save_every=3)
    assert recorder.saved[3][1] == {}  # not those of step 2
    assert recorder.saved[6][1] == {"eval_loss": pytest.approx(1 / 6)}


def test_what_the_loop_logs_is_what_the_record_takes(tmp_path):
    recorder = Recorder()
    cadence = Cadence(total_steps=4, steps_per_epoch=2.0, log_every=2, eval_every=4, save_every=None)
    with RunLog(tmp_path, total_steps=4, resume_step=None, console=Console(quiet=True)) as log:
        fit(0, recorder.hooks(), cadence, log, start=0, progress={})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert (rows[1]["epoch"], rows[1]["num_tokens"], rows[2]["eval_loss"]) == (2.0, 40.0, 0.25)


def guard(mode, window=8):
    return SpikeGuard(mode=mode, threshold=5.0, window=window)


def noted(recorder):
    return [text for kind, text, *_ in recorder.events if kind == "note"]


@pytest.mark.parametrize("mode", ["warn", "skip"])
def test_spikes_are_told_counted_and_kept_for_a_resumed_run(mode):
    losses = {step: 2.0 + 0.01 * (step % 3) for step in range(1, 30)} | {12: 2.5, 20: 9.0}
    whole, first, second = (Recorder(losses=losses) for _ in range(3))
    for recorder in (whole, first, second):
        recorder.norms = {15: 40.0}
    run(whole, total=24, save_every=4, spikes=guard(mode))
    assert [whole.logged[step]["spikes"] for step in (11, 12, 15, 20, 24)] == [0, 1, 2, 3, 3]
    assert len(noted(whole)) == 3 and "spike at step 15: grad_norm 40, at most" in noted(whole)[1]
    assert all(text.endswith("left out") == (mode == "skip") for text in noted(whole))
    run(first, total=12, save_every=4, spikes=guard(mode))
    progress = json.loads(json.dumps(first.saved[8][0]))  # as a checkpoint keeps it
    run(second, total=24, start=8, progress=progress, spikes=guard(mode))
    assert noted(second) == noted(whole) and second.logged[24]["spikes"] == 3
    assert second.saved[24] == whole.saved[24]


def test_stop_saves_the_step_before_and_says_how_to_go_on():
    recorder = Recorder(losses={12: 7.0})
    recorder.undoes = True
    with pytest.raises(SpikeError, match=r"step 12: loss 7, at most 2.1 expected.*step 11 is saved.*='skip' goes on"):
        run(recorder, total=20, spikes=guard("stop"))
    assert recorder.events[-1] == ("save", 11) and 12 not in recorder.logged
    recorder = Recorder(losses={12: 7.0})
    with pytest.raises(SpikeError, match="earlier steps are untouched"):
        run(recorder, total=20, spikes=guard("stop"), may_stop=lambda step: step % 4 == 0)
    assert not recorder.saved


def test_numbers_that_are_not_finite_are_left_out_of_the_log_and_end_the_run_if_they_stay():
    recorder = Recorder(losses={3: math.nan, **dict.fromkeys(range(20, 40), math.inf)})
    with pytest.raises(SpikeError, match="not finite in 10 steps in a row, up to step 29"):
        run(recorder, total=40, spikes=guard("skip"))
    assert "loss" not in recorder.logged[3] and recorder.logged[3]["spikes"] == 1
    assert recorder.logged[4]["loss"] == 2.0
    with pytest.raises(DivergedError, match="loss is not finite at step 3"):
        run(Recorder(losses={3: math.nan}), spikes=guard("warn"))
