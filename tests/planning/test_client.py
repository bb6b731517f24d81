"""What a plan says of the jax and libtpu that it is made with."""

import importlib.metadata
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxft import config
from jaxft.errors import ConfigError
from jaxft.hardware import compile
from jaxft.hardware.costs import Costs
from jaxft.planning import client, result

ROOT = Path(__file__).parents[2]
PAIR = "jax 0.12.0.1 with libtpu 0.0.52"
DIED = "E0000 something\nF0000 offload.cc:316] Check failed: count < 2\n"


def installed(monkeypatch, **versions):
    real = importlib.metadata.version

    def version(name):
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("jax", "libtpu", "known"),
    [("0.12.0.1", "0.0.52", True), ("0.10.2", "0.0.52", False), ("0.13.0", "0.0.60", False), ("0.12.0.1", None, False)],
)
def test_a_pair_is_known_or_not_and_the_tested_one_is_named(jax, libtpu, known, monkeypatch):
    installed(monkeypatch, jax=jax, libtpu=libtpu)
    said, tested = compile.pairing()
    assert tested is known
    assert said.startswith(f"this is jax {jax} with libtpu {libtpu}; ") and PAIR in said


@pytest.mark.parametrize(
    ("compiled", "libtpu", "warned"), [(True, "1", True), (True, "0.0.52", False), (False, "1", False)]
)
def test_a_plan_lists_an_untested_pair_under_what_it_does_not_know(compiled, libtpu, warned, monkeypatch):
    installed(monkeypatch, jax="0.12.0.1", libtpu=libtpu)
    update = SimpleNamespace(costs=Costs(), compiled=compiled)
    step = SimpleNamespace(
        config=config.RunConfig(), topology=SimpleNamespace(chip=SimpleNamespace(name="v5e", maker="tpu"))
    )
    unknown = result._unknown(step, SimpleNamespace(update=update, rollout=None))
    assert any(f"this is jax 0.12.0.1 with libtpu {libtpu}; " in line for line in unknown) is warned


@pytest.mark.parametrize(("code", "error"), [(-signal.SIGABRT, ConfigError), (1, RuntimeError)])
def test_a_plan_that_ends_without_a_result_names_the_tested_pair(code, error, monkeypatch):
    installed(monkeypatch, jax="0.10.2", libtpu="0.0.52")
    ended = subprocess.CompletedProcess([], code, stderr=DIED)
    monkeypatch.setattr(client.subprocess, "run", lambda *args, **options: ended)
    run = config.load(str(ROOT / "configs" / "llama3_1_8b_lora.py"))
    with pytest.raises(error, match=rf"jax 0\.10\.2 with libtpu 0\.0\.52; .*{re.escape(PAIR)}") as raised:
        client.plan(run, "v5p-8")
    assert "Check failed: count < 2" in str(raised.value)


def test_the_page_and_the_constraints_name_tested_pairs():
    page = " ".join((ROOT / "docs" / "plan.md").read_text(encoding="utf-8").split())
    for pair in compile.TESTED:
        assert "jax {} with libtpu {}".format(*pair) in page
    for file in (ROOT / "constraints").glob("*.txt"):
        pins = dict(line.split("==") for line in file.read_text(encoding="utf-8").split())
        assert (pins["jax"], pins["libtpu"]) in compile.TESTED, f"{file.name}: plan with this pair, then enter it"
