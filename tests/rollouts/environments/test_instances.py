"""Instances of environments in processes of their own: that each keeps its state, and what becomes of a run if they
fail."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.errors import ConfigError
from jaxft.rollouts.environments import environments as module
from jaxft.rollouts.environments.environments import EnvironmentFailure, Environments

CASES = Path(__file__).with_name("environment_cases.py")
ROWS = [{"points": points, "index": points, "prompt": "p"} for points in (1, 2, 3, 4)]
WHERE = [f"rows.jsonl:{number}" for number in range(1, 5)]


def of(name, **settings):
    return Environments(f"{CASES}:{name}", **({"workers": 2} | settings))


def test_each_instance_keeps_its_state_in_its_process():
    with of("Remembers") as ours:
        assert [one[0]["content"] for one in ours.reset(ROWS, WHERE)] == ["Say 1", "Say 2", "Say 3", "Say 4"]
        first = ours.step({i: f"first {i}" for i in range(4)})
        second = ours.step({i: f"second {i}" for i in (0, 1, 3)})
        pids = [first[i][0]["content"].split()[0] for i in range(4)]
        assert pids[0] == pids[2] != pids[1] == pids[3]
        assert {i: reply[0]["content"] for i, reply in second.items()} == {
            i: f"{pids[i]} first {i}|second {i}" for i in (0, 1, 3)
        }
        assert ours.rewards(range(4)) == {0: (2.0, False), 1: (1.0, False), 2: (1 / 3, False), 3: (0.5, False)}
        # Another rollout starts anew.
        ours.reset(ROWS[:1], WHERE[:1])
        assert ours.step({0: "third"})[0][0]["content"].endswith(" third")


@pytest.mark.parametrize("name", ["HangsOnB", "DiesOnB"])
def test_instances_of_a_process_that_hangs_or_dies_are_lost_and_another_takes_its_place(name):
    with of(name, timeout_seconds=2.0) as ours:
        ours.reset(ROWS, WHERE)
        replies = ours.step({0: "a", 1: "b", 2: "a", 3: "a"})
        assert replies[1] is None and replies[3] is None  # of the same process
        assert replies[0] == replies[2] == ({"role": "tool", "content": "1 letters"},)
        assert ours.step({0: "a", 3: "a"})[3] is None
        assert ours.rewards(range(4)) == {0: (2.0, False), 1: (None, True), 2: (1 / 3, False), 3: (None, True)}
        ours.reset(ROWS, WHERE)
        assert all(ours.step(dict.fromkeys(range(4), "a")).values())


def test_a_process_that_dies_in_reset_is_replaced_once_with_all_of_its_instances(tmp_path):
    rows = [{**row, "mark": str(tmp_path / "mark")} for row in ROWS]
    with of("DiesOnceInReset", workers=1) as ours:
        assert len(ours.reset(rows, WHERE)) == 4
        assert all(ours.step(dict.fromkeys(range(4), "a")).values())
    with of("DiesInReset") as ours, pytest.raises(EnvironmentFailure, match=r"rows.jsonl:2: the process .*exit code 7"):
        ours.reset(ROWS, WHERE)
    with of("HangsInReset", timeout_seconds=1.0) as ours, pytest.raises(EnvironmentFailure, match="took longer than"):
        ours.reset(ROWS[:1], WHERE[:1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RaisesOnB", r"rows.jsonl:2: the environment RaisesOnB .* raised in step\(\)(.|\n)*KeyError: 'no such thing'"),
        ("Text", r"Text of .* returned 'a reply' from step\(\). It must return a list of messages"),
        ("Objects", r"Objects of .* returned \[<object object"),
        ("NoContent", r"NoContent of .*'text': 'a reply'.* a dict with role and content, both text"),
        ("Assistant", r"Assistant of .* message of role 'assistant' from step\(\)"),
    ],
)
def test_what_step_does_wrong_stops_the_run_and_is_named(name, message):
    with of(name) as ours:
        ours.reset(ROWS, WHERE)
        with pytest.raises(EnvironmentFailure, match=message):
            ours.step({0: "a", 1: "b"})


@pytest.mark.parametrize(
    ("name", "message"),
    [("NotANumber", "NotANumber of .* returned nan from reward"), ("Word", "Word of .* returned 'good' from reward")],
)
def test_a_reward_is_a_finite_number_or_none(name, message):
    with of(name) as ours:
        ours.reset(ROWS[:1], WHERE[:1])
        with pytest.raises(EnvironmentFailure, match=message):
            ours.rewards([0])
    with of("Unscored") as ours:
        ours.reset(ROWS[:1], WHERE[:1])
        assert ours.rewards([0]) == {0: (None, False)}


@pytest.mark.parametrize(
    ("name", "columns", "error", "message"),
    [
        ("Echo", ["point"], ConfigError, "needs 'points', .* they have point. Did you mean"),
        ("Ecko", ["points"], ConfigError, "has no class 'Ecko'; it has (.|\n)*Echo"),
        ("not_a_class", ["points"], ConfigError, "has no class 'not_a_class'"),
        ("NoReward", ["points"], ConfigError, r"has no method reward: an environment has reset\(row\)"),
        ("EmptyReset", ["points"], EnvironmentFailure, r"rows.jsonl:1: .* returned no message from reset\(\)"),
        ("AnswersItself", ["points"], EnvironmentFailure, "messages that end in one of the assistant"),
    ],
)
def test_a_class_is_checked_before_the_first_step(name, columns, error, message):
    with of(name) as ours, pytest.raises(error, match=message):
        ours.check(columns, ROWS[0], WHERE[0])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("calculater", "not a built-in environment .*Did you mean 'calculator'"),
        ("nowhere.py:Echo", "there is no file 'nowhere.py'"),
    ],
)
def test_an_environment_that_is_not_there_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        Environments(environment)


def test_processes_of_a_run_share_what_each_instance_returned(monkeypatch):
    monkeypatch.setattr(module, "process_share", lambda count: range(count // 2, count))
    monkeypatch.setattr(
        module, "gather", lambda own: [[[[0, None], [1, [{"role": "user", "content": "x"}]]], None], own]
    )
    with of("Echo") as ours:
        ours._where = WHERE
        replies = ours.step(dict.fromkeys(range(4), "a"))
        # Those of this process were never reset, so that they are lost; the others came from the other process.
        assert replies == {0: None, 1: ({"role": "user", "content": "x"},), 2: None, 3: None}
        monkeypatch.setattr(module, "gather", lambda own: [[[], "the other one failed"], own])
        with pytest.raises(EnvironmentFailure, match="the other one failed"):
            ours.step(dict.fromkeys(range(4), "a"))


def test_dice_fall_alike_in_all_processes_of_a_run():
    """Two real ones: each has two of the four instances, and both have all rewards."""
    program = (
        "import sys; from jaxft.sharding import distributed\n"
        "distributed.start(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]))\n"
        "from jaxft.rollouts.environments.environments import Environments\n"
        f"with Environments('{CASES}:Dice', workers=1) as ours:\n"
        "    ours.reset([{'points': 1}] * 4, ['row'] * 4)\n"
        "    print([x for x, _ in ours.rewards(range(4)).values()], flush=True)\n"
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
