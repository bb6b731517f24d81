"""A power cut at any moment leaves a whole step, under a model of a disk that forgets what was not flushed."""

import hashlib
import json

import jax.numpy as jnp
import pytest
from oracles.forgetful_disk import ForgetfulDisk

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.files.run_folder import write_json


def whole(image, step):
    """Whether a step is whole, by the manifest's own words and nothing of jaxft."""
    try:
        files = json.loads(image[f"{step}/manifest.json"])["files"]
    except (KeyError, ValueError):
        return False
    return all(
        hashlib.blake2b(image.get(f"{step}/{name}", b"")).hexdigest() == file["checksum"]
        for name, file in files.items()
    )


def named_steps(image):
    """The steps that have their name and a manifest."""
    names = [path.split("/") for path in image]
    return sorted({int(name[0]) for name in names if name[0].isdecimal() and name[1] == "manifest.json"})


@pytest.mark.parametrize("keep", [1, 2])
def test_a_cut_at_any_moment_leaves_the_newest_step_that_was_whole(tmp_path, monkeypatch, keep):
    saved, seen = [], set()

    def cut(disk):
        for image in disk.images(6):
            steps = [step for step in named_steps(image) if whole(image, step)]
            assert steps == named_steps(image), "a step has its name and is not whole"
            assert not saved or (steps and steps[-1] >= saved[-1]), f"after step {saved[-1]} there are {steps}"
            seen.add(tuple(steps))

    disk = ForgetfulDisk(tmp_path, cut)
    disk.watch(monkeypatch)
    with RunCheckpoints(tmp_path, keep=keep) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(64, step, jnp.float32)}, {"step": step})
            checkpoints.wait()
            saved.append(step)
    disk.end()
    assert disk.cuts > 100
    assert {(1,), (3,) if keep == 1 else (2, 3)} <= seen  # the model loses something, and not everything


def test_a_small_file_is_the_old_one_or_the_new_one_after_a_cut(tmp_path, monkeypatch):
    texts, seen = [None], set()

    def cut(disk):
        for image in disk.images(6):
            text = image.get("config.json")
            assert text is None or json.loads(text) in texts
            seen.add(text and json.loads(text)["n"])
            assert texts[0] is None or text is not None

    disk = ForgetfulDisk(tmp_path, cut)
    disk.watch(monkeypatch)
    for n in range(4):
        texts.append({"n": n, "long": "x" * 100})
        write_json(tmp_path / "config.json", texts[-1])
        texts[:] = texts[-1:]
        disk.end()
    assert seen == {None, 0, 1, 2, 3}
