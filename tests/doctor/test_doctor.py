"""`jaxft doctor` on machines that are made up: versions, chips and who holds them, slices, disks, buckets."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from jaxft import cli
from jaxft.doctor import cluster, devices, examine, machine, storage, versions
from jaxft.doctor.part import Part
from jaxft.errors import ExitCode

PAIR = {"jax": "0.10.2", "jaxlib": "0.10.2"}


def by_name(parts: list[Part]) -> dict[str, Part]:
    return {part.name: part for part in parts}


@pytest.mark.parametrize(
    ("present", "part", "mend"),
    [
        (PAIR, "jax", None),
        (PAIR | {"jaxlib": "0.10.1"}, "jax", "pip install 'jax==0.10.2' 'jaxlib==0.10.2'"),
        ({"jax": "0.10.2"}, "jax", "pip install jaxft"),
        (PAIR | {"jax-cuda12-plugin": "0.10.2"}, "jax-cuda12-plugin", None),
        (PAIR | {"jax-cuda12-plugin": "0.10.2.post1"}, "jax-cuda12-plugin", None),
        (PAIR | {"jax-cuda12-plugin": "0.7.2"}, "jax-cuda12-plugin", r"pip install 'jax[cuda12]==0.10.2'"),
        (PAIR | {"jax-cuda13-plugin": "0.10.20"}, "jax-cuda13-plugin", r"pip install 'jax[cuda13]==0.10.2'"),
    ],
)
def test_versions_that_do_not_fit_have_a_pip_command(present: dict[str, str], part: str, mend: str | None) -> None:
    one = by_name(versions.examine(present.get))[part]
    assert one.is_sound == (mend is None)
    assert mend is None or mend in str(one.mend)


def test_a_plugin_that_jax_would_ignore_is_the_one_that_jaxlib_ignores() -> None:
    """Our rule is jaxlib's own."""
    from jaxlib import plugin_support

    for plugin in ("0.10.2", "0.10.2.post1", "0.10.20", "0.10", "0.10.2rc1", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugin_support.warnings, "warn", lambda *_: None)
            used = plugin_support.check_plugin_version("jax_cuda12_plugin", "0.10.2", plugin)
        present = PAIR | {"jax-cuda12-plugin": plugin}
        assert by_name(versions.examine(present.get))["jax-cuda12-plugin"].is_sound == used, plugin


def test_libtpu_matters_where_there_are_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.libtpu(0, PAIR.get).is_sound
    assert "pip install 'jax[tpu]==0.10.2'" in str(versions.libtpu(4, PAIR.get).mend)
    monkeypatch.setattr(versions.metadata, "requires", lambda _: ["numpy", 'libtpu==0.0.42.*; extra == "tpu"'])
    assert versions.libtpu(4, (PAIR | {"libtpu": "0.0.42.1"}).get).is_sound
    other = versions.libtpu(4, (PAIR | {"libtpu": "0.0.52"}).get)
    assert "released with libtpu==0.0.42.*, and 0.0.52" in other.text and not other.is_sound


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with four TPU chips that nobody holds."""
    for name in ("dev/vfio", "proc", "tmp", "sys/fs/cgroup"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("0", "1", "2", "3", "vfio"):  # the last one is the driver's own
        (tmp_path / "dev/vfio" / name).touch()
    monkeypatch.setattr(machine.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, None))
    return tmp_path


def process(host: Path, pid: int, program: str, *files: str) -> None:
    """A process with these open files, whose arguments hold a secret."""
    folder = host / "proc" / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "comm").write_text(f"{program}\n")
    (folder / "cmdline").write_text("python\0--token=hf_secret\0")
    for number, file in enumerate(files):
        (folder / "fd" / str(number)).symlink_to(file)


def test_free_chips_are_sound(host: Path) -> None:
    process(host, 12, "bash", "/dev/null", "/dev/vfio/vfio")
    part, held = machine.examine_tpu(host)
    assert part.is_sound and held == [] and "4 chips, /dev/vfio/0" in part.text
    assert part.value["files"] == [f"/dev/vfio/{n}" for n in range(4)]


def test_who_holds_the_chips_is_named_without_arguments(host: Path) -> None:
    process(host, 4321, "python3", "/dev/null", "/dev/vfio/2", "/dev/vfio/3")
    part, held = machine.examine_tpu(host)
    assert [one.pid for one in held] == [4321] and "held by process 4321 (python3)" in part.text
    assert "kill 4321" in str(part.mend)
    assert "hf_secret" not in json.dumps(part.to_json())


def test_a_process_that_really_holds_a_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "accel0"
    file.touch()
    with file.open():
        held, _ = machine.holders([str(file)])
    assert [one.pid for one in held] == [os.getpid()]


def test_chips_that_a_container_does_not_get_are_told(host: Path) -> None:
    for one in (host / "dev/vfio").iterdir():
        one.unlink()
    part, _ = machine.examine_tpu(host)
    assert "no file of them in /dev" in part.text and "google.com/tpu" in str(part.mend)


def test_a_lock_file_of_another_user_is_told(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / machine.LOCK_FILE).touch()
    assert machine.examine_tpu(host)[0].is_sound  # our own
    monkeypatch.setattr(machine.os, "getuid", lambda: 4711)
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "sudo rm /tmp/libtpu_lockfile" in str(machine.examine_tpu(host)[0].mend)


SMI = """#!/bin/sh
case "$1" in
  *compute-apps*) echo '77, python' ;;
  *) echo 'NVIDIA L4, 23034 MiB, 10 MiB' ;;
esac
"""


def program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


def test_gpus_and_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program(tmp_path, "nvidia-smi", SMI)
    part = machine.examine_gpu()
    assert part is not None and part.is_sound
    assert part.value == {"gpus": ["NVIDIA L4"], "held_by": [77]}
    program(tmp_path, "nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML' >&2\nexit 9\n")
    part = machine.examine_gpu()
    assert part is not None and "Failed to initialize NVML" in part.text and not part.is_sound


def test_memory_and_the_limit_of_a_container(host: Path) -> None:
    (host / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 2097152 kB\n")
    assert machine.examine_memory(host).text == "2.0 of 8.0 GiB free"
    (host / "sys/fs/cgroup/memory.max").write_text("4294967296\n")
    part = machine.examine_memory(host)
    assert part.text.endswith("this container may use 4.0 GiB") and part.value["limit_bytes"] == 2**32


def look(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(devices, "LOOK", code)


def test_a_start_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    look(
        monkeypatch,
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)",
    )
    part = devices.examine(2.0)
    assert "did not start within 2 s" in part.text and "on all hosts at the same time" in str(part.mend)
    until = time.monotonic() + 10
    while any(map(lives, pids.read_text().split())):
        assert time.monotonic() < until
        time.sleep(0.05)


def lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_host_of_a_slice_that_waits_for_the_others_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, "import time; time.sleep(600)")
    part = devices.examine(0.5, hosts=4)
    assert part.is_sound and "one of 4 hosts of a slice" in part.text


SEEN = """
print("a library says something")
print('{"platform": "%s", "devices": 8, "local_devices": 4, "processes": 1, "kinds": {"TPU v6 lite": 8}}')
"""


def test_accelerators_that_jax_does_not_use_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, SEEN % "tpu")
    part = devices.examine(20, chips=4)
    assert part.is_sound and part.text == "tpu: 8 x TPU v6 lite, of which 4 are here"
    monkeypatch.setattr(devices, "_look", lambda _: {"platform": "cpu", "devices": 1, "local_devices": 1, "kinds": {}})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert "pip install 'jaxft[tpu]'" in str(devices.examine(chips=4).mend)
    assert "pip install 'jaxft[cuda]'" in str(devices.examine(gpus=1).mend)
    assert devices.examine().is_sound
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu keeps JAX from the 4 TPU chips" in str(devices.examine(chips=4).mend)


def test_a_jax_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, "raise ImportError('libtpu.so: undefined symbol')")
    part = devices.examine(20)
    assert "undefined symbol" in part.text and not part.is_sound


def test_variables_that_contradict_each_other() -> None:
    here = Path("/nonexistent")
    (variables, metadata), hosts = cluster.examine({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, here)
    assert variables.is_sound and hosts == 2 and metadata.text == "this is no machine of Google Cloud"
    for worker in ({}, {"TPU_WORKER_ID": "2"}, {"TPU_WORKER_ID": "-1"}):
        (variables, _), _ = cluster.examine({"TPU_WORKER_HOSTNAMES": "a,b"} | worker, here)
        assert "from 0 to 1" in str(variables.mend)
    (variables, _), hosts = cluster.examine({"TPU_PROCESS_ADDRESSES": "local"}, here)
    assert variables.is_sound and hosts == 1
    (variables, _), _ = cluster.examine({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_ID": "1"}, here)
    assert "from 0 to 0" in str(variables.mend)
    (variables, _), _ = cluster.examine({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "2"}, here)
    assert "there are 2 slices, and MEGASCALE_SLICE_ID is 2" in variables.text and not variables.is_sound


class Metadata(BaseHTTPRequestHandler):
    """Google's metadata server for worker 1 of 2."""

    failing = False
    values = {"agent-worker-number": "1", "worker-network-endpoints": "unknown:1:10.0.0.2,unknown:1:10.0.0.3"}

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        known = name in self.values and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(503 if self.failing else 200 if known else 404)
        self.end_headers()
        if known and not self.failing:
            self.wfile.write(self.values[name].encode())

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server() -> Iterator[dict[str, str]]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


def test_the_metadata_server_names_the_hosts(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (_, metadata), hosts = cluster.examine(server)
    assert hosts == 2 and metadata.value["agent-worker-number"] == "1" and metadata.is_sound
    monkeypatch.setattr(Metadata, "failing", True)
    (_, metadata), hosts = cluster.examine(server)
    assert hosts == 1 and "does not answer" in metadata.text and "--coordinator" in str(metadata.mend)


def test_a_folder_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    output, disk = storage.examine_output(str(tmp_path / "a" / "run"))
    assert output.is_sound and "will be created below" in output.text and disk.value["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that cannot be written")
def test_a_folder_that_cannot_be_written_has_a_mend() -> None:
    output, *_ = storage.examine_output("/proc/run")
    assert not output.is_sound and "/proc" in str(output.mend)


def test_a_full_disk_has_a_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = storage.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage)
    assert "Make room: a run needs at least 2 GB" in str(storage.examine_disk(tmp_path).mend)


def test_a_bucket_is_written_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.makedirs("/bucket", exist_ok=True)
    (output,) = storage.examine_output("memory://bucket/run")
    assert output.is_sound and "written, read back and deleted" in output.text
    assert memory.find("/bucket") == []

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 storage.objects.create")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    (output,) = storage.examine_output("memory://bucket/run")
    assert "403 storage.objects.create" in str(output.mend) and "scope cloud-platform" in str(output.mend)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    part = storage.examine_token()
    assert part.value == {"token": True} and "hf_" not in json.dumps(part.to_json())


def test_chips_in_use_are_not_looked_at(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process(host, 4321, "python3", "/dev/vfio/2")
    held = machine.examine_tpu(host)
    monkeypatch.setattr(machine, "examine_tpu", lambda: held)
    look(monkeypatch, "raise SystemExit('started')")
    part = by_name(examine.examine())["devices"]
    assert part.text == "not looked at: process 4321 holds the chips"


def test_the_command_ends_with_two_if_there_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no_devices"]) == ExitCode.DONE
    assert "problem" not in capsys.readouterr().out
    assert cli.main(["doctor", "--no_devices", "--json", "--output_dir=/proc/run"]) == ExitCode.REFUSED
    said = capsys.readouterr()
    result = json.loads(said.out)
    parts = {part["name"]: part for part in result["parts"]}
    assert not result["sound"] and not parts["output_dir"]["sound"] and parts["versions"]["value"]["jax"]
    assert "1 problem, each with what to do about it on standard output: output_dir" in said.err
    assert cli.main(["doctor", "--seconds=0"]) == ExitCode.REFUSED


@pytest.mark.slow
def test_the_real_devices_of_this_machine() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "jaxft.cli", "doctor", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    part = next(part for part in json.loads(child.stdout)["parts"] if part["name"] == "devices")
    assert part["value"] == {"platform": "cpu", "devices": 3, "local_devices": 3, "processes": 1, "kinds": {"cpu": 3}}
