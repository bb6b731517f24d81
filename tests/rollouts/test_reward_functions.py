"""Functions in processes of their own: what they are given, and what becomes of a run if they fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxft.errors import ConfigError
from jaxft.rollouts.reward_functions import RewardError, RewardFunctions

CASES = Path(__file__).with_name("reward_cases.py")
PROMPTS, COMPLETIONS = ["p"] * 4, ["a", "b", "cc", ""]
COLUMNS = {"answer": ["a", "x", "cc", "y"], "other": [1, 2, 3, 4]}


def functions_of(names, **settings):
    return RewardFunctions(",".join(f"{CASES}:{name}" for name in names.split(",")), **settings)


def score(functions, completions=COMPLETIONS, columns=COLUMNS):
    return functions.score(PROMPTS, completions, [[1]] * len(completions), columns)


@pytest.fixture(scope="module")
def scores():
    with functions_of("length,named=2,everything,slowly,talks") as functions:
        yield score(functions)


def test_functions_get_the_columns_that_they_name_or_all(scores):
    np.testing.assert_array_equal(scores.by_function["length"], [1, 1, 2, 0])
    np.testing.assert_array_equal(scores.by_function["named"], [1, 0, 1, 0])
    # prompts, completion_ids and both columns beside the completions.
    np.testing.assert_array_equal(scores.by_function["everything"], [4] * 4)
    np.testing.assert_array_equal(scores.by_function["slowly"], [1, 1, 1, np.nan])
    np.testing.assert_array_equal(scores.by_function["talks"], [2] * 4)


def test_the_reward_is_the_weighted_sum_without_what_was_not_scored(scores):
    np.testing.assert_array_equal(
        scores.total, [1 + 2 + 4 + 1 + 2, 1 + 0 + 4 + 1 + 2, 2 + 2 + 4 + 1 + 2, 0 + 0 + 4 + 2]
    )
    metrics = scores.metrics()
    assert metrics["rewards/slowly/mean"] == 1 and metrics["rewards/slowly/unscored"] == 1
    assert metrics["rewards/length/std"] == pytest.approx(np.std([1, 1, 2, 0], ddof=1))


def test_an_answer_that_no_function_scored_has_no_reward():
    with functions_of("slowly") as functions:
        np.testing.assert_array_equal(score(functions).total, [1, 1, 1, np.nan])


def test_a_function_that_hangs_loses_its_answers_and_no_others():
    with functions_of("hangs_on_b,length", timeout_seconds=10.0, workers=4) as functions:
        first = score(functions)
        again = score(functions, ["a", "c", "d", "e"])
    np.testing.assert_array_equal(first.by_function["hangs_on_b"], [1, np.nan, 1, 1])
    np.testing.assert_array_equal(first.total, [2, 1, 3, 1])
    assert first.metrics()["rewards/hangs_on_b/timeouts"] == 1
    np.testing.assert_array_equal(again.by_function["hangs_on_b"], [1] * 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises_on_b", r"raised on answer 1 of a rollout. Its completion is 'b'.\n(.|\n)*KeyError: 'no such thing'"),
        ("raises_on_several", "raised on several answers, but on none of them alone.\n(.|\n)*one at a time"),
        ("one_too_few", "returned 1 rewards for 2 answers. It must return a list with one number for each"),
        ("one_number", "returned a float for 2 answers"),
        ("text", "returned 'good' as a reward. It must be a finite number, or None"),
        ("not_a_number", "returned nan as a reward"),
        ("dies", r"its process died twice \(exit code 7\)"),
        ("leaves", "SystemExit: 3"),
        ("expects_messages", "expects a list with a message, as TRL gives it, set rewards.completions='messages'"),
    ],
)
def test_a_function_that_fails_ends_the_run_with_the_reason(name, message):
    with functions_of(name) as functions, pytest.raises(RewardError, match=message):
        score(functions)


def test_a_call_whose_process_dies_is_made_once_more(tmp_path):
    with functions_of("dies_once", workers=1) as functions:
        rewards = score(functions, columns={"folder": [str(tmp_path)] * 4})
    np.testing.assert_array_equal(rewards.total, [1] * 4)


def test_answers_to_messages_may_be_messages():
    prompts = [[{"role": "user", "content": "?"}]] * 4
    with functions_of("expects_messages", completions="messages") as functions:
        rewards = functions.score(prompts, COMPLETIONS, [[1]] * 4, {})
    np.testing.assert_array_equal(rewards.total, [1, 1, 2, 0])


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        ("named", ["answers"], "needs 'answer', and the rows have no such column; they have answers. Did you mean"),
        ("lenght", [], "has no function 'lenght'; it has (.|\n)*length"),
    ],
)
def test_functions_are_checked_before_the_first_step(names, columns, message):
    with functions_of(names) as functions, pytest.raises(ConfigError, match=message):
        functions.check(columns)


def test_a_file_that_cannot_be_imported_is_refused_with_its_error(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import not_installed_anywhere\ndef f(completions): return []\n")
    with RewardFunctions(f"{path}:f") as functions, pytest.raises(ConfigError, match="not_installed_anywhere"):
        functions.check([])


def processes_of(functions):
    return [worker.process.pid for worker in functions._pool._workers]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_process_outlives_the_functions():
    with functions_of("length") as functions:
        score(functions)
        pids = processes_of(functions)
        assert pids and all(map(is_running, pids))
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_hanging_function_does_not_outlive_a_killed_run(end):
    program = (
        "import sys; from jaxft.rollouts.reward_functions import RewardFunctions\n"
        f"functions = RewardFunctions('{CASES}:hangs_on_b', workers=1)\n"
        "functions.check([])\n"
        "print(functions._pool._workers[0].process.pid, flush=True)\n"
        "functions.score(['p'], ['b'], [[1]], {})\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
    pid = int(run.stdout.readline())
    run.send_signal(end)
    run.wait()
    for _ in range(200):  # the kernel ends it when its parent is gone
        if not is_running(pid):
            break
        time.sleep(0.05)
    assert not is_running(pid)
