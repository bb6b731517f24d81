"""Optional libraries: what their import does to a program, and what is said if they are absent."""

import importlib.util
import sys

import jax
import pytest
from absl import flags

from jaxft import optional
from jaxft.optional import tokamax_module


def test_tokamax_does_not_read_the_command_line_of_a_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxft", "train", "--config=configs/quickstart.py"])
    options = tokamax_module("tokamax.config")
    if options is None:
        pytest.skip("tokamax is not installed")
    flags.FLAGS.unparse_flags()
    with pytest.raises(flags.UnrecognizedFlagError):
        options.cross_compile.value  # noqa: B018  # as without jaxft
    assert tokamax_module("tokamax.config") is options
    assert options.cross_compile.value is False
    flags.FLAGS(["program", "--tokamax_cross_compile"])  # a program that lets absl read its options still can
    assert options.cross_compile.value is True
    flags.FLAGS.tokamax_cross_compile = False


def test_an_absent_library_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    assert tokamax_module("tokamax") is None


@pytest.mark.parametrize("installed", [True, False])
def test_with_a_jax_that_it_does_not_work_with_it_is_not_used_and_the_log_says_so_once(monkeypatch, caplog, installed):
    spec = importlib.util.find_spec("jax") if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    optional._works.cache_clear()
    try:
        assert tokamax_module("tokamax") is None and tokamax_module("tokamax.config") is None
    finally:
        optional._works.cache_clear()
    assert len(caplog.records) == installed and ("does not work with JAX" in caplog.text) == installed
