"""Functions in processes of their own: what they are given, and what becomes of a run if they fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxft.errors import ConfigError
from jaxft.rollouts.reward_functions import RewardError, RewardFunctions, named
from jaxft.rollouts.reward_functions import functions as reward_functions

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
        ("one_number", "returned a value of type float for 2 answers"),
        ("text", "returned 'good' as a reward. It must be a finite number, or None"),
        ("not_a_number", "returned nan as a reward"),
        ("beyond_floats", "returned 1000(.|\n)* as a reward. It must be a finite number"),
        ("dies", r"its process died twice \(exit code 7\)"),
        ("leaves", "SystemExit: 3"),
        ("expects_messages", "expects a list with a message, as TRL gives it, set rewards.completions='messages'"),
    ],
)
def test_a_function_that_fails_ends_the_run_with_the_reason(name, message):
    with functions_of(name) as functions, pytest.raises(RewardError, match=message):
        score(functions)


def test_a_function_that_raised_has_failed_also_if_the_search_for_the_answer_hangs():
    message = r"raised on the answers 0 to 3 of a rollout, or on one of them.\n(.|\n)*before it hangs"
    with functions_of("raises_and_then_hangs", workers=1, timeout_seconds=10.0) as functions:
        with pytest.raises(RewardError, match=message):
            score(functions)


def test_numbers_may_be_of_a_class_of_the_function():
    with functions_of("own_numbers") as functions:
        np.testing.assert_array_equal(score(functions).total, [3] * 4)


def test_calls_of_a_process_share_the_module_and_the_event_loop():
    with functions_of("keeps_its_loop,remembers,recalls", workers=1) as functions:
        score(functions)
        again = score(functions)
    np.testing.assert_array_equal(again.by_function["keeps_its_loop"], [1] * 4)
    np.testing.assert_array_equal(again.by_function["recalls"], [5] * 4)


def test_functions_import_what_the_run_can_import(tmp_path, monkeypatch):
    (tmp_path / "beside_the_run.py").write_text("VALUE = 4.0")
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "rewards.py"
    path.write_text("import beside_the_run\ndef f(completions): return [beside_the_run.VALUE] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with RewardFunctions(f"{path}:f", workers=1) as functions:
        np.testing.assert_array_equal(score(functions).total, [4] * 4)


def test_a_call_whose_process_dies_is_made_once_more(tmp_path):
    with functions_of("dies_once", workers=1) as functions:
        rewards = score(functions, columns={"folder": [str(tmp_path)] * 4})
    np.testing.assert_array_equal(rewards.total, [1] * 4)


def test_answers_to_messages_may_be_messages():
    prompts = [[{"role": "user", "content": "?"}]] * 4
    with functions_of("expects_messages", completions="messages") as functions:
        rewards = functions.score(prompts, COMPLETIONS, [[1]] * 4, {})
    np.testing.assert_array_equal(rewards.total, [1, 1, 2, 0])
    with functions_of("expects_text", completions="messages") as functions:
        with pytest.raises(RewardError, match="expects text, set rewards.completions='text'"):
            functions.score(prompts, COMPLETIONS, [[1]] * 4, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" , ", "names no function"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("exact_mach", "is not a built-in reward function .* Did you mean 'exact_match'"),
        ("json_valid=much", "the weight in 'json_valid=much' is not a number"),
        ("json_valid=nan", "the weight in 'json_valid=nan' is not finite"),
        ("json_valid,json_valid=2", "has several functions called json_valid"),
    ],
)
def test_names_are_checked_before_anything_is_started(text, message):
    with pytest.raises(ConfigError, match=message):
        RewardFunctions(text)


def test_a_built_in_function_without_its_library_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(named, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="math_answer needs math-verify: pip install 'jaxft\\[math\\]'"):
        RewardFunctions("math_answer")


def test_a_path_may_contain_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=1"
    folder.mkdir()
    (folder / "rewards.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    path = folder / "rewards.py"
    assert [one.weight for one in named.named_functions(f"{path}:f")] == [1.0]
    (one,) = named.named_functions(f" {path}:f = 0.5 ")
    assert (one.source, one.name, one.weight) == (str(path), "f", 0.5)


def test_processes_of_a_run_share_what_each_has_scored(monkeypatch):
    others = [{"length": [9.0, None]}, {"length": 1}, None]
    monkeypatch.setattr(reward_functions, "process_share", lambda count: range(count // 2, count))
    monkeypatch.setattr(reward_functions, "gather", lambda value: [others, value])
    with functions_of("length") as functions:
        scores = score(functions)
        np.testing.assert_array_equal(scores.by_function["length"], [9, np.nan, 2, 0])
        assert scores.metrics()["rewards/length/timeouts"] == 1
        monkeypatch.setattr(reward_functions, "gather", lambda value: [[{}, {}, "the other one failed"], value])
        with pytest.raises(RewardError, match="the other one failed"):
            score(functions)


def test_dice_fall_alike_in_all_processes_of_a_run():
    """Two real ones: each scores two of the four answers, and both have all rewards."""
    program = (
        "import sys; from jaxft.sharding import distributed\n"
        "distributed.start(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]))\n"
        "from jaxft.rollouts.reward_functions import RewardFunctions\n"
        f"with RewardFunctions('{CASES}:throws_dice', workers=1) as functions:\n"
        "    print(functions.score(['p'] * 4, ['a'] * 4, [[1]] * 4, {}).total.tolist(), flush=True)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = [
        subprocess.Popen([sys.executable, "-c", program, port, index], stdout=subprocess.PIPE, text=True)
        for index in "01"
    ]
    one, two = (json.loads(run.communicate()[0]) for run in runs)
    assert one == two and len(set(one)) == 4


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


def ended(pid):
    """Whether a process has ended, or does so soon: the kernel ends it after its parent."""
    for _ in range(200):
        if not is_running(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_no_process_outlives_the_functions(error):
    with contextlib.suppress(*([error] if error else [])), functions_of("length") as functions:
        score(functions)
        pids = processes_of(functions)
        assert pids and all(map(is_running, pids))
        if error:
            raise error
    assert not any(map(is_running, pids))


def test_processes_that_a_late_function_started_end_with_it(tmp_path):
    with functions_of("starts_processes", workers=1, timeout_seconds=15.0) as functions:
        scores = score(functions, columns={"folder": [str(tmp_path)] * 4})
    assert scores.timeouts == {"starts_processes": 4} and np.isnan(scores.total).all()
    assert ended(int((tmp_path / "own").read_text())) and ended(int((tmp_path / "tested").read_text()))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_hanging_function_does_not_outlive_a_killed_run(end):
    program = (
        "import signal; from jaxft.rollouts.reward_functions import RewardFunctions\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        f"functions = RewardFunctions('{CASES}:hangs_on_b', workers=1)\n"
        "functions.check([])\n"
        "print(functions._pool._workers[0].process.pid, flush=True)\n"
        "functions.score(['p'], ['b'], [[1]], {})\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
    pid = int(run.stdout.readline())
    run.send_signal(end)
    run.wait()
    assert ended(pid)
