"""What a run on Google Cloud costs: its worst case before it starts, and what it has cost so far."""

from dataclasses import dataclass
from typing import Protocol

from jaxft.errors import ConfigError
from jaxft.hardware.prices import price_of
from jaxft.hardware.topology import Topology
from jaxft.pods.request import Request


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The price of all chips of a run together. chip_usd: of one chip and hour. date: of the table of prices."""

    chips: int
    kind: str
    chip_usd: float
    date: str

    @property
    def hour_usd(self) -> float:
        """USD of one hour of all chips."""
        return self.chips * self.chip_usd

    def usd(self, hours: float) -> float:
        """USD of so many hours of all chips."""
        return self.hour_usd * hours

    def at_most(self, hours: float) -> str:
        """The worst case in words, such as `at most 4.0 h, USD 172.80 (16 v6e x 2.70)`."""
        return f"at most {hours:.1f} h, USD {self.usd(hours):.2f} ({self.chips} {self.kind} x {self.chip_usd:.2f})"


class Priced(Protocol):
    """What has a price: a request of `jaxft pod run` or `jaxft pod manifest`."""

    @property
    def shape(self) -> Topology:
        """The topology with its slices."""
        ...

    @property
    def spot(self) -> bool:
        """Whether spot machines are bought."""
        ...

    @property
    def prices(self) -> str | None:
        """A file in place of jaxft's table."""
        ...


def rate_of(request: Priced) -> Rate:
    """The rate of a request's machines: the spot price for spot, else that on demand, which no other way exceeds.

    Raises ConfigError if the table has no price of the chip, or none of spot.
    """
    topology = request.shape
    price = price_of(topology.chip.name, request.prices)
    chip_usd = price.spot if request.spot else price.on_demand
    if chip_usd is None:
        raise ConfigError(
            f"prices in {price.source}: no spot price of {topology.chip.name}, so that the cost of --spot is not "
            "known. Add one to a file, and name it with --prices"
        )
    return Rate(chips=topology.chips, kind=topology.chip.name, chip_usd=chip_usd, date=price.date)


def check_limit(request: Request) -> Rate:
    """The rate of a request. Raises ConfigError if the worst case of the run is above --max_usd."""
    rate = rate_of(request)
    if request.max_usd is not None and rate.usd(request.max_hours) > request.max_usd:
        hours = int(request.max_usd / rate.hour_usd * 100) / 100
        mend = f"lower --max_hours to {hours:g}, or raise --max_usd" if hours else "raise --max_usd"
        raise ConfigError(
            f"--max_usd={request.max_usd:g}: the run could cost more, {rate.at_most(request.max_hours)}: {mend}"
        )
    return rate
