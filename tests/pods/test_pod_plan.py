"""What is said and refused before a run costs money."""

import dataclasses
import shlex

import pytest

from jaxft import cli
from jaxft.config import load
from jaxft.errors import ConfigError
from jaxft.pods import plan
from jaxft.pods.request import Request

OVERRIDES = ("checkpoint.every=2", "output_dir=my runs/one")
REQUEST = Request(
    name="run-1", topology="v6e:2x4", zones=("us-east5-b",), to="gs://bucket/run-1", max_hours=4.0,
    config="configs/quickstart.py:smoke", overrides=OVERRIDES,
)  # fmt: skip
PLAN = {
    "fits": True, "refused": None, "hbm_peak_bytes": 2**30, "hbm_limit_bytes": 2**34, "step_seconds": 0.5, "steps": 10,
    "hours": 2.0,
}  # fmt: skip


@pytest.fixture
def config():
    return load(REQUEST.config, REQUEST.overrides)


@pytest.fixture
def planned(monkeypatch):
    """Answers with the plan of `planned.update(...)`, and keeps what was requested."""
    answer, calls = dict(PLAN), []

    def answered(config, topology, **options):
        calls.append((topology, options))
        return answer

    monkeypatch.setattr(plan, "plan", answered)
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: object())
    answer["calls"] = calls
    return answer


def test_a_run_that_fits_is_described_with_its_worst_case(config, planned):
    lines = []
    plan.check(dataclasses.replace(REQUEST, slices=2, to="gs://bucket/r"), config, lines.append)
    assert planned["calls"] == [("v6e:2x4", {"slices": 2, "prices": None})]
    assert "1.00 of 16.00 GiB a device, 0.50 s a step, 10 steps in 2.00 h" in lines[1] and "finish" not in lines[1]
    assert lines[-1].startswith("at most 4.0 h, USD 172.80 (16 v6e x 2.70), by prices of")


def test_more_steps_than_hours_are_told(config, planned):
    planned["hours"], lines = 5.0, []
    plan.check(REQUEST, config, lines.append)
    assert "more than --max_hours=4, so raise it" in lines[1]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ({"fits": False, "hbm_peak_bytes": 2**35}, r"does not fit v6e:2x4 \(8 chips\): it needs 32.00 GiB of .* 16.00"),
        ({"fits": False, "refused": "no program"}, "no program. See jaxft plan --config=configs/quickstart.py:smoke"),
        ({"fits": False, "changes": [{"paste": "--config.model.remat=full"}]}, "Add --config.model.remat=full$"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_mend(config, planned, answer, match):
    planned.update(answer)
    with pytest.raises(ConfigError, match=match):
        plan.check(REQUEST, config, lambda line: None)


def test_without_libtpu_there_is_a_mend_that_works(config, planned, monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu is not installed. .*'jaxft\[plan\]'.*--skip_plan"):
        plan.check(REQUEST, config, lambda line: None)
    plan.check(dataclasses.replace(REQUEST, skip_plan=True), config, lambda line: None)
    assert not planned["calls"]


def test_cost_and_lost_work_are_refused_before_anything_is_compiled(config, planned):
    with pytest.raises(ConfigError, match="--max_usd=1"):
        plan.check(dataclasses.replace(REQUEST, max_usd=1.0), config, lambda line: None)
    lost = load(REQUEST.config, ["checkpoint.every=None"])
    with pytest.raises(ConfigError, match=r"checkpoint\.every"):
        plan.check(dataclasses.replace(REQUEST, spot=True), lost, lambda line: None)
    assert not planned["calls"]


def test_a_dry_run_names_a_command_that_is_understood(config, planned, monkeypatch):
    lines = []
    plan.check(dataclasses.replace(REQUEST, dry_run=True), config, lines.append)
    assert not planned["calls"]
    command = shlex.split(lines[0].partition("? ")[2])
    seen = []
    monkeypatch.setattr("jaxft.planning.client.plan", lambda config, topology, **options: seen.append(config) or PLAN)
    assert cli.main([*command[1:], "--json"]) == 0
    assert seen == [config]


@pytest.mark.slow
def test_the_plan_is_the_one_of_jaxft_plan(config):
    pytest.importorskip("libtpu")
    lines = []
    plan.check(dataclasses.replace(REQUEST, topology="v6e:1x1"), config, lines.append)
    assert "it fits: " in lines[1] and "4 steps" in lines[1]
