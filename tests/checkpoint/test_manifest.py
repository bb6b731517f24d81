"""A manifest notices every change of a folder."""

import random

import pytest

from jaxft.checkpoint import manifest
from jaxft.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "meta.json").write_text('{"a": 1}')
    (tmp_path / "state" / "d" / "shard").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "state" / "empty").write_bytes(b"")
    manifest.write(tmp_path)
    return tmp_path


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_an_untouched_folder_verifies(folder):
    manifest.verify(folder)
    assert manifest.exists(folder)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("name", ["meta.json", "state/d/shard"])
def test_every_flipped_bit_is_named(folder, name):
    bits = 8 * (folder / name).stat().st_size
    for bit in [0, bits - 1, *random.Random(0).sample(range(bits), 20)]:
        flip(folder / name, bit)
        with pytest.raises(CheckpointError, match=rf"{name}: damaged"):
            manifest.verify(folder)
        flip(folder / name, bit)
    manifest.verify(folder)


def test_a_flipped_bit_anywhere_in_the_manifest_itself_is_refused(folder):
    path = folder / manifest.NAME
    for bit in range(0, 8 * path.stat().st_size, 11):  # 11: every bit of a byte gets its turn
        flip(path, bit)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            manifest.verify(folder)
        flip(path, bit)
    manifest.verify(folder)


def test_truncated_missing_and_extra_files_are_all_named(folder):
    shard = folder / "state" / "d" / "shard"
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "meta.json").unlink()
    (folder / "state" / "more").write_text("x")
    with pytest.raises(CheckpointError, match="3 of 3 files") as caught:
        manifest.verify(folder)
    text = str(caught.value)
    assert "state/d/shard: 2559 bytes, 2560 were written" in text
    assert "meta.json: missing" in text
    assert "state/more: not in the manifest" in text


def test_a_file_that_cannot_be_read_is_named(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.json").symlink_to(folder / "nowhere")
    with pytest.raises(CheckpointError, match=r"meta\.json: cannot be read: No such file"):
        manifest.verify(folder)


def test_a_truncated_manifest_is_damaged_and_a_missing_one_interrupted(folder):
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        manifest.verify(folder)
    path.unlink()
    assert not manifest.exists(folder)
    with pytest.raises(CheckpointError, match="interrupted"):
        manifest.verify(folder)
