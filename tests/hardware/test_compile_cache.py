"""The folder of compiled programs: whole entries stay, up to its size; a folder that the user named is left alone."""

import os
import zlib
from pathlib import Path

import jax
import pytest

from jaxft.hardware import compile_cache
from jaxft.hardware.compile_cache import CHECKED, clean, keep_compiled

WHOLE = zlib.compress(b"a program" * 100)


def write(path: Path, content: bytes, used: int) -> Path:
    path.write_bytes(content)
    os.utime(path, (used, used))
    return path


@pytest.fixture
def settings():
    """JAX's cache is on, with the settings of a new process; afterwards everything is as before."""
    names = ("enable_compilation_cache", "compilation_cache_dir", "persistent_cache_min_compile_time_secs",
             "persistent_cache_min_entry_size_bytes", "persistent_cache_enable_xla_caches")  # fmt: skip
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("length", [0, 1, len(WHOLE) // 2, len(WHOLE) - 1])
def test_an_entry_that_ends_too_early_is_removed(tmp_path, length):
    whole, cut = write(tmp_path / "a-cache", WHOLE, 10), write(tmp_path / "b-cache", WHOLE[:length], 20)
    other = write(tmp_path / "notes.txt", b"not an entry", 5)
    clean(tmp_path)
    assert whole.exists() and not cut.exists() and other.exists()


def test_an_entry_is_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(compile_cache, "_is_whole", lambda path: read.append(path.name) or True)
    write(tmp_path / "a-cache", WHOLE, 10)
    write(tmp_path / "b-cache", WHOLE, 20)
    clean(tmp_path)
    assert sorted(read) == ["a-cache", "b-cache"] and (tmp_path / CHECKED).exists()
    read.clear()
    write(tmp_path / "c-cache", WHOLE, 30)
    clean(tmp_path)
    # b has the time of the mark, and its clock may not tell it from an entry that was written just after.
    assert sorted(read) == ["b-cache", "c-cache"]


def test_what_was_unused_for_longest_goes_first(tmp_path):
    paths = [write(tmp_path / f"{used}-cache", WHOLE, used) for used in (30, 10, 20)]
    clean(tmp_path, most_bytes=2 * len(WHOLE))
    assert [path.exists() for path in paths] == [True, False, True]


def test_programs_are_kept_in_the_user_s_cache(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    keep_compiled()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.is_dir() and folder.parent == tmp_path / "compiled"


def test_a_folder_for_all_processes(tmp_path, settings):
    keep_compiled(tmp_path / "shared", least_seconds=2.0)
    assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "shared"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 2.0


def test_the_user_s_own_settings_come_first(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    before = jax.config.jax_compilation_cache_dir
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, settings):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file" / "cache"))
    before = jax.config.jax_compilation_cache_dir
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == before
