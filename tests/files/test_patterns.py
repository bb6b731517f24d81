"""Regular expressions of others: they match as Python's do, and have an end."""

import re

import pytest

from jaxft.errors import ModelError
from jaxft.files import patterns
from jaxft.files.patterns import matches

NAMES = ("model.layers.0.self_attn.q_proj", "lm_head", "model.layers.11.mlp.down_proj")


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", ".*q_proj", r"model\.layers\.\d+\..*_proj", "(q|k)_proj|lm_head", r"^lm_(?:head|foot)$", "", ".*[01]"],
)
def test_patterns_match_as_those_of_python(pattern):
    for name in NAMES:
        assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None)
        ending = rf"(.*\.)?({pattern})$"
        assert matches(ending, name, whole=False) == (re.match(ending, name) is not None)


@pytest.mark.parametrize(("pattern", "name"), [("(a|aa)+$", "a" * 60 + "b"), ("(.|..)+/", "q.proj" * 10 + "/ ")])
def test_a_pattern_without_end_is_stopped(pattern, name, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(ModelError, match="was stopped: after 0.1 seconds it is not done with"):
        matches(pattern, name)


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[z-a]", "(" * 100_000])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ModelError, match="is no regular expression"):
        matches(pattern, "a")
