"""One run and its verbs through the real gcloud: a cloud on loopback, and a folder as the host behind its ssh."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from cloud_server import Cloud, environment, start
from fake_train import fake_environment
from stub_pod import CONFIG

from jaxft.config import load
from jaxft.pods import commands
from jaxft.pods.attempts.front import Outside
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request
from jaxft.pods.run import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not on this machine"),
]
# Commands run in the host's folder, and files are copied to and from it.
SSH = """#!/bin/bash
export HOME={host} JAXFT_PYTHON_ENV={environment} JAXFT_DEV={host}/dev JAXFT_METADATA=http://127.0.0.1:9
export JAXFT_LIBTPU_LOCKFILE={host}/lockfile PYTHONPATH= FAKE_SECONDS={seconds}
cd "$HOME"
if [[ "$0" == *ssh ]]; then
  while [[ "$1" != *@* ]]; do shift; done
  shift
  if [[ "$1" == -- ]]; then shift; fi
  exec bash -c "$*"
fi
place() {{ if [[ "$1" == *@*:* ]]; then echo "{host}/${{1#*@*:}}"; else echo "$1"; fi; }}
cp "$(place "${{@: -2:1}}")" "$(place "${{@: -1}}")"
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    host, programs, keys = tmp_path / "host", tmp_path / "bin", tmp_path / ".ssh"
    for folder in (programs, keys, host / "dev"):
        folder.mkdir(parents=True)
    for chip in range(8):
        (host / "dev" / f"accel{chip}").touch()
    script = SSH.format(host=host, environment=fake_environment(tmp_path), seconds=1)
    for name in ("ssh", "scp", "ssh-keygen"):
        (programs / name).write_text(script if name != "ssh-keygen" else "#!/bin/sh\n")
        (programs / name).chmod(0o755)
    for name in ("google_compute_engine", "google_compute_engine.pub"):
        (keys / name).write_text("ssh-rsa AAAA user@host\n")
    with start(Cloud()) as one:
        for key in set(os.environ) - set(environment(one, tmp_path)):
            monkeypatch.delenv(key)
        for key, value in environment(one, tmp_path).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        yield one


def test_a_run_and_its_verbs(cloud, tmp_path):
    lines: list[str] = []
    listed: list[dict] = []
    request = Request(
        name="run-1", topology="v5e:2x4", zones=("us-east5-b",), to=str(tmp_path / "my runs"), project="my-project",
        skip_plan=True, keep_minutes=0.0,
    )  # fmt: skip

    def say(text):
        lines.append(text)
        print(text, file=sys.stderr)
        if text == "training runs on 1 host":  # in its middle, as from another terminal
            listed.append(commands.list_runs(project="my-project", say=lines.append))
            listed.append(commands.status("run-1", say=lines.append, outside=outside))

    outside = Outside(
        say=say,
        slices_of=slices_of,
        platform="cpu",
        poll_seconds=1.0,
        sleep=lambda seconds: time.sleep(min(seconds, 1)),
    )
    summary = run(request, load("quickstart:smoke", CONFIG), say=say, outside=outside)
    assert summary["state"] == "done" and summary["step"] == 3 and summary["attempts"] == 1, lines
    assert not cloud.alive and [entry.split()[0] for entry in cloud.log] == ["POST", "DELETE"], cloud.log
    assert (Path(request.to) / "run" / "checkpoints" / "3" / "manifest.json").is_file()
    (thing,) = listed[0]["things"]
    assert (thing["run"], thing["chips"], thing["known"]) == ("run-1", 8, True)
    assert listed[0]["hour_usd"] == pytest.approx(listed[1]["hour_usd"]) and listed[1]["workers"][0]["chips"] == 8
    assert commands.list_runs(project="my-project", say=lines.append) == {"things": [], "hour_usd": 0.0}
    assert commands.delete("run-1", say=lines.append)["deleted"] == 0
    commands.logs("run-1", say=lines.append)
    assert "step 3/3" in lines[-1]
