"""Saves on a disk that fails, and into a folder that may not be written to: said, nothing lost, gone on with after."""

import subprocess
import threading
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.errors import CheckpointError


def state(step):
    return {"x": jnp.arange(2**16, dtype=jnp.float32) * step, "key": jax.random.key(step)}


def save(folder, step):
    with RunCheckpoints(folder, keep=10) as checkpoints:
        checkpoints.save(step, state(step), {})


def fails(folder, step, message):
    """A save fails with the message, and leaves no thread for which Python would wait at its end."""
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError, match=message):
        save(folder, step)
    left = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    for thread in left:
        threading.Thread.join(thread, 60)  # Orbax's own join raises what the thread raised
    assert not any(thread.is_alive() for thread in left)


def newest(folder):
    """The newest step, whose arrays were those that were saved."""
    with RunCheckpoints(folder, keep=10, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(step))
        restored, _ = checkpoints.restore(abstract)
    np.testing.assert_array_equal(restored["x"], state(step)["x"])
    return step


def done(*command):
    return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0


@contextmanager
def failing_disk(folder):
    """An ext4 disk in a file for which there is soon no room, so that the disk answers with errors.

    Yields its mount point and the file that takes the room.
    """
    host, mount = folder / "host", folder / "disk"
    host.mkdir()
    mount.mkdir()
    if not done("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", host):
        pytest.skip("no mounts are allowed here")
    try:
        done("truncate", "-s", "64M", host / "image")
        # Without a journal, so that the file system goes on after a failed write and passes the error to the program.
        if not done("mkfs.ext4", "-q", "-O", "^has_journal", host / "image"):
            pytest.skip("mkfs.ext4 is not here")
        if not done("mount", "-o", "loop,errors=continue", host / "image", mount):
            pytest.skip("no loop devices are allowed here")
        try:
            yield mount, host / "filler"
        finally:
            assert done("umount", mount)
    finally:
        assert done("umount", host)


def test_a_disk_that_fails_is_named_and_the_step_before_stays(tmp_path, capfd):
    with failing_disk(tmp_path) as (disk, filler):
        save(disk / "run", 1)
        subprocess.run(["sync", "-f", disk], check=True)
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        # Which of the two errors comes depends on the kernel's version.
        fails(disk / "run", 2, r"step 2 was not saved to .*(Input/output error|No space left).*step 1 is whole")
        assert newest(disk / "run") == 1
        filler.unlink()
        save(disk / "run", 3)
        assert newest(disk / "run") == 3
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


def test_a_folder_without_permission_is_named_and_the_step_before_stays(tmp_path, capfd):
    folder = tmp_path / "run"
    save(folder, 1)
    # The superuser may write everywhere but into an immutable folder.
    if not done("chattr", "+i", folder):
        pytest.skip("this file system knows no immutable folders, or they are not allowed here")
    try:
        fails(folder, 2, r"step 2 was not saved to .*not permitted.*step 1 is whole")
        assert newest(folder) == 1
    finally:
        assert done("chattr", "-i", folder)
    save(folder, 2)
    assert newest(folder) == 2
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
