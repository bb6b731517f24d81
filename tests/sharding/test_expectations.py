"""What a run expects at its start, and a worker of a slice that would train alone on its CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.errors import ConfigError, PeerLostError
from jaxft.sharding import distributed, expectations
from jaxft.sharding.expectations import Expected, check_platform, check_processes, refuse_lonely_worker

ROOT = Path(__file__).parents[2]
WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_LIBRARY_PATH", "JAX_PLATFORMS")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no workers, on a machine without TPU chips and without libtpu."""
    for name in WORKERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(expectations.importlib.util, "find_spec", lambda name: None)
    chips(monkeypatch, 0)
    return monkeypatch


def chips(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    hardware = expectations.hardware_utils
    monkeypatch.setattr(hardware, "num_available_tpu_chips_and_device_id", lambda: (count, None))


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_processes_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"2 processes are expected, and this run has {count}"):
        check_processes(Expected(processes=2), count)
    with pytest.raises(ConfigError, match="1 process is expected, and this run has 2: --num_processes"):
        check_processes(Expected(processes=1), 2)


def test_what_is_expected_passes() -> None:
    check_processes(Expected(processes=3), 3)
    check_processes(Expected(), 7)
    check_platform(Expected(platform="cpu"), 0, 1)
    check_platform(Expected(), 0, 1)


def test_expectations_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="expect_processes=0: a run has at least one process"):
        check_processes(Expected(processes=0), 1)
    with pytest.raises(ConfigError, match="expect_platform='tpus': write one of tpu, gpu, cpu"):
        check_processes(Expected(platform="tpus"), 1)


@pytest.mark.parametrize(
    ("platform", "libtpu", "mend"),
    [
        ("tpu", False, r"libtpu is not installed: run pip install 'jaxft\[tpu\]'"),
        ("tpu", True, r"This machine shows no TPU chip: use a host of a slice"),
        ("tpu", True, r"pip install 'jaxft\[tpu\]'; a plugin of another version than jaxlib is not used"),
        ("gpu", False, r"pip install 'jaxft\[cuda\]'; a plugin of another version than jaxlib is not used"),
    ],
)
def test_another_platform_is_refused_with_the_mend(
    bare: pytest.MonkeyPatch, platform: str, libtpu: bool, mend: str
) -> None:
    if libtpu:
        bare.setattr(expectations.importlib.util, "find_spec", lambda name: object())
        chips(bare, 4 if mend.startswith("pip") else 0)
    with pytest.raises(ConfigError, match=f"the platform {platform} is expected, and JAX uses cpu.*{mend}"):
        check_platform(Expected(platform=platform), 0, 1)


def test_a_platform_that_the_environment_excludes_is_named(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ConfigError, match="JAX_PLATFORMS=cpu keeps JAX from it: unset it"):
        check_platform(Expected(platform="tpu"), 0, 1)


def test_all_of_several_processes_are_told_the_same(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(expectations, "exchange", lambda key, mine, me, count: ["tpu", "cpu", "tpu", "none (no driver)"])
    messages = set()
    for me in range(4):
        with pytest.raises(ConfigError, match="JAX uses cpu, none .no driver. in processes 1, 3 of 4") as error:
            check_platform(Expected(platform="tpu"), me, 4)
        messages.add(str(error.value))
        with pytest.raises(ConfigError, match="different devices: process 0 tpu, process 1 cpu, process 2 tpu"):
            check_platform(Expected(), me, 4)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "TPU_WORKER_HOSTNAMES",
            "host-0,host-1",
            "TPU_WORKER_HOSTNAMES names 2 hosts, but JAX sees this process alone",
        ),
        ("TPU_PROCESS_ADDRESSES", "a:1,b:1,c:1", "TPU_PROCESS_ADDRESSES names 3 hosts"),
        ("MEGASCALE_NUM_SLICES", "2", "MEGASCALE_NUM_SLICES is 2"),
    ],
)
def test_a_worker_that_would_train_alone_is_refused(
    bare: pytest.MonkeyPatch, name: str, value: str, match: str
) -> None:
    bare.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{match}.*libtpu is not installed here.*unset {name}"):
        refuse_lonely_worker()
    bare.setattr(expectations.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="this machine has no TPU chip"):
        refuse_lonely_worker()
    bare.setenv(name, "1" if name == "MEGASCALE_NUM_SLICES" else "localhost")
    refuse_lonely_worker()


def test_chips_that_would_lie_idle_are_a_reason_to_refuse(bare: pytest.MonkeyPatch) -> None:
    chips(bare, 4)
    with pytest.raises(ConfigError, match="this machine has 4 TPU chips, and libtpu is not installed"):
        refuse_lonely_worker()
    bare.setenv("JAX_PLATFORMS", "cpu")  # on purpose
    refuse_lonely_worker()


def trained(*options: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxft.cli", "train", "--config=configs/quickstart.py:smoke", *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_worker_without_libtpu_writes_nothing(tmp_path: Path) -> None:
    """Two of these would write one folder: the environment is that of a GKE pod on a machine without chips."""
    folder = tmp_path / "run"
    child = trained(f"--config.output_dir={folder}", TPU_WORKER_HOSTNAMES="host-0,host-1", TPU_WORKER_ID="0")
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 2 and "TPU_WORKER_HOSTNAMES names 2 hosts" in said and "Traceback" not in said
    assert not folder.exists()


@pytest.mark.slow
def test_two_processes_refuse_the_platform_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        trained(
            f"--config.output_dir={tmp_path / 'run'}", f"--coordinator=127.0.0.1:{port}", "--num_processes=2",
            f"--process_id={number}", "--expect_processes=2", "--expect_platform=tpu",
        )
        for number in range(2)
    ]  # fmt: skip
    said = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [2, 2], said
    assert all("JAX uses cpu in processes 0, 1 of 2" in one for one in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_of_which_three_are_expected_refuse_at_once(tmp_path: Path) -> None:
    children = [
        trained(
            f"--config.output_dir={tmp_path / 'run'}", "--coordinator=127.0.0.1:9", "--num_processes=2",
            f"--process_id={number}", "--expect_processes=3",
        )
        for number in range(2)
    ]  # fmt: skip
    said = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [2, 2], said
    assert all("3 processes are expected, and this run has 2" in one for one in said)
    assert not (tmp_path / "run").exists()


PORT = """
import json, sys
import jax
from jaxft.sharding import distributed
def checked(address, count, me, option):
    print(json.dumps([address, count, me]))
    sys.exit()
distributed._checked = checked
distributed.start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("given", "port"), [({}, "8476"), ({"JAX_COORDINATOR_PORT": "9000"}, "9000")])
def test_the_port_on_a_tpu_slice(given: dict[str, str], port: str) -> None:
    env = {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2", "TPU_WORKER_ID": "1"}
    env |= {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    child = subprocess.run(
        [sys.executable, "-c", PORT],
        cwd=ROOT,
        env=os.environ | env | given,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(child.stdout) == [f"127.0.0.1:{port}", 2, 1], child.stderr[-2000:]


def test_one_named_host_without_a_number_is_alone(bare: pytest.MonkeyPatch) -> None:
    """As on Kaggle, where JAX would ask for the address of a host named local, and for the number."""
    bare.delenv("TPU_WORKER_ID", raising=False)
    bare.setattr(distributed.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    asked = ("10.0.0.2:8476", 2, 1, None)
    bare.setattr(distributed.ClusterEnv, "auto_detect_unset_distributed_params", lambda *_: asked)
    bare.setenv("TPU_PROCESS_ADDRESSES", "local")
    assert distributed._group(None, None, None, 20) == (None, None)
    for name, value in (("TPU_PROCESS_ADDRESSES", "a,b"), ("TPU_WORKER_ID", "0"), ("MEGASCALE_NUM_SLICES", "2")):
        with bare.context() as more:
            more.setenv(name, value)
            group, _ = distributed._group(None, None, None, 20)
        assert group is not None and group.count == 2, name


def test_a_server_that_is_silent_for_a_moment_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """requests raises an OSError; JAX asks once."""
    silent, answers = [ConnectionResetError("reset"), TimeoutError("timed out")], ("10.0.0.2:8476", 2, 1, None)

    def detect(*_: object) -> tuple[str, int, int, None]:
        if silent:
            raise silent.pop()
        return answers

    monkeypatch.setattr(distributed.ClusterEnv, "auto_detect_unset_distributed_params", detect)
    monkeypatch.setattr(distributed, "DETECT_SECONDS", 0.01)
    group, _ = distributed._group(None, None, None, 20)
    assert group is not None and (group.address, group.count, group.me) == ("10.0.0.2:8476", 2, 1)
    silent += [ConnectionResetError("reset")] * 1000
    with pytest.raises(PeerLostError, match="about each other does not answer: reset. Start again, or give"):
        distributed._group(None, None, None, 0)
