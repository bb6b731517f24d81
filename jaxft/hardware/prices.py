"""Hourly prices of chips, from the dated file that ships with jaxft or from a user's file of the same form."""

from dataclasses import dataclass

from jaxft.assets import ASSETS
from jaxft.errors import ConfigError, did_you_mean
from jaxft.files.strict_json import parse_json
from jaxft.home import local_path

FILE = ASSETS / "prices.json"
FORM = '{"date": "2030-01-31", "chips": {"v5e": {"on_demand": 1.2, "spot": null}}}'


@dataclass(frozen=True, kw_only=True)
class Price:
    """Price of one chip in USD per hour. spot: None if unknown. date: of the file. source: path of the file."""

    on_demand: float
    spot: float | None
    date: str
    source: str


def price_of(chip: str, path: str | None = None) -> Price:
    """The price of a kind of chip.

    path: a file `{"date": ..., "chips": {"v5e": {"on_demand": 1.2, "spot": 0.5}}}`; None for jaxft's own.
    Raises ConfigError if the file cannot be read, has another form or does not list the chip.
    """
    source = local_path(path or FILE)
    try:
        with open(source, "rb") as file:
            table = parse_json(file.read())
    except (OSError, ValueError) as error:
        raise ConfigError(f"prices in {source} cannot be read: {error}") from error
    chips = table.get("chips") if isinstance(table, dict) else None
    if not isinstance(chips, dict):
        raise ConfigError(f'prices in {source}: no object "chips". Write {FORM}.')
    if chip not in chips:
        hint = did_you_mean(chip, chips)
        raise ConfigError(
            f"prices in {source}: no price of {chip}.{hint} The file has: {', '.join(chips)}. Add {chip} to it."
        )
    entry = chips[chip]
    values = [entry.get("on_demand"), entry.get("spot")] if isinstance(entry, dict) else [None, None]
    if not isinstance(values[0], int | float) or not isinstance(values[1], int | float | None):
        raise ConfigError(
            f"prices in {source}: {chip} needs a number on_demand, and spot as a number or null. Write {FORM}."
        )
    return Price(on_demand=values[0], spot=values[1], date=str(table.get("date", "undated")), source=source)
