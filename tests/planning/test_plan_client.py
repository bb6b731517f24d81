"""What becomes of a request whose planning process dies."""

import subprocess

import pytest

from jaxft.errors import ConfigError
from jaxft.hardware.gpu_compile import NO_COMPILER
from jaxft.planning import client

LOG = "W0000 noise\nF1130 16:08:31 alias.cc:135] Check failed: flattened\n"


@pytest.fixture
def processes(monkeypatch):
    """The environments of the processes that were started, of which those with a compiler die."""
    environments: list[dict[str, str]] = []

    def run(command, *, env, **_):
        environments.append(env)
        if NO_COMPILER in env:
            with open(command[-1], "w") as file:
                file.write('{"compiled": false, "unknown": ["the input pipeline"]}')
            return subprocess.CompletedProcess(command, 0, stderr="")
        return subprocess.CompletedProcess(command, -6, stderr=LOG)

    monkeypatch.setattr(subprocess, "run", run)
    return environments


def test_gpus_whose_compiler_dies_are_planned_by_arithmetic(processes):
    answer = client._answer({"topology": "h100:8"})
    assert answer["unknown"] == [
        "why the compiler for h100:8 died of signal 6: F1130 16:08:31 alias.cc:135] Check failed: flattened",
        "the input pipeline",
    ]
    assert [NO_COMPILER in environment for environment in processes] == [False, True]


def test_a_dead_compiler_for_tpus_is_an_error_with_the_tested_pairs(processes):
    with pytest.raises(ConfigError, match=r"for v5e:4x4 died of signal 6: F1130 .* tested: jax 0\.12"):
        client._answer({"topology": "v5e:4x4"})
    assert len(processes) == 1
