"""When chosen answers become less likely together with rejected ones, a run says so once."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxft.training.likelihoods import FallingLikelihoods
from jaxft.training.log import RunLog


def logged(chosen, rejected):
    pairs = zip(chosen, rejected, strict=True)
    return [{"step": n, "logps/chosen": c, "logps/rejected": r} for n, (c, r) in enumerate(pairs, 1)]


def falling(slope, noise=0.0, steps=40, start=-100.0):
    draw = np.random.default_rng(0).normal(0, noise, steps) if noise else np.zeros(steps)
    return (start - slope * np.arange(steps) + draw).tolist()


def test_it_is_said_once_at_the_first_step_at_which_both_have_fallen():
    watch = FallingLikelihoods()
    answers = [watch.add(row) for row in logged(falling(0.4), falling(1.0))]
    told = [step for step, answer in enumerate(answers, 1) if answer]
    # The means of 10 values are more than 5% of 101.8 apart when the windows are 13 steps apart.
    assert told == [23]
    assert "logps/chosen fell from -101.8 to -107" in answers[22] and "lower optim.learning_rate" in answers[22]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (falling(0.0), falling(1.0)),  # only rejected answers fall, as they should
        (falling(-1.0), falling(1.0)),
        (falling(1.0), falling(0.0)),
        (falling(0.1), falling(1.0)),  # by less than a twentieth
        (falling(1.0, steps=19), falling(1.0, steps=19)),  # too few steps to compare
        (falling(0.2, noise=30.0), falling(0.2, noise=30.0)),  # no more than chance
    ],
)
def test_nothing_is_said_otherwise(chosen, rejected):
    watch = FallingLikelihoods()
    rows = logged(chosen, rejected)
    assert not any(watch.add(row) for row in rows) and FallingLikelihoods.warning_of(rows) is None


def test_a_run_that_recovers_is_not_warned_about_at_its_end():
    values = falling(1.0) + falling(0.0)
    watch = FallingLikelihoods()
    assert any(watch.add(row) for row in logged(values, values))
    assert FallingLikelihoods.warning_of(logged(values, values)) is None


def test_other_rows_do_not_count():
    rows = [row for one in logged(falling(1.0), falling(1.0)) for row in (one, {"step": one["step"], "eval_loss": 1.0})]
    assert FallingLikelihoods.warning_of(rows) is not None
    assert FallingLikelihoods.warning_of([{"step": 1, "logps/chosen": None, "logps/rejected": "x"}]) is None


def run_log(folder, rows, resume_step=None):
    out = io.StringIO()
    watch = FallingLikelihoods().add
    with RunLog(folder, total_steps=40, resume_step=resume_step, console=Console(file=out), watch=watch) as log:
        for row in rows:
            log.step(row["step"], {name: value for name, value in row.items() if name != "step"})
    return out.getvalue()


def test_the_log_prints_it_and_a_resumed_run_does_not_repeat_it(tmp_path):
    rows = logged(falling(0.4), falling(1.0))
    whole = run_log(tmp_path / "whole", rows)
    assert whole.count("warning: chosen answers become less likely") == 1
    first, rest = run_log(tmp_path / "cut", rows[:15]), run_log(tmp_path / "cut", rows[15:], resume_step=15)
    assert "warning" not in first and rest.count("warning: chosen") == 1
    assert "warning" not in run_log(tmp_path / "whole", rows[30:], resume_step=30)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_batches_without_an_answer_of_a_kind_do_not_count():
    """Their logged value is 0."""
    rows = logged([0.0] * 10 + falling(0.0), [0.0] * 10 + falling(0.0))
    assert FallingLikelihoods.warning_of(rows) is None
