"""The power is cut while a run trains: the disk, as it was then, holds a whole step and goes on to the same bits.

The run writes to a file system in a file. The process is stopped at random moments and the file copied, with what the
kernel had written to it until then and nothing of what it kept in memory; the copy is mounted, which repairs it.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs.test_kill import assert_same, finish, start, uninterrupted  # noqa: F401

SIZES = {"ext4": 128, "xfs": 320, "btrfs": 256}  # MiB; the smallest that hold the run
CUTS = int(os.environ.get("JAXFT_POWER_CUTS", "4"))  # in each run
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    # A copy of a mounted file system has its identity, which two of these refuse to mount at a time.
    options = "loop,nouuid" if image.suffix == ".xfs" else "loop"
    done = subprocess.run(["mount", "-o", options, image, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system in a file can be mounted here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def make_image(kind: str, image: Path, size: int | None = None) -> None:
    """A file system in a file of `size` MiB."""
    if shutil.which(f"mkfs.{kind}") is None or os.geteuid() != 0:
        pytest.skip(f"needs root and mkfs.{kind}")
    with open(image, "wb") as file:
        file.truncate((size or SIZES[kind]) * 2**20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)


def cut(process: subprocess.Popen, image: Path, copy: Path) -> None:
    """Copies the disk at one moment: it is copied again until two copies are the same."""
    process.send_signal(signal.SIGSTOP)
    before = None
    while True:
        subprocess.run(["cp", "--sparse=always", image, copy], check=True)
        with open(copy, "rb") as file:
            now = hashlib.file_digest(file, "blake2b").digest()
        if now == before:
            break
        before = now
    process.send_signal(signal.SIGCONT)


def whole_steps(folder: Path) -> list[int]:
    """The steps of a run that are whole, by the words of their manifests. Others must not have a step's name."""
    steps = []
    for step in (folder / "checkpoints").iterdir():
        if step.name.isdecimal():
            files = json.loads((step / "manifest.json").read_text())["files"]
            for name, one in files.items():
                assert hashlib.blake2b((step / name).read_bytes()).hexdigest() == one["checksum"], f"{step}/{name}"
            steps.append(int(step.name))
    return sorted(steps)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("kind", SIZES)
def test_the_power_is_cut_while_a_run_trains(kind, keep, uninterrupted, tmp_path):  # noqa: F811
    reference, cache = uninterrupted
    image, chance, survived = tmp_path / f"disk.{kind}", random.Random(keep), []
    make_image(kind, image)
    more = [f"--config.checkpoint.keep={keep}", "--config.checkpoint.every=1"]
    with mounted(image, tmp_path / "disk"):
        run = tmp_path / "disk" / "run"
        process = start(run, cache, more)
        while not list((run / "checkpoints").glob("[0-9]")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        while process.poll() is None and len(survived) < CUTS:
            newest = max(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdecimal())
            cut(process, image, tmp_path / f"copy.{kind}")
            with mounted(tmp_path / f"copy.{kind}", tmp_path / "copy"):
                steps = whole_steps(tmp_path / "copy" / "run")
                assert steps and steps[-1] >= newest, f"{newest} was whole, {steps} is left"
                for name in ("config.json", "jaxft_run.json", "data.json"):
                    json.loads((tmp_path / "copy" / "run" / name).read_text())
                survived.append(steps)
                shutil.rmtree(tmp_path / "again", ignore_errors=True)
                shutil.copytree(tmp_path / "copy" / "run", tmp_path / "again")
            time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
    print(f"{kind}, keep={keep}: {len(survived)} cuts, whole steps left: {survived}")
    assert len(survived) >= min(CUTS, 3)
    assert "going on from step" in finish(tmp_path / "again", cache, more)
    assert_same(tmp_path / "again", reference)
