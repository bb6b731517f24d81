"""Names of slices, and what is refused."""

import pytest

from jaxft.errors import ConfigError
from jaxft.hardware.chips import CHIPS
from jaxft.hardware.topology import cubic_shape, parse


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e:1x1", "v5e:1x1", 1),
        ("V5E-16", "v5e:4x4", 16),
        ("v5litepod-8", "v5e:2x4", 8),
        # Google's names of v4 and v5p count cores, two a chip.
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-32", "v4:2x2x4", 16),
        ("v5p:4", "v5p:2x2x1", 4),
        ("v6e-256", "v6e:16x16", 256),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4),
        ("h100:8", "h100:8", 8),
        ("h100", "h100:1", 1),
        ("a100-80", "a100-80:1", 1),
        ("a100-40:4", "a100-40:4", 4),
    ],
)
def test_a_name_is_a_torus(text, name, chips):
    topology = parse(text)
    assert (topology.name, topology.chips) == (name, chips)


def test_slices_multiply_chips_and_chips_may_hold_two_devices():
    assert parse("v5e:4x4", 2).chips == 32
    assert parse("tpu7x:2x2x1").devices == 8
    assert parse("v5e:4x4", 2).describe() == "2 slices of v5e:4x4 (32 chips)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", "not known.*KIND:AxB.*Kinds: v4, v5e"),
        ("h1000:8", "Did you mean 'h100'"),
        ("v5e:2x2x2", "torus of 2 dimensions, such as v5e:2x2"),
        ("v5p:2x2", "torus of 3 dimensions"),
        ("v5e-12", "powers of two up to 256"),
        ("v5p-7", "no slice of 3.5 v5p chips"),
        ("v6e:32x32", "from 1 to 256 chips"),
        ("v5e:0x4", "from 1 to 256 chips"),
        ("h100:9", "no slice of 9 h100 chips"),
    ],
)
def test_what_does_not_exist_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
    with pytest.raises(ConfigError, match="at least one slice"):
        parse("v5e:4x4", 0)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_power_of_two_has_a_torus_up_to_the_largest(chip):
    for power in range(chip.max_chips.bit_length()):
        shape = cubic_shape(chip, 2**power)
        assert shape is not None and len(shape) == chip.dimensions
        product = 1
        for side in shape:
            product *= side
        assert product == 2**power
    assert cubic_shape(chip, 2 * chip.max_chips) is None


def test_every_chip_has_a_price():
    from jaxft.hardware.prices import price_of

    for name in CHIPS:
        price = price_of(name)
        assert 0 < price.spot < price.on_demand and price.date


def test_prices_of_the_user_replace_ours(tmp_path):
    from jaxft.hardware.prices import price_of

    path = tmp_path / "prices.json"
    path.write_text('{"date": "2030-01-01", "chips": {"v5e": {"on_demand": 1, "spot": null}, "v6e": {"spot": 1}}}')
    price = price_of("v5e", str(path))
    assert (price.on_demand, price.spot, price.date) == (1, None, "2030-01-01")
    with pytest.raises(ConfigError, match="v6e needs a number on_demand"):
        price_of("v6e", str(path))
    with pytest.raises(ConfigError, match="no price of v5p.*The file has: v5e, v6e"):
        price_of("v5p", str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match='no object "chips"'):
        price_of("v5e", str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        price_of("v5e", str(tmp_path / "none.json"))
