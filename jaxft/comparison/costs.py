"""What calls cost, and from how many on a trained model pays."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import ConfigError
from jaxft.files.run_folder import METRICS, SUMMARY, read_if_whole
from jaxft.hardware.prices import price_of
from jaxft.hardware.roofline import efficiency_of
from jaxft.hardware.topology import Topology, parse
from jaxft.runs.folder import run_config
from jaxft.training.log import read_metrics

BFLOAT16 = 2  # bytes


@dataclass(frozen=True, kw_only=True)
class Prices:
    """USD. per_hour: of the devices of this machine, all of them; None if it is not known. source: where it is from.

    per_million: of an endpoint, for a million tokens of prompts and of answers. labels: what the answers of the
    training rows cost in all. topology: accelerators that are not here; seconds are then those of `modelled_seconds`.
    """

    per_hour: float | None = None
    source: str = ""
    per_million: tuple[float, float] | None = None
    labels: float = 0.0
    topology: Topology | None = None


def prices_of(
    usd_per_hour: float | None,
    prices: str | None,
    endpoint_usd: str | None,
    label_usd: float | None,
    topology: str | None = None,
) -> Prices:
    """The prices of a call: those given, else that of the attached chips in the price file; a CPU has none.

    topology: a name such as v5e:1x1, whose price and speed count in place of the attached ones. endpoint_usd:
    `PROMPT,ANSWER`, USD for a million tokens of each. Raises ConfigError for values that are no prices.
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
    if topology is not None:
        there = parse(topology)
        usd, where = _price(there, prices)
        source = f"{where}; seconds by arithmetic, not measured"
        return Prices(per_hour=usd, source=source, per_million=per_million, labels=labels, topology=there)
    per_hour, source = _attached_price(prices)
    return Prices(per_hour=per_hour, source=source, per_million=per_million, labels=labels)


def _attached_price(path: str | None) -> tuple[float | None, str]:
    import jax

    from jaxft.hardware.attached import attached_topology

    name = attached_topology(jax.devices())
    if name is None:
        return None, "no price of this machine is known: give --usd_per_hour"
    return _price(parse(name), path)


def _price(topology: Topology, path: str | None) -> tuple[float, str]:
    """(USD an hour of all chips, where that is from)."""
    price = price_of(topology.chip.name, path)
    return price.on_demand * topology.chips, f"{topology.name} on demand, {price.date}"


def modelled_seconds(way: Mapping[str, Any], topology: Topology) -> tuple[float, float] | None:
    """Device seconds of a call of a way of compare.json without and with a cached prefix, by arithmetic; None if its
    size is not known.

    Of `slots` calls side by side, in bfloat16, split over all chips: prompts take two operations a parameter and token;
    a token of the answers reads all weights once for all slots, and each slot's own cache. The shares of a chip's peaks
    are those of `jaxft plan`.
    """
    if way.get("active_parameters") is None:
        return None
    chip, share = topology.chip, efficiency_of(topology.chip)
    flops = chip.flops * share.products * topology.chips
    bandwidth = chip.hbm_bandwidth * share.memory * topology.chips
    active, slots = way["active_parameters"], way["slots"]
    # A prompt with half of its answer is what a token reads on average.
    cache = way["cache_bytes_per_token"] * BFLOAT16 / way["cache_item_bytes"]
    read = BFLOAT16 * way["parameters"] + slots * cache * (way["prompt_tokens"] + way["answer_tokens"] / 2)
    token = max(2 * active * slots / flops, read / bandwidth) / slots
    prompt = 2 * active / flops
    whole = prompt * way["prompt_tokens"] + token * way["answer_tokens"]
    return whole, whole - prompt * (way["shared_tokens"] or 0)


def prices_of_calls(way: Mapping[str, Any], prices: Prices) -> dict[str, float | None]:
    """USD for 1,000 calls of a way of compare.json, and with a cached prefix; None where they are not known."""
    if way["kind"] == "endpoint":
        usd = _endpoint_usd(way, prices)
        return {"usd_per_1000": usd, "usd_per_1000_cached": usd}
    seconds: tuple[float | None, float | None] = way.get("seconds_side_by_side"), way.get("seconds_cached")
    out: dict[str, float | None] = {}
    if prices.topology is not None:
        seconds = modelled_seconds(way, prices.topology) or (None, None)
        out = {"seconds_modelled": seconds[0], "seconds_modelled_cached": seconds[1]}
    usd, cached = (
        None if one is None or prices.per_hour is None else 1000 * one * prices.per_hour / 3600 for one in seconds
    )
    return out | {"usd_per_1000": usd, "usd_per_1000_cached": cached}


def _endpoint_usd(way: Mapping[str, Any], prices: Prices) -> float | None:
    if prices.per_million is None or not way["prompt_tokens"]:
        return None
    prompt, answer = prices.per_million
    return (way["prompt_tokens"] * prompt + way["answer_tokens"] * answer) / 1000


def training_cost(run: Path, prices: Prices, active: int | None = None) -> dict[str, Any]:
    """Hours of a run, and what they and the labels cost; `usd` is None if no price is known.

    Hours are those of its summary, or on another topology those of its tokens by arithmetic. active: the parameters
    that multiply a token.
    """
    hours = _measured_hours(run) if prices.topology is None else _modelled_hours(run, prices.topology, active)
    usd = None if hours is None or prices.per_hour is None else hours * prices.per_hour + prices.labels
    return {"hours": hours, "usd": usd}


def _measured_hours(run: Path) -> float | None:
    seconds = read_if_whole(run / SUMMARY).get("seconds")
    parts = [value for value in seconds.values() if isinstance(value, int | float)] if isinstance(seconds, dict) else []
    return sum(parts) / 3600 if parts else None


def _modelled_hours(run: Path, topology: Topology, active: int | None) -> float | None:
    """Six operations a token and parameter, four where only an adapter is trained."""
    tokens = (
        [row["num_tokens"] for row in read_metrics(run) if "num_tokens" in row] if (run / METRICS).is_file() else []
    )
    if active is None or not tokens:
        return None
    each = 6 if run_config(str(run)).adapter.kind == "none" else 4
    reached = topology.chip.flops * efficiency_of(topology.chip).products * topology.chips
    return float(each * active * tokens[-1] / reached / 3600)


def break_even(fixed: float | None, prompt: float | None, tuned: float | None) -> float | str | None:
    """The calls after which a fixed price is earned back by cheaper calls: a number, `never`, or None if unknown.

    fixed: USD. prompt, tuned: USD for 1,000 calls.
    """
    if fixed is None or prompt is None or tuned is None:
        return None
    return "never" if prompt <= tuned else 1000 * fixed / (prompt - tuned)
