"""What a chip costs by the hour: the dated file that ships with jaxft, or one of the user's in the same form."""

import json
from dataclasses import dataclass
from typing import Any

from jaxft.assets import ASSETS
from jaxft.errors import ConfigError, did_you_mean

FILE = ASSETS / "prices.json"


@dataclass(frozen=True, kw_only=True)
class Price:
    """USD for one chip for an hour. date: of the file; spot None: not known."""

    on_demand: float
    spot: float | None
    date: str
    source: str


def price_of(chip: str, path: str | None = None) -> Price:
    """The price of a kind of chip. path: a file `{"date": ..., "chips": {"v5e": {"on_demand": 1.2, "spot": 0.5}}}`.

    Raises ConfigError for a file that cannot be read, is not of that form or lacks the chip.
    """
    where = str(path or FILE)
    try:
        with open(where, encoding="utf-8") as file:
            table: Any = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"prices in {where} cannot be read: {error}") from error
    chips = table.get("chips") if isinstance(table, dict) else None
    if not isinstance(chips, dict):
        raise ConfigError(f'prices in {where}: there is no object "chips" of kinds and prices')
    if chip not in chips:
        hint = did_you_mean(chip, chips)
        raise ConfigError(f"prices in {where}: no {chip}.{hint} There: {', '.join(chips)}.")
    entry = chips[chip]
    values = [entry.get("on_demand"), entry.get("spot")] if isinstance(entry, dict) else [None, None]
    if not isinstance(values[0], int | float) or not isinstance(values[1], int | float | None):
        raise ConfigError(f"prices in {where}: {chip} needs a number on_demand, and spot a number or null")
    return Price(on_demand=values[0], spot=values[1], date=str(table.get("date", "undated")), source=where)
