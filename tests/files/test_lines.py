"""A file of lines on a disk that fails: nothing is lost that can still be written, and no line is cut."""

import os
import resource
import subprocess
from contextlib import contextmanager

import pytest

from jaxft.files.lines import LineFile

LINE = '{"step": 1, "loss": 0.123456789}\n'


@contextmanager
def largest_file(size):
    """The kernel takes no more bytes of any file than `size`: first a part of a write, then none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_until_the_disk_takes_them_and_none_is_cut(tmp_path):
    told = []
    file = LineFile(tmp_path / "lines", told.append)
    file.add([LINE])
    with largest_file(len(LINE) + 7):
        file.add([LINE, LINE])
        assert (tmp_path / "lines").read_text() == LINE, "a part of a line stayed"
        file.add([LINE])
        assert file.waiting == (LINE,) * 3
    assert len(told) == 1 and "lines cannot be written (File too large). The run goes on" in told[0]
    file.add([LINE])
    assert (tmp_path / "lines").read_text() == LINE * 5 and file.waiting == ()
    assert told[1:] == ["lines is written again: no line is missing, 3 were late"]
    file.close()
    assert len(told) == 2


def test_lines_that_never_found_room_are_counted_at_the_end(tmp_path):
    told = []
    file = LineFile(tmp_path / "lines", told.append)
    with largest_file(3):
        file.add([LINE, LINE])
        file.close()
        file.close()
    assert len(told) == 2 and told[1].endswith("lacks the last 2 lines, which could not be written")
    assert (tmp_path / "lines").read_bytes() == b""
    with pytest.raises(ValueError, match="closed file"):
        file.add([LINE])


def test_a_full_disk_and_room_again(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        (tmp_path / "other").write_bytes(bytes(12 << 10))
        told, line = [], "x" * 999 + "\n"
        with_room = LineFile(tmp_path / "lines", told.append)
        for _ in range(10):
            with_room.add([line])
        assert "No space left on device" in told[0] and len(told) == 1 and with_room.waiting
        assert not (tmp_path / "lines").stat().st_size % 1000
        (tmp_path / "other").unlink()
        with_room.close()
        assert (tmp_path / "lines").read_text() == line * 10
    finally:
        subprocess.run(["umount", tmp_path], check=True)
