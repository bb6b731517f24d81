"""Paths where nothing can be written are refused before the work, with what is in the way."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from jaxft.errors import ConfigError, ExportError
from jaxft.files.atomic import UNFINISHED_FOLDER, write_file
from jaxft.files.targets import check_new_file, check_space, make_new_folder, refused_target, whole_folder
from jaxft.runs.folder import refuse_occupied


def in_the_way(kind, folder):
    """A path under a folder where nothing can be written."""
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "other")
    (folder / "other").symlink_to(folder / "loop")
    deep = folder
    while len(os.fsencode(deep)) < 4000:
        deep = deep / ("d" * 100)
    return {
        "long part": folder / ("n" * 256) / "run",
        "room for endings": folder / ("n" * 250),
        "long path": deep,
        "not UTF-8": os.fsdecode(os.fsencode(folder) + b"/r\xff\xfe"),
        "zero byte": f"{folder}/a\0b",
        "dangling": folder / "dangling" / "run",
        "dangling itself": folder / "dangling",
        "loop": folder / "loop" / "run",
        "file": folder / "file" / "below" / "run",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("long part", "has 256 bytes: at most 238 fit"),
        ("room for endings", "has 250 bytes: at most 238 fit"),
        ("long path", "at most 3800 fit"),
        ("not UTF-8", "has bytes that are not UTF-8"),
        ("zero byte", "has a zero byte"),
        ("dangling", "dangling is a link to .*nowhere, where nothing is: remove the link"),
        ("dangling itself", "dangling is a link to .*nowhere, where nothing is: remove the link"),
        ("loop", "loop: Too many levels of symbolic links. Links there point at each other"),
        ("file", "file is a file, not a folder"),
    ],
)
def test_a_path_that_cannot_be_made_is_refused_by_every_writer(kind, said, tmp_path):
    path = in_the_way(kind, tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=said):
        refuse_occupied(Path(path))
    with pytest.raises(ExportError, match=said):
        make_new_folder(path)
    with pytest.raises(ExportError, match=said):
        check_new_file(path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["new\nline", "ünïcode ☃", "a b", "$x;`y`", "-x", "n" * 238, "link/new"])
def test_a_strange_path_that_can_be_made_is_made(name, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert refused_target(tmp_path / name) is None
    make_new_folder(tmp_path / name)
    assert (tmp_path / name).is_dir()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KB, mounted in a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("there", [False, True])
def test_an_output_on_a_full_disk_leaves_nothing_that_blocks_the_same_command(small_disk, there):
    target = small_disk / "export"
    if there:
        target.mkdir()
    with pytest.raises(OSError, match="No space left") as caught, whole_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        write_file(folder / "model.safetensors", lambda file: file.write(b"x" * 2**20))
    assert caught.value.errno == errno.ENOSPC and "model.safetensors" in caught.value.filename
    assert caught.value.__notes__ == [f"Nothing of {target} was kept."]
    assert os.listdir(small_disk) == (["export"] if there else []) and not list(small_disk.rglob("*.json"))
    with whole_folder(target) as folder:
        (folder / "config.json").write_text("{}")
    assert os.listdir(small_disk) == ["export"] and os.listdir(target) == ["config.json"]


def test_an_output_into_a_mounted_folder_is_written_there(small_disk):
    with pytest.raises(ValueError, match="wrong"), whole_folder(small_disk) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("x")
        raise ValueError("wrong")
    assert os.listdir(small_disk) == []
    with whole_folder(small_disk) as folder:
        (folder / "file").write_text("x")
    assert os.listdir(small_disk) == ["file"]


def test_what_a_killed_process_left_is_replaced_and_files_of_others_stay(tmp_path):
    left = tmp_path / f"export{UNFINISHED_FOLDER}"
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / "export.partial").write_text("mine")
    with whole_folder(tmp_path / "export") as folder:
        (folder / "whole").write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["export", "export.partial"]
    assert os.listdir(tmp_path / "export") == ["whole"]


def test_an_output_that_does_not_fit_is_refused_before_it_is_written(small_disk):
    with pytest.raises(ExportError, match="needs 0.07 GB and the disk of .*disk has 0.00 GB left.*Nothing was written"):
        check_space(small_disk / "export", 10**6)
