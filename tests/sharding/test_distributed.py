"""jax.distributed starts once, before any device is used, with one process or several."""

import os
import socket
import subprocess
import sys

import jax
import pytest

import jaxft.errors
from jaxft.errors import ConfigError
from jaxft.sharding import distributed


def run(code, *args, **env):
    root = os.path.dirname(os.path.dirname(jaxft.errors.__file__))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **env}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(child):
    try:
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0, err[-2000:]
    return out.split(), err


def test_one_process_starts_once_quietly_and_despite_a_proxy():
    code = """
import jax
from jaxft.sharding.distributed import start
print(start(), start(heartbeat_seconds=5), jax.process_count(), jax.distributed.is_initialized())
"""
    out, err = result(run(code, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9"))
    assert out == ["True", "False", "1", "True"]
    assert err == ""


def test_two_processes_find_each_other():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = """
import sys, jax
from jaxft.sharding.distributed import start
start(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
print(jax.process_count(), jax.process_index(), len(jax.devices()))
"""
    # Two hosts may reach each other directly only, whatever the way out of their network is.
    children = [run(code, port, index, http_proxy="http://127.0.0.1:9") for index in range(2)]
    assert [result(child)[0] for child in children] == [["2", "0", "2"], ["2", "1", "2"]]


def test_without_a_start_preemption_is_never_reported():
    if jax.distributed.is_initialized():
        pytest.skip("jax.distributed runs in this process")
    assert not distributed.reached_preemption()


def test_starting_after_a_device_was_used_is_refused():
    jax.devices()
    if jax.distributed.is_initialized():
        pytest.skip("jax.distributed runs in this process")
    with pytest.raises(ConfigError, match="must start before JAX touches a device"):
        distributed.start()


def test_half_an_address_is_refused():
    if jax.distributed.is_initialized():
        pytest.skip("jax.distributed runs in this process")
    with pytest.raises(ConfigError, match="give all of coordinator='a:1', num_processes=None"):
        distributed.start("a:1")


def test_no_time_for_a_heartbeat_is_refused():
    if jax.distributed.is_initialized():
        pytest.skip("jax.distributed runs in this process")
    with pytest.raises(ConfigError, match="heartbeat_seconds=0: give a whole number"):
        distributed.start(heartbeat_seconds=0)
