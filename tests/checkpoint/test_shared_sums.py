"""Checksums that several processes compute: each file is read once, and the result is that of one process."""

import threading
from pathlib import Path

import pytest

from jaxft.checkpoint import manifest
from jaxft.checkpoint.steps.shared_sums import answer, shares, sums_of_all

SIZES = {"a": 5000, "b/c": 10, "b/d": 3000, "e": 0, "f": 2000}


class Values:
    """A store of keys and values, as `jax.distributed` has it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000)
            return self.values[key]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate(SIZES.items()):
        (tmp_path / "4" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "4" / name).write_bytes(bytes([number]) * size)
    return tmp_path / "4"


def shared(folder: Path, count: int, roots: list[Path]) -> manifest.Digests:
    """The sums of all files by so many processes, which are threads. roots: where each sees the parent folder."""
    values = Values()
    others = [threading.Thread(target=answer, args=(values, "key", roots[i], i)) for i in range(1, count)]
    for other in others:
        other.start()
    parts = shares(folder, list(SIZES), count)
    found = sums_of_all(values, "key", parts, folder, Path(folder.name), manifest.ALGORITHM)
    for other in others:
        other.join()
    return found


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_file_is_read_once_and_by_the_process_that_it_is_given_to(folder, count, monkeypatch):
    expected = manifest.sums(folder, list(SIZES), manifest.ALGORITHM)
    read: list[str] = []
    true = manifest._digest

    def counted(path: Path, algorithm: str) -> manifest.Digest:
        read.append(path.relative_to(folder).as_posix())
        return true(path, algorithm)

    monkeypatch.setattr(manifest, "_digest", counted)
    assert shared(folder, count, [folder.parent] * count) == expected
    assert sorted(read) == sorted(SIZES)


def test_shares_are_even_by_bytes(folder):
    parts = shares(folder, list(SIZES), 2)
    assert sorted(sum(SIZES[name] for name in part) for part in parts) == [5000, 5010]
    assert sorted(name for part in parts for name in part) == sorted(SIZES)


def test_another_process_may_see_the_folder_elsewhere(folder, tmp_path):
    (tmp_path / "mount").symlink_to(folder.parent)
    expected = manifest.sums(folder, list(SIZES), manifest.ALGORITHM)
    assert shared(folder, 2, [folder.parent, tmp_path / "mount"]) == expected


def test_what_another_process_does_not_see_yet_is_read_by_process_0(folder, tmp_path):
    expected = manifest.sums(folder, list(SIZES), manifest.ALGORITHM)
    assert shared(folder, 2, [folder.parent, tmp_path / "empty"]) == expected


def test_a_file_that_nobody_can_read_is_an_error(folder):
    (folder / "e").unlink()
    (folder / "e").symlink_to("nowhere")
    with pytest.raises(OSError, match="e"):
        shared(folder, 2, [folder.parent] * 2)
