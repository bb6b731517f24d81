"""The thin scripts of tpu_scripts/ with the real gcloud, against a cloud on loopback and hosts that are folders."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cloud_server import Cloud, environment, start

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
pytestmark = [
    pytest.mark.slow,  # 2 s for each call of gcloud
    pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not on this machine"),
]
WHERE = ["--name", "run-1", "--zone=us-east5-b", "--project=my-project"]
# Play the host: what stands behind its name is the command of ssh, and scp copies its source to what follows the colon.
# A file `break` makes a connection break once after the command has run, which gcloud answers by running it again.
SSH = """#!/bin/bash
while [[ "$1" != *@* ]]; do shift; done
shift
if [[ "$1" == -- ]]; then shift; fi
cd {home}
HOME={home} JAXFT_PYTHON_ENV={python} JAXFT_DEV={home}/dev bash -c "$*"
code=$?
if [[ -e {home}/break ]]; then rm {home}/break; exit 255; fi
exit $code
"""
SCP = """#!/bin/bash
words=("$@")
cp "${{words[-2]}}" "{home}/${{words[-1]#*:}}"
"""


@pytest.mark.parametrize("kind", ["node", "queued", "instance"])
def test_a_whole_life(kind: str, tmp_path: Path) -> None:
    home, programs, keys = tmp_path / "host", tmp_path / "bin", tmp_path / ".ssh"
    for folder in (home, programs, keys):
        folder.mkdir()
    for name, text in (("ssh", SSH), ("scp", SCP), ("ssh-keygen", "#!/bin/bash\n")):
        (programs / name).write_text(text.format(home=home, python=sys.prefix))
        (programs / name).chmod(0o755)
    for name in ("google_compute_engine", "google_compute_engine.pub"):
        (keys / name).write_text("ssh-rsa AAAA user@host\n")
    api = ["--api=compute"] if kind == "instance" else []

    with start(Cloud()) as cloud:
        env = environment(cloud, tmp_path) | {"JAXFT_POLL": "0.1", "TMPDIR": str(tmp_path)}
        env["PATH"] = f"{programs}:{env['PATH']}"

        def script(name: str, *arguments: str) -> str:
            command = ["bash", str(SCRIPTS / name), *WHERE, *api, *arguments]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, done.stderr
            return done.stdout

        created = {
            "node": ["--type=v6e-8", "--version=v2-alpha-tpuv6e"],
            "queued": ["--type=v6e-8", "--version=v2-alpha-tpuv6e", "--queued"],
            "instance": ["--type=ct6e-standard-8t", "--version=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e", "--hours=4"],
        }
        script("create_tpu_vm.sh", *created[kind])
        assert cloud.alive
        script("setup_workers.sh", "--run=r1")
        (home / "break").touch()
        train = ["--run=r1", "--", "--config=configs/quickstart.py:smoke", "--config.seed=none-such"]
        script("train.sh", *train)
        script("train.sh", *train)
        for _ in range(20):
            state = json.loads(script("on_workers.sh", "--worker=0", "--", "state.sh", "r1").splitlines()[-1])
            if state["exit"] is not None:
                break
            time.sleep(0.5)
        assert not (home / "break").exists() and state["attempt"] == 1 and state["exit"] == 2
        script("delete_tpu_vm.sh")
        assert not cloud.alive
