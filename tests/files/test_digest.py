"""Digests depend on what files hold, and on nothing else; large files are read once."""

import hashlib
import os
import sys
import types

import fsspec
import pytest

from jaxft.errors import CheckpointError
from jaxft.files import digest
from jaxft.files.digest import content_digest, digests_of_files, user_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_remembered", {})
    return tmp_path / "cache"


def test_a_file_has_its_sha256_under_every_spelling(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    os.symlink(path, tmp_path / "link")
    for spelling in (path, str(path), "rows.jsonl", "./rows.jsonl", "~/rows.jsonl", "link", [path]):
        assert content_digest(spelling) == wanted
    fsspec.filesystem("memory").pipe_file("/digest/rows.jsonl", b"abc")
    assert content_digest("memory://digest/rows.jsonl") == wanted


def test_a_folder_has_the_digest_of_its_names_and_contents(tmp_path):
    def folder(name, files):
        for relative, content in files.items():
            (tmp_path / name / relative).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / relative).write_bytes(content)
        return tmp_path / name

    first = content_digest(folder("a", {"x": b"1", "deep/y": b"2", ".git/z": b"3"}))
    assert first == content_digest(folder("b", {"deep/y": b"2", "x": b"1", ".DS_Store": b"4"}))
    others = [{"x": b"1", "y": b"2"}, {"x": b"2", "deep/y": b"1"}, {"x": b"1"}, {"x": b"12", "deep/y": b""}]
    assert len({first, *(content_digest(folder(f"c{n}", files)) for n, files in enumerate(others))}) == 5
    memory = fsspec.filesystem("memory")
    for name, content in {"x": b"1", "deep/y": b"2", ".git/z": b"3"}.items():
        memory.pipe_file(f"/digest/folder/{name}", content)
    assert content_digest("memory://digest/folder") == content_digest("memory://digest/folder/") == first


def test_several_paths_keep_their_order(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    both = content_digest([tmp_path / "a", tmp_path / "b"])
    assert both != content_digest([tmp_path / "b", tmp_path / "a"]) != content_digest(tmp_path / "a")


def test_a_large_file_is_read_once_until_it_changes(tmp_path, cache, monkeypatch):
    path, read = tmp_path / "big", []
    hash_of = digest._hash
    monkeypatch.setattr(digest, "_hash", lambda file: read.append(file.name) or hash_of(file))
    monkeypatch.setattr(digest, "LARGE", 10)
    now = [0]
    monkeypatch.setattr(digest, "time", types.SimpleNamespace(time_ns=lambda: now[0]))

    def later_start():
        digest._remembered.clear()
        return content_digest(path)

    path.write_bytes(b"a" * 100)
    now[0] = path.stat().st_ctime_ns + 1
    assert later_start() == later_start() and len(read) == 2, "just written: another write may keep its time"
    now[0] = path.stat().st_ctime_ns + digest.SETTLED_NS + 1
    assert [later_start() for _ in range(3)] == [hashlib.sha256(b"a" * 100).hexdigest()] * 3 and len(read) == 3
    kept = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as a copy that keeps the time
    assert later_start() == hashlib.sha256(b"b" * 100).hexdigest()
    for note in (cache / "digests").iterdir():
        note.write_text("{")
    assert later_start() == hashlib.sha256(b"b" * 100).hexdigest()


def test_files_of_a_folder_are_read_once_until_one_changes(tmp_path, monkeypatch):
    read, paths = [], [tmp_path / "a", tmp_path / "b"]
    hash_of = digest._hash
    monkeypatch.setattr(digest, "_hash", lambda file: read.append(file.name) or hash_of(file))
    monkeypatch.setattr(digest, "LARGE", 10)
    monkeypatch.setattr(digest, "SETTLED_NS", -1)
    for path in paths:
        path.write_bytes(path.name.encode() * 9)

    def later_start():
        digest._remembered.clear()
        return digests_of_files(paths) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    assert later_start() and later_start() and len(read) == 2
    kept = paths[1].stat()
    paths[1].write_bytes(b"c" * 9)
    os.utime(paths[1], ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert later_start() and len(read) == 4
    monkeypatch.setattr(digest, "SETTLED_NS", 10**15)
    paths[0].write_bytes(b"d" * 9)
    assert later_start() and later_start() and len(read) == 8, "just written: another write may keep its time"
    with pytest.raises(FileNotFoundError):
        digests_of_files([tmp_path / "a", tmp_path / "none"])


def test_a_remote_file_is_read_again_if_its_store_says_that_it_changed(monkeypatch):
    files, read = fsspec.filesystem("memory"), []
    hash_of = digest._hash
    monkeypatch.setattr(digest, "_hash", lambda file: read.append(1) or hash_of(file))
    files.pipe_file("/digest/changing", b"one")
    first = content_digest("memory://digest/changing")
    assert content_digest("memory://digest/changing") == first and len(read) == 1
    files.rm("/digest/changing")
    files.pipe_file("/digest/changing", b"two")
    assert content_digest("memory://digest/changing") != first and len(read) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x" * 20)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(digest, "LARGE", 10)
    monkeypatch.setattr(digest, "SETTLED_NS", -sys.maxsize)
    assert content_digest(tmp_path / "file") == hashlib.sha256(b"x" * 20).hexdigest()


def test_paths_that_are_not_there(tmp_path):
    for path in (tmp_path / "none", "memory://digest/none"):
        with pytest.raises(CheckpointError, match=r"cannot read '.*none'"):
            content_digest(path)


def test_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("JAXFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(user_cache()) == "/cache/jaxft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(user_cache()) == "/home/ada/.cache/jaxft"
