"""Paths where nothing can be written are refused before the work, with what is in the way."""

import os
from pathlib import Path

import pytest

from jaxft.errors import ConfigError, ExportError
from jaxft.files.targets import check_new_file, make_new_folder, refused_target
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
