"""Plays `jaxft train` on a host in a second: steps, a checkpoint after each, and what `jaxft verify` calls a whole run.

A host's Python is then the script that `fake_python` writes. FAKE_STEPS (3): of the run. FAKE_SECONDS (0): of a step.
The token in HF_TOKEN is looked for in every command line of this machine.
"""

import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

from jaxft.checkpoint import manifest

ROOT = Path(__file__).absolute().parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  *"jaxft.cli --version"*) echo "jaxft 0.1.0" ;;
  *"jaxft.cli doctor"*) echo '{{"parts": []}}' ;;
  *"jaxft.cli train"*) PYTHONPATH={root} exec {python} {script} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


def fake_environment(folder: Path) -> str:
    """An environment for JAXFT_PYTHON_ENV whose Python trains as this file does."""
    path = folder / "environment" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(PYTHON.format(python=sys.executable, root=ROOT, script=Path(__file__).absolute()))
    path.chmod(0o755)
    return str(folder / "environment")


def output_dir_in(arguments: list[str]) -> str:
    return next(one for one in arguments if one.startswith("--config.output_dir=")).partition("=")[2]


def newest_in(run: Path) -> int:
    return max((int(path.parent.name) for path in run.glob(f"checkpoints/*/{manifest.NAME}")), default=0)


def save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(f"weights of step {step}")
    manifest.write(folder)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")


def upload(run: Path, address: str) -> None:
    bucket, _, folder = address.removeprefix("gs://").partition("/")
    # A manifest last: it says that the other files are there.
    for path in sorted(run.rglob("*"), key=lambda path: path.name == manifest.NAME):
        if path.is_file():
            name = quote(f"{folder}/{path.relative_to(run)}", safe="")
            url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
            urllib.request.urlopen(urllib.request.Request(url, path.read_bytes(), method="POST")).close()


def in_command_lines(secret: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if secret.encode() in path.read_bytes():
                return True
        except OSError:  # it has ended
            continue
    return False


def main(arguments: list[str]) -> None:
    address = output_dir_in(arguments)
    run = Path("output").absolute() if address.startswith("gs://") else Path(address).expanduser()
    run.mkdir(parents=True, exist_ok=True)
    values = json.loads(Path("config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"output_dir": address}))
    steps, begin = int(os.environ.get("FAKE_STEPS", "3")), newest_in(run)
    print(f"begins after step {begin}")
    if secret := os.environ.get("HF_TOKEN"):
        print(f"a token of {len(secret)} characters, {'SEEN' if in_command_lines(secret) else 'in no command line'}")
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    for step in range(begin + 1, steps + 1):
        until = time.monotonic() + float(os.environ.get("FAKE_SECONDS", "0"))
        while time.monotonic() < until and not stopped:
            time.sleep(0.05)
        if stopped:
            print("saved after SIGTERM")
            sys.exit(75)
        save(run, step)
        if address.startswith("gs://"):
            upload(run, address)
        print(f"step {step}/{steps}  loss 1.0")
    (run / "summary.json").write_text(json.dumps({"steps": steps}))
    if address.startswith("gs://"):
        upload(run, address)


if __name__ == "__main__":
    main(sys.argv[1:])
