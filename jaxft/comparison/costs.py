"""What calls cost, and from how many on a trained model pays."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import ConfigError
from jaxft.files.run_folder import SUMMARY, read_if_whole


@dataclass(frozen=True, kw_only=True)
class Prices:
    """USD. per_hour: of the devices of this machine, all of them; None if it is not known. source: where it is from.

    per_million: of an endpoint, for a million tokens of prompts and of answers. labels: what the answers of the
    training rows cost in all.
    """

    per_hour: float | None = None
    source: str = ""
    per_million: tuple[float, float] | None = None
    labels: float = 0.0


def prices_of(
    usd_per_hour: float | None, prices: str | None, endpoint_usd: str | None, label_usd: float | None
) -> Prices:
    """The prices of a call: those given, else that of the attached chips in the price file; a CPU has none.

    endpoint_usd: `PROMPT,ANSWER`, USD for a million tokens of each. Raises ConfigError for values that are no prices.
    """
    per_million = None
    if endpoint_usd is not None:
        try:
            prompt, answer = (float(part) for part in endpoint_usd.split(","))
        except ValueError:
            prompt = answer = -1.0
        if min(prompt, answer) < 0:
            raise ConfigError(
                f"--endpoint_usd={endpoint_usd} must be two prices for a million tokens, of prompts and of answers, "
                "such as 0.15,0.6"
            )
        per_million = (prompt, answer)
    for name, value in (("usd_per_hour", usd_per_hour), ("label_usd", label_usd)):
        if value is not None and value < 0:
            raise ConfigError(f"--{name}={value:g} must be zero or more")
    labels = label_usd or 0.0
    if usd_per_hour is not None:
        return Prices(per_hour=usd_per_hour, source="--usd_per_hour", per_million=per_million, labels=labels)
    per_hour, source = _attached_price(prices)
    return Prices(per_hour=per_hour, source=source, per_million=per_million, labels=labels)


def _attached_price(path: str | None) -> tuple[float | None, str]:
    import jax

    from jaxft.hardware.attached import attached_topology
    from jaxft.hardware.prices import price_of
    from jaxft.hardware.topology import parse

    name = attached_topology(jax.devices())
    if name is None:
        return None, "no price of this machine is known: give --usd_per_hour"
    topology = parse(name)
    price = price_of(topology.chip.name, path)
    return price.on_demand * topology.chips, f"{topology.name} on demand, {price.date}"


def usd_per_1000(way: Mapping[str, Any], prices: Prices) -> float | None:
    """USD for 1,000 calls of a way of compare.json: device time side by side, or tokens of an endpoint; or None."""
    if way["kind"] == "endpoint":
        if prices.per_million is None or not way["prompt_tokens"]:
            return None
        prompt, answer = prices.per_million
        return (way["prompt_tokens"] * prompt + way["answer_tokens"] * answer) / 1000
    seconds = way.get("seconds_side_by_side")
    return None if seconds is None or prices.per_hour is None else 1000 * seconds * prices.per_hour / 3600


def training_cost(run: Path, prices: Prices) -> dict[str, Any]:
    """Hours of a run by its summary, and what they and the labels cost; `usd` is None if no price is known."""
    seconds = read_if_whole(run / SUMMARY).get("seconds")
    parts = [value for value in seconds.values() if isinstance(value, int | float)] if isinstance(seconds, dict) else []
    hours = sum(parts) / 3600 if parts else None
    usd = None if hours is None or prices.per_hour is None else hours * prices.per_hour + prices.labels
    return {"hours": hours, "usd": usd}


def break_even(fixed: float | None, prompt: float | None, tuned: float | None) -> float | str | None:
    """The calls after which a fixed price is earned back by cheaper calls: a number, `never`, or None if unknown.

    fixed: USD. prompt, tuned: USD for 1,000 calls.
    """
    if fixed is None or prompt is None or tuned is None:
        return None
    return "never" if prompt <= tuned else 1000 * fixed / (prompt - tuned)
