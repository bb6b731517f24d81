import dataclasses
import inspect
import math

import pytest

import jaxft
from jaxft.errors import ConfigError
from jaxft.generation.settings import Sampling


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", "text"),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_bounds_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.* must be"):
        Sampling(**{"max_new_tokens": 4, field: value})


def test_the_bounds_themselves_are_allowed():
    Sampling(max_new_tokens=1, temperature=0, top_k=1, top_p=1.0, min_p=0.0, seed=2**32 - 1, stop=("\n",))


def test_the_api_has_the_same_settings_with_the_same_defaults():
    arguments = inspect.signature(jaxft.generate).parameters
    for field in dataclasses.fields(Sampling):
        assert arguments[field.name].default == field.default, field.name
