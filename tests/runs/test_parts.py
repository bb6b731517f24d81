"""In how many parts a batch goes through the devices: the fewest of which one fits, by the arithmetic of plans."""

import dataclasses
from pathlib import Path

import jax
import pytest

import jaxft
from jaxft.errors import ConfigError
from jaxft.hardware.recomputation import MARGIN
from jaxft.runs.memory.parts import fewest_parts, policies

CONFIG = str(Path(__file__).parents[2] / "configs" / "llama3_1_8b_lora.py") + ":smoke"
DIVISORS = (1, 2, 3, 4, 6, 12)


def config_of(**train):
    config = jaxft.get_config(CONFIG)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1, **train))


def test_the_fewest_parts_of_which_one_fits():
    config, device = config_of(batch_size=12), jax.devices()[:1]
    peaks, limit = [], 2**60
    while True:
        parts = fewest_parts(config, device, limit, steps=10)
        assert parts.number == DIVISORS[len(peaks)] and parts.fits == (parts.peak <= MARGIN * limit)
        peaks.append(parts.peak)
        if parts.number == 12:
            break
        limit = int(parts.peak / MARGIN) - 1  # just too little for so few parts
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    hopeless = fewest_parts(config, device, 1, steps=10)
    assert hopeless.number == 12 and not hopeless.fits


def test_a_part_divides_over_the_devices():
    devices = jax.devices()
    assert fewest_parts(config_of(batch_size=16), devices, 1, steps=10).number == 2, "eight devices have a row each"
    with pytest.raises(ConfigError, match="batch"):
        fewest_parts(config_of(batch_size=9), devices, 1, steps=10)


def test_a_named_policy_is_the_only_one():
    config = config_of(batch_size=2)
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    auto = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="auto"))
    assert policies(named, jax.devices()) == ("full",) and policies(auto, jax.devices()) == ("dots",)
