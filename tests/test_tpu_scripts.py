"""The thin scripts for Cloud TPU slices: the gcloud commands that they issue or print, and a run through them."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tpu_scripts"
WHERE = ("--name=t1", "--zone=us-east5-a")
TPUS = ["compute", "tpus"]
SSH = [*TPUS, "tpu-vm", "ssh", "t1", "--zone=us-east5-a"]
CREATE = ["create_tpu_vm.sh", *WHERE, "--type=v6e-8", "--version=v2-alpha-tpuv6e"]
SCOPES = "--scopes=https://www.googleapis.com/auth/cloud-platform"
# Describes the queued resource of a name that begins with q.
DESCRIBE = [*TPUS, "queued-resources", "describe"]

# Arguments of each script -> the commands that it issues, without `gcloud`.
CASES = {
    "create": (
        [*CREATE, "--spot"],
        [
            [*TPUS, "tpu-vm", "create", "t1", "--zone=us-east5-a", "--version=v2-alpha-tpuv6e",
             "--accelerator-type=v6e-8", SCOPES, "--labels=jaxft-run=t1", "--spot"],
        ],
    ),
    "create with options in two words, and others of gcloud": (
        ["create_tpu_vm.sh", "--name", "t1", "--zone", "us-east5-a", "--project", "p1", "--type", "v6e-8", "--version",
         "v2", "--", "--network=my net"],
        [
            [*TPUS, "tpu-vm", "create", "t1", "--zone=us-east5-a", "--project=p1", "--version=v2",
             "--accelerator-type=v6e-8", SCOPES, "--labels=jaxft-run=t1", "--network=my net"],
        ],
    ),
    "create in the queue": (
        [*CREATE, "--queued"],
        [
            [*TPUS, "queued-resources", "create", "t1", "--node-id=t1", "--zone=us-east5-a",
             "--runtime-version=v2-alpha-tpuv6e", "--accelerator-type=v6e-8", SCOPES, "--labels=jaxft-run=t1",
             "--async"],
            [*DESCRIBE, "t1", "--zone=us-east5-a", "--format=value(state.state)"],
        ],
    ),
    "create two slices in the queue": (
        [*CREATE, "--queued", "--", "--node-count=2", "--node-prefix=t1"],
        [
            [*TPUS, "queued-resources", "create", "t1", "--zone=us-east5-a", "--runtime-version=v2-alpha-tpuv6e",
             "--accelerator-type=v6e-8", SCOPES, "--labels=jaxft-run=t1", "--node-count=2", "--node-prefix=t1",
             "--async"],
            [*DESCRIBE, "t1", "--zone=us-east5-a", "--format=value(state.state)"],
        ],
    ),
    "create an instance": (
        ["create_tpu_vm.sh", *WHERE, "--api=compute", "--type=ct6e-standard-4t", "--version=family", "--hours=4",
         "--spot"],
        [
            ["compute", "instances", "create", "t1", "--zone=us-east5-a", "--machine-type=ct6e-standard-4t",
             "--image-family=family", "--image-project=ubuntu-os-accelerator-images", "--maintenance-policy=TERMINATE",
             "--scopes=cloud-platform", "--boot-disk-size=200GB", "--max-run-duration=4h",
             "--instance-termination-action=DELETE", "--labels=jaxft-run=t1", "--provisioning-model=SPOT"],
        ],
    ),
    "train": (
        ["train.sh", *WHERE, "--run=r1", "--", "--config=configs/quickstart.py:smoke",
         "--config.output_dir=/mnt/my runs"],
        [
            [*SSH, "--worker=all",
             r"--command=bash jaxft-pod/worker/start.sh r1 1 -- jaxft train --expect_platform=tpu "
             r"--config=configs/quickstart.py:smoke --config.output_dir=/mnt/my\ runs"],
        ],
    ),
    "train on an instance": (
        ["train.sh", *WHERE, "--api=compute", "--run=r1", "--attempt=2", "--", "--config=c.py"],
        [
            ["compute", "ssh", "t1", "--zone=us-east5-a",
             "--command=bash jaxft-pod/worker/start.sh r1 2 -- jaxft train --expect_platform=tpu --config=c.py"],
        ],
    ),
    "state": (
        ["on_workers.sh", *WHERE, "--worker=0", "--", "state.sh", "r1"],
        [[*SSH, "--worker=0", "--command=bash jaxft-pod/worker/state.sh r1"]],
    ),
    "delete an instance": (
        ["delete_tpu_vm.sh", *WHERE, "--api=compute"],
        [["compute", "instances", "delete", "t1", "--zone=us-east5-a", "--quiet"]],
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize(("arguments", "expected"), CASES.values(), ids=CASES)

# Notes its arguments; answers what state a queued resource has, one word of `states` a call; and runs what ssh and scp
# bring in the folder `home`.
GCLOUD = """#!/usr/bin/env bash
folder={folder}
printf '%s\\0' "$@" $'\\n' >> "$folder/calls"
case "$*" in
  *queued-resources\\ describe*"value(name)"*) [[ -e "$folder/queued" ]] ;;
  *queued-resources\\ describe*)
    head -n 1 "$folder/states"
    (($(wc -l < "$folder/states") == 1)) || sed -i 1d "$folder/states" ;;
  *" ssh "*)
    [[ -d "$folder/home" ]] || exit 0
    for word in "$@"; do [[ "$word" != --command=* ]] || command="${{word#--command=}}"; done
    cd "$folder/home" && HOME="$PWD" JAXFT_PYTHON_ENV={python} bash -c "$command" ;;
  *" scp "*)
    [[ ! -d "$folder/home" ]] || for word in "$@"; do
      [[ "$word" != t1:* ]] || cp "$source" "$folder/home/${{word#t1:}}"
      source="$word"
    done ;;
esac
"""


@pytest.fixture
def gcloud(tmp_path: Path) -> Path:
    """A folder with a `gcloud` that appends its arguments to `calls` there, one NUL-ended line of each."""
    stub = tmp_path / "gcloud"
    stub.write_text(GCLOUD.format(folder=shlex.quote(str(tmp_path)), python=shlex.quote(sys.prefix)))
    stub.chmod(0o755)
    (tmp_path / "states").write_text("ACTIVE\n")
    return tmp_path


def run(arguments: list[str], gcloud: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script, *rest = arguments
    environment = os.environ | {
        "PATH": f"{gcloud}:{os.environ['PATH']}", "JAXFT_POLL": "0.01", "TMPDIR": str(gcloud), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    command = ["bash", str(FOLDER / script), *more, *rest]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def calls(gcloud: Path) -> list[list[str]]:
    recorded = gcloud / "calls"
    if not recorded.exists():
        return []
    return [call.split("\0")[:-1] for call in recorded.read_text().split("\n\0") if call]


@each_case
def test_issues_the_commands(arguments: list[str], expected: list[list[str]], gcloud: Path) -> None:
    done = run(arguments, gcloud)
    assert done.returncode == 0, done.stderr
    assert calls(gcloud) == expected


@each_case
def test_dry_run_prints_the_same_commands_and_issues_none(
    arguments: list[str], expected: list[list[str]], gcloud: Path
) -> None:
    done = run(arguments, gcloud, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert calls(gcloud) == []
    # Pasted into a shell, what was printed issues the commands.
    subprocess.run(["bash", "-c", done.stdout], env=os.environ | {"PATH": f"{gcloud}:{os.environ['PATH']}"}, check=True)
    assert calls(gcloud) == expected


def test_a_queued_request_is_waited_for(gcloud: Path) -> None:
    (gcloud / "states").write_text("ACCEPTED\nWAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = run([*CREATE, "--queued"], gcloud)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"t1: {state}" for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    ]


def test_a_request_that_fails_says_what_to_do(gcloud: Path) -> None:
    (gcloud / "states").write_text("ACCEPTED\nFAILED\n")
    done = run([*CREATE, "--queued"], gcloud)
    assert done.returncode == 1 and "the request ended as FAILED" in done.stderr
    assert "delete_tpu_vm.sh --name=t1 --zone=us-east5-a" in done.stderr


@pytest.mark.parametrize("queued", [True, False])
def test_delete_takes_the_queued_resource_with_its_node(queued: bool, gcloud: Path) -> None:
    if queued:
        (gcloud / "queued").touch()
    assert run(["delete_tpu_vm.sh", *WHERE], gcloud).returncode == 0
    noun, flags = ("queued-resources", ["--force"]) if queued else ("tpu-vm", [])
    assert calls(gcloud)[-1] == [*TPUS, noun, "delete", "t1", "--zone=us-east5-a", *flags, "--quiet"]
    assert len(calls(gcloud)) == 2


def test_a_run_through_the_scripts(gcloud: Path) -> None:
    """This checkout is brought to a host, a command starts once however often it is started, and its state is read."""
    home = gcloud / "home"
    home.mkdir()
    setup = ["setup_workers.sh", *WHERE, "--run=r1", "--", "configs/reward_functions"]
    done = run(setup, gcloud)
    assert done.returncode == 0 and ": jaxft 0.1.0" in done.stdout, done.stderr
    assert (home / "jaxft-pod/runs/r1/pack/configs/reward_functions/gsm8k.py").is_file()
    assert "is installed already" in run(setup, gcloud).stdout  # the same files give the same archive
    # Its config is the one of the archive; the fault is found before anything is compiled.
    train = ["train.sh", *WHERE, "--run=r1", "--", "--config=configs/quickstart.py:smoke", "--config.seed=none-such"]
    assert "attempt 1 runs as" in run(train, gcloud).stdout
    assert "attempt 1 " in run(train, gcloud).stdout
    for _ in range(200):
        state = json.loads(run(["on_workers.sh", *WHERE, "--", "state.sh", "r1"], gcloud).stdout)
        if state["exit"] is not None:
            break
        time.sleep(0.1)
    assert state["exit"] == 2 and state["attempt"] == 1
    shown = run(["on_workers.sh", *WHERE, "--", "log.sh", "r1", "1", "0"], gcloud).stdout
    assert shown.count("none-such") >= 1 and "Traceback" not in shown


def test_the_watchdog_of_a_queued_slice_deletes_the_queued_resource(gcloud: Path) -> None:
    before = time.time()
    done = run(["setup_workers.sh", *WHERE, "--run=r1", "--hours=2", "--queued"], gcloud)
    assert done.returncode == 0, done.stderr
    *flags, command = calls(gcloud)[-1]
    assert flags == [*SSH, "--worker=0"]
    script, name, until, *others = shlex.split(command.removeprefix("--command=bash "))
    assert (script, name) == ("jaxft-pod/worker/guard.sh", "r1")
    assert others == ["--api=tpu", "--node=t1", "--queued=t1", "--zone=us-east5-a"]
    assert 7190 < int(until.removeprefix("--until=")) - before < 7210


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create_tpu_vm.sh", "--zone=z", "--type=a", "--version=b"], "--name is missing"),
        (["create_tpu_vm.sh", "--name=n", "--type=a", "--version=b"], "--zone is missing"),
        (["create_tpu_vm.sh", *WHERE, "--version=b"], "--type is missing"),
        (["create_tpu_vm.sh", *WHERE, "--type=a"], "--version is missing"),
        (["create_tpu_vm.sh", *WHERE, "--type"], "--type needs a value"),
        (["create_tpu_vm.sh", *WHERE, "--spot=yes"], "--spot takes no value"),
        (["create_tpu_vm.sh", *WHERE, "--type=a", "--version=b", "--api=gke"], "--api=gke is neither tpu nor compute"),
        (["create_tpu_vm.sh", *WHERE, "--type=a", "--version=b", "--api=compute"], "--hours='' is not a whole number"),
        (["create_tpu_vm.sh", *WHERE, "--type=a", "--version=b", "--hours=4"], "--hours is for --api=compute"),
        (["setup_workers.sh", *WHERE], "--run='' is not a name"),
        (["setup_workers.sh", *WHERE, "--run=r1", "--", "/etc/passwd"], "is not named from the root of the checkout"),
        (["setup_workers.sh", *WHERE, "--run=r1", "--", "../x"], "is not named from the root of the checkout"),
        (["setup_workers.sh", *WHERE, "--run=r1", "--", "absent"], "there is no absent in"),
        (["setup_workers.sh", *WHERE, "--run=r1", "--extras=tpu; rm"], "is not a list of names"),
        (["train.sh", *WHERE, "--run=r1"], "no arguments for jaxft train"),
        (["train.sh", *WHERE, "--config=configs/quickstart.py"], "unknown option --config"),
        (["train.sh", *WHERE, "--run=r1", "--attempt=x", "--", "--config=c"], "--attempt='x' is not a number"),
        (["on_workers.sh", *WHERE, "--", "rm.sh", "r1"], "there is no rm.sh in tpu_scripts/worker"),
        (["on_workers.sh", *WHERE, "--", "../train.sh", "r1"], "there is no ../train.sh"),
        (["delete_tpu_vm.sh", *WHERE, "t2"], "unknown argument t2"),
    ],
)
def test_refuses(arguments: list[str], message: str, gcloud: Path) -> None:
    done = run(arguments, gcloud)
    assert done.returncode == 2
    assert message in done.stderr and "usage: " in done.stderr
    assert calls(gcloud) == []
