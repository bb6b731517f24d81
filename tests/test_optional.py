"""Optional libraries: what their import does to a program, and what is said if they are absent."""

import sys

import pytest
from absl import flags

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
