"""The check of a GPU in its smoke form: its measurements, its kernels, and what it says of cases that fail."""

import importlib
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import pytest

from jaxft.hardware.topology import parse
from jaxft.planning import process
from jaxft.planning.shapes import length_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLAN = {
    "tokens_per_second": 200.0, "step_seconds": 0.5, "peak_bytes": 2**30, "mfu": 0.4, "remat": "full",
    "topology": "h100:1",
}  # fmt: skip
MEASURED = {
    "packed": True, "remat": "dots", "tokens_per_second": 100.0, "step_seconds": 1.0, "host_wait": 0.01,
    "compile_seconds": 12.0, "peak_bytes": 2**31,
}  # fmt: skip


def imported(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def plan_here(config: Any, topology: str) -> dict[str, Any]:
    """`jaxft.plan` in this process."""
    return process.plan(config, parse(topology), level="O1", prices=None, length=length_of(config))


def test_training_is_measured_packed_and_not(monkeypatch, tmp_path):
    cases = imported(monkeypatch, "gpu_cases")
    monkeypatch.setattr(cases.jaxft, "plan", plan_here)
    results: list[dict[str, Any]] = []
    cases.run_case("lora", tmp_path, results.append, smoke=True)
    packed, plain = (one["measured"] for one in results if "measured" in one)
    (plan,) = (one["plan"] for one in results if "plan" in one)
    assert (packed["packed"], plain["packed"]) == (True, False)
    # The second set is trained by the compiled step of the first one.
    assert plain["compile_seconds"] < packed["compile_seconds"] / 4
    for one in (packed, plain):
        assert 0 <= one["host_wait"] <= 1 and one["remat"] == "dots"
        assert math.log(512) - 0.5 < one["loss"] < math.log(512) + 0.5
    assert plan["topology"] == cases.SMOKE_PLAN and 0 < plan["mfu"] < 1
    json.dumps(results, allow_nan=False)


@pytest.mark.slow
def test_a_drawn_model_is_that_of_the_config(monkeypatch, tmp_path):
    cases = imported(monkeypatch, "gpu_cases")
    config = cases.config_of(cases.CASES["qlora"], tmp_path, smoke=True)
    abstract = cases.abstract_model(config)
    model = cases.drawn_model(config, cases.make_mesh(config, abstract, cases.jax.devices()))
    ours, theirs = (cases.nnx.state(one) for one in (model, abstract))
    assert cases.jax.tree.map(jnp.shape, ours) == cases.jax.tree.map(jnp.shape, theirs)
    assert cases.jax.tree.map(jnp.result_type, ours) == cases.jax.tree.map(jnp.result_type, theirs)


def test_every_kernel_is_within_its_bound(monkeypatch):
    kernels = imported(monkeypatch, "gpu_kernels")
    compared = [kernels.compared(kernel) for kernel in kernels.kernels(smoke=True)]
    assert [one["kernel"] for one in compared if not one["ok"]] == []
    assert {one["kernel"].split()[0] for one in compared} == {"attention,", "products"}


@pytest.mark.parametrize("wrong", [lambda x: x * 1.02, lambda x: x * jnp.nan])
def test_a_kernel_that_is_wrong_is_told(monkeypatch, wrong):
    kernels = imported(monkeypatch, "gpu_kernels")
    x = jnp.ones((4, 4), jnp.bfloat16)
    kernel = kernels.Kernel(name="one", form=wrong, reference=lambda x: x, operands=(x,), fixed=())
    assert not kernels.compared(kernel)["ok"]


def scripted(lines: list[dict[str, Any]], then: str = "") -> str:
    """A program that writes results to the file of its first argument, and then goes on."""
    text = "".join(json.dumps(one) + "\n" for one in lines)
    return f"import sys, time; open(sys.argv[1], 'w').write({text!r}); {then}"


def test_a_case_that_fails_or_hangs_loses_no_other(monkeypatch, tmp_path, capsys):
    check = imported(monkeypatch, "gpu_check")
    wrong = {"kernel": "products", "error": 0.5, "bound": 0.01, "ok": False, "seconds": 0.001}
    programs = {
        "full": scripted([], "time.sleep(100)"),
        "kernels": scripted([{"device": "NVIDIA H100", "jax": "1"}, {"kernel": wrong}]),
        "lora": scripted([{"measured": MEASURED}, {"plan": PLAN}]),
        "qlora": scripted([{"measured": MEASURED}], "raise MemoryError('out of memory')"),
        "dpo": scripted([{"measured": MEASURED}, {"plan": {"error": "no such chip"}}]),
    }
    monkeypatch.setattr(check, "BUDGETS", dict.fromkeys(programs, 120) | {"full": 1})
    monkeypatch.setattr(
        check, "command_of", lambda name, into, smoke: [sys.executable, "-c", programs[name], str(into)]
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", f"--out={tmp_path}"])
    assert check.main() == 1
    text = (tmp_path / "gpu_check.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    lines = text.splitlines()
    row = "| lora | packed | 100 | 200 | 1.0000 | 0.5000 | 20.0% | 40.0% | 2.00 | 1.00 | 1.0% | 12 | dots | full |"
    assert row in lines
    assert sum(line.startswith("| qlora |") for line in lines) == 2  # what it measured, and that it failed
    assert "| products | 0.5000 | 0.01 | 1.00 |" in lines
    failed = json.loads((tmp_path / "gpu_check.json").read_text())["failed"]
    assert [line.partition(":")[0] for line in failed] == ["full", "products", "qlora", "dpo"]
    assert "its budget" in failed[0] and "out of memory" in failed[2] and "no such chip" in failed[3]
    assert all(f"- {line}" in lines for line in failed)


def test_without_a_failure_it_ends_well(monkeypatch, tmp_path):
    check = imported(monkeypatch, "gpu_check")
    program = scripted([{"measured": MEASURED | {"peak_bytes": None}}, {"plan": PLAN}])
    monkeypatch.setattr(check, "command_of", lambda name, into, smoke: [sys.executable, "-c", program, str(into)])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", f"--out={tmp_path}", "--cases=lora", "--smoke"])
    assert check.main() == 0
    assert "Failed" not in (tmp_path / "gpu_check.md").read_text()


def test_its_budgets_are_less_than_eight_minutes(monkeypatch):
    check, cases = imported(monkeypatch, "gpu_check"), imported(monkeypatch, "gpu_cases")
    assert sum(check.BUDGETS.values()) < 480
    assert set(check.BUDGETS) == {"kernels", *cases.CASES}


@pytest.mark.slow
def test_every_case_runs_in_its_smoke_form(monkeypatch, tmp_path):
    check = imported(monkeypatch, "gpu_check")
    results = partial(check.check, list(check.BUDGETS), smoke=True)()
    assert results["failed"] == []
