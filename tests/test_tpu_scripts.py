"""The scripts for Cloud TPU VMs: their syntax, and the gcloud commands that they issue or print."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tpu_scripts"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
WHERE = ("--name=t1", "--zone=us-west4-a")
TPUS = ["compute", "tpus"]

# Arguments of each script -> the commands that it issues, without `gcloud`. None stands for any one argument.
CASES = {
    "create": (
        ["create_tpu_vm.sh", *WHERE, "--type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--spot"],
        [
            [*TPUS, "tpu-vm", "create", "t1", "--zone=us-west4-a", "--accelerator-type=v5litepod-8",
             "--version=v2-alpha-tpuv5-lite", "--spot"],
        ],
    ),
    "create in the queue": (
        ["create_tpu_vm.sh", *WHERE, "--project=p1", "--type=v5litepod-8", "--version=v2", "--queued"],
        [
            [*TPUS, "queued-resources", "create", "t1", "--node-id=t1", "--zone=us-west4-a", "--project=p1",
             "--accelerator-type=v5litepod-8", "--runtime-version=v2"],
            [*TPUS, "queued-resources", "describe", "t1", "--zone=us-west4-a", "--project=p1",
             "--format=value(state)"],
        ],
    ),
    "setup": (
        ["setup_workers.sh", *WHERE, "--repo=https://example.com/jaxft", "--ref=v0.1.0"],
        [[*TPUS, "tpu-vm", "ssh", "t1", "--zone=us-west4-a", "--worker=all", None]],
    ),
    "train": (
        ["train.sh", *WHERE, "--", "--config=configs/quickstart.py:smoke", "--config.output_dir=/mnt/my runs"],
        [
            [*TPUS, "tpu-vm", "ssh", "t1", "--zone=us-west4-a", "--worker=all",
             r"--command=cd ~/jaxft && .venv/bin/jaxft train --config=configs/quickstart.py:smoke "
             r"--config.output_dir=/mnt/my\ runs"],
        ],
    ),
    "delete": (
        ["delete_tpu_vm.sh", *WHERE],
        [[*TPUS, "tpu-vm", "delete", "t1", "--zone=us-west4-a", "--quiet"]],
    ),
    "delete from the queue": (
        ["delete_tpu_vm.sh", *WHERE, "--queued"],
        [[*TPUS, "queued-resources", "delete", "t1", "--zone=us-west4-a", "--force", "--quiet"]],
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES)


@pytest.fixture
def gcloud(tmp_path: Path) -> Path:
    """A folder with a `gcloud` that appends its arguments to `calls` there, one NUL-ended line of each."""
    stub = tmp_path / "gcloud"
    stub.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" $'\\n' >> {shlex.quote(str(tmp_path))}/calls\n")
    stub.chmod(0o755)
    return tmp_path


def run(arguments: list[str], gcloud: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script, *rest = arguments
    environment = os.environ | {"PATH": f"{gcloud}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / script), *more, *rest]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def calls(gcloud: Path) -> list[list[str]]:
    recorded = gcloud / "calls"
    if not recorded.exists():
        return []
    return [call.split("\0")[:-1] for call in recorded.read_text().split("\n\0") if call]


def fits(found: list[str], expected: list[str | None]) -> bool:
    return len(found) == len(expected) and all(e is None or e == f for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_syntax(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert script.name == "common.sh" or os.access(script, os.X_OK)


@each_case
def test_issues_the_commands(arguments: list[str], expected: list[list[str | None]], gcloud: Path) -> None:
    done = run(arguments, gcloud)
    assert done.returncode == 0, done.stderr
    found = calls(gcloud)
    assert len(found) == len(expected)
    assert all(map(fits, found, expected)), json.dumps(found, indent=1)


@each_case
def test_dry_run_prints_the_same_commands_and_issues_none(
    arguments: list[str], expected: list[list[str | None]], gcloud: Path
) -> None:
    done = run(arguments, gcloud, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert calls(gcloud) == []
    # Pasted into a shell, what was printed issues the commands.
    subprocess.run(["bash", "-c", done.stdout], env=os.environ | {"PATH": f"{gcloud}:{os.environ['PATH']}"}, check=True)
    assert all(map(fits, calls(gcloud), expected))


def test_the_setup_command_is_sound_shell(gcloud: Path) -> None:
    run(CASES["setup"][0], gcloud)
    command = calls(gcloud)[0][-1].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False).returncode == 0
    assert "git clone https://example.com/jaxft ~/jaxft" in command
    assert "git fetch origin v0.1.0" in command
    assert "--editable '.[tpu]'" in command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create_tpu_vm.sh", "--zone=z", "--type=a", "--version=b"], "--name is missing"),
        (["create_tpu_vm.sh", "--name=n", "--type=a", "--version=b"], "--zone is missing"),
        (["create_tpu_vm.sh", *WHERE, "--version=b"], "--type is missing"),
        (["create_tpu_vm.sh", *WHERE, "--type=a"], "--version is missing"),
        (["setup_workers.sh", *WHERE], "--repo is missing"),
        (["setup_workers.sh", *WHERE, "--repo=r", "--python=python3; rm"], "is not a name such as python3.11"),
        (["train.sh", *WHERE], "no arguments for jaxft train"),
        (["train.sh", *WHERE, "--config=configs/quickstart.py"], "unknown option --config"),
        (["delete_tpu_vm.sh", *WHERE, "t2"], "unknown argument t2"),
    ],
)
def test_refuses(arguments: list[str], message: str, gcloud: Path) -> None:
    done = run(arguments, gcloud)
    assert done.returncode == 2
    assert message in done.stderr and "usage: " in done.stderr
    assert calls(gcloud) == []
